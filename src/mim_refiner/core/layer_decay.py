"""Layer-wise learning-rate decay: the closer a parameter is to the input, the less it moves (BEiT, MAE)."""

from __future__ import annotations

from torch import nn

from mim_refiner.errors import InputError

_STEM = {
    "cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre", "embed_norm",
    "rel_pos_bias", "rope",
}  # fmt: skip
_TAIL = {"norm", "fc_norm", "attn_pool", "head", "head_dist"}


def layer_decay_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return {parameter name: learning-rate scale} for a timm ViT (a module with a list ``blocks``).

    Block b of ``depth`` blocks: decay^(depth-b), so the last block has decay^1; stem (patch embedding, tokens,
    position table): decay^(depth+1); final norm, pooling and classifier: 1.
    Raises InputError for a decay outside (0, 1] and for a model whose parameters do not follow these names.
    """
    if not 0 < decay <= 1:
        raise InputError(f"layer decay must be above 0 and at most 1, got {decay}")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise InputError(f"layer decay needs a model with a list 'blocks' (a ViT); {type(model).__name__} has none")
    return {name: decay ** _distance(name, len(blocks)) for name, _ in model.named_parameters()}


def _distance(name: str, depth: int) -> int:
    """Number of decays between the output and parameter ``name``."""
    head, _, rest = name.partition(".")
    if head == "blocks":
        return depth - int(rest.partition(".")[0])
    if head in _STEM:
        return depth + 1
    if head in _TAIL:
        return 0
    raise InputError(f"layer decay does not know where parameter '{name}' lies; set layer_decay to 1 for this model")
