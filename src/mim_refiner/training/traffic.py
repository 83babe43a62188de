"""What processes send each other in a step of refinement, on paper (docs/scale.md)."""

from __future__ import annotations

from dataclasses import dataclass

from mim_refiner.types import Checkpointing


@dataclass(frozen=True)
class Traffic:
    """What decides over it; bytes are those of float32 weights."""

    processes: int
    shards: int  # processes of a node that share weights, gradients, moments and average of the blocks (FSDP2)
    images: int  # a step, of each process
    views: int
    view_sizes: int
    heads: int
    out_dim: int
    block_bytes: float
    frozen_blocks: int
    trained_blocks: int
    trained_bytes: float  # of blocks, heads and all else
    micro_batch: int | None = None
    checkpointing: Checkpointing = False
    bf16: bool = True

    def sent(self) -> dict[str, float]:
        """Bytes that one process sends in a step, by part (ring algorithms)."""
        others = self.processes - 1
        ring = others / self.processes
        predictions = self.heads * self.views * self.images * self.out_dim * 4
        whole, sharded = self.trained_bytes, {}
        if self.shards > 1:
            # Blocks are gathered anew for every pass over views of one size, and once more to go back through it; under
            # bf16 their weights travel so, their gradients do not.
            micro = min(self.micro_batch or self.images, self.images)
            passes = self.view_sizes * -(-self.images // micro) * self.block_bytes
            ways = 2 + (micro < self.images) + bool(self.checkpointing)
            part, nodes = 1 - 1 / self.shards, self.processes // self.shards
            gathers = passes * (ways * self.trained_blocks + self.frozen_blocks) * part
            reduced = passes * self.trained_blocks * (part + 2 * (1 - 1 / nodes) / self.shards)
            sharded = {"weights of blocks": gathers * (0.5 if self.bf16 else 1), "gradients of blocks": reduced}
            whole -= self.trained_blocks * self.block_bytes
        return sharded | {
            "gradients": 2 * ring * whole,
            "predictions": predictions * others + 2 * ring * predictions * self.processes,
            "queue": self.heads * self.images * (self.out_dim * 4 + 8) * others,
        }
