"""The gloo processes of test_distributed.py: python distributed_worker.py FOLDER SETTING...

Torch is loaded once; every process is a fork of this one. Rank R of setting N writes FOLDER/N-R.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from test_distributed import Setting, bf16_step, moments, three_steps


def process(rank: int, setting: Setting, store: Path, out: Path) -> None:
    """One process of a group."""
    torch.set_num_threads(1)  # makes the fork's thread pool anew before two threads of autograd would at once
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=setting.processes)
    own = {"bf16": bf16_step, "moments": moments}.get(setting.way)
    save_file(own() if own else three_steps(*setting[1:]), out)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder, settings = Path(sys.argv[1]), [Setting(*values) for values in json.loads(sys.argv[2])]
    failed = 0
    for number, setting in enumerate(settings):
        children = []
        for rank in range(setting.processes):
            child = os.fork()
            if child:
                children.append(child)
                continue
            try:
                process(rank, setting, folder / f"store-{number}", folder / f"{number}-{rank}.safetensors")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    sys.exit(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
