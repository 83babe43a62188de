"""One of two gloo processes of test_distributed.py: python distributed_worker.py RANK STORE MICRO_BATCH OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from test_distributed import three_steps


def main() -> None:
    rank, store, micro_batch, out = int(sys.argv[1]), *sys.argv[2:5]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    save_file(three_steps(int(micro_batch) or None), out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
