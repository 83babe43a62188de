"""The cached step: forward and backward pass of a batch of any size in micro-batches, exactly the plain step.

The loss of refinement couples the images of a batch only behind the pooled block features: in the heads' BatchNorm,
the negatives and the queue. So the cached step runs the encoder without graph over micro-batches, computes the heads
and their gradients with respect to the features on the whole batch, and then runs the encoder once more with graph,
micro-batch by micro-batch, each fed with its rows of the feature gradients. Random layers see the same draws in both
passes and as in the plain step (:mod:`mim_refiner.models.stochastic`). The price is one more forward pass of the part
that trains; where memory allows, the graphs of some micro-batches are kept from the first pass and cost none.
(Gradient caching: Gao et al., arXiv 2101.06983.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_refiner.core.collectives import Rows, use_rows
from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.refiner import Refiner, RefinerOutput
from mim_refiner.models.stochastic import batch_dependent_layer, batch_norm_layer
from mim_refiner.types import Checkpointing


def refuse_batch_dependent(encoder: nn.Module, micro_batch: int | None, checkpointing: Checkpointing = False) -> None:
    """Raise InputError when micro-batches, or blocks that are computed twice, would change what is learned."""
    layer = batch_norm_layer(encoder) if checkpointing else None
    if layer:
        raise InputError(
            f"checkpointing: it passes each batch twice through the encoder's layer {layer}, whose running statistics "
            "would move twice; leave checkpointing out and set a smaller batch_size"
        )
    layer = batch_dependent_layer(encoder) if micro_batch is not None else None
    if layer:
        raise InputError(
            f"micro_batch: the encoder's layer {layer} makes the outputs of an image depend on the other images of the "
            "batch, so micro-batches would change the training; leave micro_batch out and set a smaller batch_size"
        )


@dataclass
class _Piece:
    """One micro-batch of the views of one size, between its two passes."""

    group: list[int]  # numbers of its views
    rows: slice  # of this process's batch
    prefix: Tensor | None  # tokens after the frozen blocks; None where there are none
    state: list[Tensor]  # random state at the start of the trained part
    outputs: Mapping[int, Tensor] | None = None  # pooled blocks with their graph, where it is kept

    def images(self, views: Sequence[Tensor]) -> Tensor:
        return torch.cat([views[index][self.rows] for index in self.group])

    def part(self, grad: Tensor | None) -> Tensor:
        """Its rows [views * rows, D] of a block's feature gradients."""
        assert grad is not None
        return grad[self.group][:, self.rows].flatten(0, 1)


def cached_forward_backward(
    refiner: Refiner,
    views: Sequence[Tensor],
    sample_ids: Tensor,
    generator: torch.Generator | None,
    run: Run,
    rows: Rows,
    micro_batch: int,
    kept: int = 0,
) -> RefinerOutput:
    """As training.refine.forward_backward; ``rows`` of this process's views, ``kept`` graphs."""
    trains = not refiner.encoder_frozen
    features, pieces = _first_pass(refiner, views, run, rows, micro_batch, kept if trains else 0)
    for value in features.values():
        value.requires_grad_(trains)
    with run.autocast():
        output = refiner.head_losses(features, sample_ids, generator=generator)
    output.loss.backward()
    while trains and pieces:
        piece = pieces.pop(0)  # frees what it holds
        _set_random_state(piece.state, run.device)
        with use_rows(rows.part(piece.rows.start, piece.rows.stop)):
            outputs, piece.outputs = piece.outputs, None
            if outputs is None:
                with run.autocast():
                    outputs = refiner.pooled_blocks(piece.images(views) if piece.prefix is None else piece.prefix)
            grads = [piece.part(value.grad) for value in features.values()]
            torch.autograd.backward([outputs[block] for block in features], grads)
            del outputs  # before the next one's graph is made
    return output


@torch.no_grad()
def _first_pass(
    refiner: Refiner, views: Sequence[Tensor], run: Run, rows: Rows, micro_batch: int, kept: int
) -> tuple[dict[int, Tensor], list[_Piece]]:
    """First pass: {block: [V, B, D]}, and what the second pass needs."""
    pieces: list[_Piece] = []
    features: dict[int, Tensor] = {}
    for group in refiner.view_groups(views):
        begin = _random_state(run.device)
        for start in range(0, rows.count, micro_batch):
            part = slice(start, min(start + micro_batch, rows.count))
            _set_random_state(begin, run.device)
            # autocast keeps the casts it made of weights; ones made without graph must not reach the second pass
            with use_rows(rows.part(part.start, part.stop)), run.autocast():
                piece = _Piece(group, part, None, begin)
                prefix = refiner.frozen_prefix(piece.images(views))
                if refiner.frozen_blocks and not refiner.encoder_frozen:
                    piece.prefix, piece.state = prefix, _random_state(run.device)
                with torch.set_grad_enabled(len(pieces) < kept):
                    outputs = refiner.pooled_blocks(prefix)
                piece.outputs = outputs if len(pieces) < kept else None
                pieces.append(piece)
                for block, output in outputs.items():
                    if block not in features:
                        features[block] = output.new_empty(len(views), rows.count, output.shape[1])
                    for index, of_view in zip(group, output.detach().chunk(len(group)), strict=True):
                        features[block][index, part] = of_view
    return features, pieces


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
