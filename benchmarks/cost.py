"""What a step of refinement costs on paper: operations and bytes sent (docs/scale.md).

All counts follow from the shapes; a multiplication and an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mim_refiner.training.traffic import Traffic
from mim_refiner.types import Checkpointing, ImageSize, height_width

GLOBAL_VIEWS = 2


@dataclass(frozen=True)
class EncoderShape:
    """A plain ViT."""

    dim: int
    depth: int
    heads: int
    patch: int
    prefix: int = 1  # class token, registers
    channels: int = 3
    mlp_ratio: float = 4.0
    image_size: ImageSize = 224  # of the position table

    def tokens(self, size: ImageSize) -> int:
        """Tokens of a view of ``size`` pixels."""
        height, width = height_width(size)
        return (height // self.patch) * (width // self.patch) + self.prefix

    @property
    def block_parameters(self) -> int:
        d, hidden = self.dim, int(self.mlp_ratio * self.dim)
        return (3 * d * d + 3 * d) + (d * d + d) + (2 * d * hidden + hidden + d) + 4 * d

    @property
    def stem_parameters(self) -> int:
        d = self.dim
        return d * self.channels * self.patch**2 + d + self.prefix * d + self.tokens(self.image_size) * d

    @property
    def parameters(self) -> int:
        return self.stem_parameters + self.depth * self.block_parameters + 2 * self.dim

    def block_operations(self, tokens: int) -> float:
        """Forward operations of a block on one view of so many tokens."""
        return 2 * tokens * (4 + 2 * self.mlp_ratio) * self.dim**2 + 4 * tokens**2 * self.dim

    def class_token_operations(self, tokens: int) -> float:
        """Forward operations of a block of whose output only the class token is read (models.runners)."""
        return 2 * (4 + 2 * self.mlp_ratio) * self.dim**2 + 4 * self.heads * tokens * self.dim


@dataclass(frozen=True)
class Workload:
    """What of a recipe decides over its cost."""

    encoder: EncoderShape
    batch: int  # images a step, of all processes
    head_blocks: Sequence[int]
    view_sizes: Sequence[tuple[ImageSize, int]]  # (pixels, how many such views)
    projector_hidden: int = 2048
    predictor_hidden: int = 4096
    out_dim: int = 256
    queue_size: int = 65_536
    frozen_blocks: int = 0
    micro_batch: int | None = None
    kept_graphs: int = 0
    checkpointing: Checkpointing = False
    bf16: bool = True
    class_token_last: bool = True  # the last block that runs does so for the class token alone
    processes: int = 1
    shards: int = 1  # processes of a node that share weights, gradients, moments and average of the blocks (FSDP2)

    @property
    def views(self) -> int:
        return sum(count for _, count in self.view_sizes)

    @property
    def local_batch(self) -> int:
        return self.batch // self.processes

    @property
    def blocks_run(self) -> int:
        return max(self.head_blocks) + 1

    @property
    def trained_blocks(self) -> int:
        return self.blocks_run - self.frozen_blocks

    @property
    def head_parameters(self) -> int:
        d, p, q, o = self.encoder.dim, self.projector_hidden, self.predictor_hidden, self.out_dim
        return d * p + p * p + p * o + o * q + q * o + 2 * (2 * p + o + q + o)

    @property
    def trained_parameters(self) -> int:
        encoder = self.trained_blocks * self.encoder.block_parameters
        return encoder + (0 if self.frozen_blocks else self.encoder.stem_parameters) + self.heads_parameters

    @property
    def heads_parameters(self) -> int:
        return len(self.head_blocks) * self.head_parameters

    def view_operations(self, *, prefix: bool) -> float:
        """Forward operations of the encoder on all views of one image: of the frozen prefix, or of the rest."""
        e, frozen = self.encoder, self.frozen_blocks
        alone = self.class_token_last and not prefix
        blocks = frozen if prefix else self.blocks_run - frozen - alone
        stem = 2 * e.dim * e.channels * e.patch**2 if prefix == bool(frozen) else 0
        return sum(
            count
            * (
                blocks * e.block_operations(e.tokens(size))
                + alone * e.class_token_operations(e.tokens(size))
                + stem * e.tokens(size)
            )
            for size, count in self.view_sizes
        )

    def operations(self) -> dict[str, float]:
        """Operations of one step on all processes, by part."""
        trained = self.view_operations(prefix=False)
        passes = 3 + self.recomputed
        matrices = self.encoder.dim * self.projector_hidden + self.projector_hidden**2
        matrices += self.out_dim * (self.projector_hidden + 2 * self.predictor_hidden)
        heads = len(self.head_blocks) * self.batch
        return {
            "encoder": self.batch * (self.view_operations(prefix=True) + passes * trained),
            "heads": heads * self.views * 3 * 2 * matrices,
            "negatives": heads * GLOBAL_VIEWS * self.views * self.batch * 2 * self.out_dim * 2,
            "queue": heads * GLOBAL_VIEWS * self.queue_size * 2 * self.out_dim,
        }

    @property
    def recomputed(self) -> float:
        """Further forward passes of the trained part; what selective checkpointing computes again is not counted."""
        parts = -(-self.local_batch // (self.micro_batch or self.local_batch))
        again = 0.0
        for number, view in enumerate(self.view_sizes if parts > 1 else ()):
            kept = min(max(0, self.kept_graphs - parts * number), parts)
            again += (1 - kept / parts) * replace(self, view_sizes=[view]).view_operations(prefix=False)
        return again / self.view_operations(prefix=False) + (self.checkpointing is True)

    def model_operations(self) -> float:
        """Operations without recomputation: what MFU counts."""
        plain = replace(self, micro_batch=None, checkpointing=False)
        return sum(plain.operations().values())

    def traffic(self) -> dict[str, float]:
        """Bytes that one process sends in a step, by part."""
        return Traffic(
            self.processes,
            self.shards,
            self.local_batch,
            self.views,
            len(self.view_sizes),
            len(self.head_blocks),
            self.out_dim,
            4 * self.encoder.block_parameters,
            self.frozen_blocks,
            self.trained_blocks,
            4 * self.trained_parameters,
            self.micro_batch,
            self.checkpointing,
            self.bf16,
        ).sent()
