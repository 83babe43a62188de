"""Running averages that their tool saves as a list of tensors without names (torch_ema, diffusers)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mim_refiner.checkpoints.store import Contents
from mim_refiner.errors import CheckpointError

Sections = dict[str, dict[str, Tensor]]
_LIST = "shadow_params"
_NO_PARAMETERS = ("running_mean", "running_var")  # buffers of floats
_FIXED = ("pos_embed",)  # tables that some encoders do not train


def with_names(sections: Sections) -> Sections:
    """``sections``, each list of an average under the names of the model whose parameters it fits in order."""
    models = [held for path, held in sections.items() if not path.startswith("opt") and not _is_list(held)]
    return {
        path: next((placed for held in models if (placed := _placed(held, average))), average)
        if path.rpartition(".")[2] == _LIST and _is_list(average)
        else average
        for path, average in sections.items()
    }


def refuse_lists(contents: Contents) -> None:
    """CheckpointError for a list that fits no model: what it averages would be passed over in silence."""
    for path, held in contents.sections.items():
        if path.rpartition(".")[2] == _LIST and _is_list(held):
            raise CheckpointError(
                f"{contents.source}: {path} is a running average without names (torch_ema) whose {len(held)} tensors "
                "do not fit a model's in order; copy it into the model (copy_to) and save that, or pass encoder=model "
                "(--encoder) for the weights that are not averaged"
            )


def _is_list(held: Mapping[str, Tensor]) -> bool:
    return all(name.isdecimal() for name in held)


def _placed(model: dict[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """``model`` with its parameters' values from ``average``; fixed tables count only where the list has them."""
    names = [n for n, tensor in model.items() if tensor.is_floating_point() and not n.endswith(_NO_PARAMETERS)]
    values = list(average.values())
    for trained in (names, [name for name in names if not name.endswith(_FIXED)]):
        if [model[name].shape for name in trained] == [value.shape for value in values]:
            return model | dict(zip(trained, values, strict=True))
    return None
