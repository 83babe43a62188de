"""One of the gloo processes of test_distributed.py.

python distributed_worker.py RANK STORE OUT PROCESSES MICRO_BATCH FROZEN_BLOCKS WAY.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from test_distributed import three_steps


def main() -> None:
    rank, store, out, processes, micro_batch, frozen_blocks, way = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(processes))
    save_file(three_steps(int(micro_batch) or None, int(frozen_blocks), way), out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
