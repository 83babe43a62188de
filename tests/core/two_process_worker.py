"""One of two gloo processes of test_collectives.py: python two_process_worker.py RANK STORE GOLDEN OUT."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mim_refiner.core import collectives
from mim_refiner.core.neighbors import NeighborQueue
from mim_refiner.core.nna import multi_view_nna_loss
from mim_refiner.models.heads import HeadConfig, RefinerHead


def golden_run(rank: int, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, gradient and three queue updates on the recorded inputs of this rank."""
    mine = {key.removeprefix(f"rank{rank}/"): value for key, value in data.items() if key.startswith(f"rank{rank}/")}
    predicted = mine["predicted"].transpose(0, 1).contiguous().requires_grad_()
    targets, neighbors = (mine[f"projected_{swap}swap"].transpose(0, 1) for swap in ("pre", "post"))
    loss = multi_view_nna_loss(
        predicted, targets, neighbors, 0.2, gather=collectives.all_gather_with_grad, view_pairing="reference"
    ).loss
    loss.backward()
    assert predicted.grad is not None
    result = {"loss": loss.detach(), "grad": predicted.grad.transpose(0, 1).contiguous()}
    queue = NeighborQueue(20, 16)
    names = {"entries": "x", "sample_ids": "idx", "age": "age", "pointer": "ptr"}
    queue.load_state_dict({ours: mine[f"queue_init/{theirs}"] for ours, theirs in names.items()})
    for step in range(3):
        x, ids = mine[f"q{step}/x"], mine[f"q{step}/idx"]
        result[f"q{step}/nn_x"] = queue.lookup(x, ids).neighbors
        queue.enqueue(collectives.all_gather(x[:4]), collectives.all_gather(ids))
        result |= {f"q{step}/after/{theirs}": getattr(queue, ours).clone() for ours, theirs in names.items()}
    return result


def head_run(rank: int) -> dict[str, torch.Tensor]:
    """A head on its half of a batch; eval-mode BatchNorm, because SyncBatchNorm has no CPU kernel."""
    torch.manual_seed(0)
    head = RefinerHead(6, HeadConfig(8, 8, 4, 12))
    head.train()
    for module in (head.projector, head.predictor):
        module.eval()
    features = torch.randn(3, 8, 6)[:, 4 * rank : 4 * rank + 4]
    out = head(features, torch.arange(4 * rank, 4 * rank + 4))
    out.loss.backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    gradients = {f"head/grad/{name}": p.grad for name, p in head.named_parameters() if p.grad is not None}
    return {"head/loss": out.loss.detach(), "head/queue_ids": head.queue.sample_ids, **gradients}


def main() -> None:
    rank, store, golden, out = int(sys.argv[1]), *sys.argv[2:5]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert (collectives.rank(), collectives.world_size()) == (rank, 2)
    save_file({**golden_run(rank, load_file(golden)), **head_run(rank)}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
