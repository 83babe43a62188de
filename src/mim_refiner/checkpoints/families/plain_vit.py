"""Plain ViTs: their structure, read from the names and shapes of tensors, and what their families share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import DROPPED, GUESS, PROJECTION, Converted, Family, View, Wishes
from mim_refiner.checkpoints.families.keymap import ZEROS, KeyMap, Mapped
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.vit import BASE_ARCHITECTURE, IMAGENET_MEAN, IMAGENET_STD, SIZES, mlp_ratio, standard_name
from mim_refiner.reporting import number_of

_BLOCK_PARTS = (
    r"norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|attn\.[qk]_norm\.(weight|bias)"
    r"|mlp\.fc[12]\.(weight|bias)|ls[12]\.gamma"
)
_ENCODER_NAME = re.compile(
    rf"blocks\.\d+\.({_BLOCK_PARTS})|patch_embed\.proj\.(weight|bias)|(norm|fc_norm|norm_pre)\.(weight|bias)"
    r"|cls_token|reg_token|pos_embed"
)

# Width alone tells the number of heads only for the standard sizes.
_HEADS = {(width, depth): heads for width, depth, heads in SIZES} | {(2560, 24): 32, (1408, 40): 16, (1536, 40): 24}
USUAL_HEADS = {192: (3, 12), 384: (6, 12)}  # widths that public encoders have with several numbers of heads
_USUAL_SIDE = 96  # pixels; images of pre-training are rarely smaller, except square ones of a few positions


def is_encoder_name(name: str) -> bool:
    """Whether a plain timm ViT has a tensor of this name."""
    return _ENCODER_NAME.fullmatch(name) is not None


# Other names of the same parts: BEiT's layer scale, DINOv2's SwiGLU; in the latter's chunks of blocks all have others.
_PARTS = (
    ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("mlp.w12.{p}", "mlp.fc1.{p}"), ("mlp.w3.{p}", "mlp.fc2.{p}"),
)  # fmt: skip
PARTS = (
    "norm1.{p}", "norm2.{p}", "attn.qkv.{p}", "attn.proj.{p}", "mlp.fc1.{p}", "mlp.fc2.{p}", "ls1.gamma", "ls2.gamma",
)  # fmt: skip
_STARTS = ("blocks.{i}.", "blocks.{n}.{i}.")
VIT_NAMES = KeyMap(  # timm's names, and other spellings of them
    [
        ("register_tokens", "reg_token"),
        ("dist_token", "reg_token"),  # DeiT's distillation token, with an entry in the table of positions
        *((start + part, "blocks.{i}." + target) for part, target in _PARTS for start in _STARTS),
        *(((f"{start}attn.q_bias", ZEROS, f"{start}attn.v_bias"), "blocks.{i}.attn.qkv.bias") for start in _STARTS),
        *((_STARTS[1] + part, "blocks.{i}." + part) for part in PARTS),
    ],
    same=is_encoder_name,
)


def has_plain_vit(names: Collection[str]) -> bool:
    """Whether ``names`` hold a patch embedding and blocks with nothing in them that a plain ViT has not."""
    in_blocks = [name for name in names if name.startswith("blocks.")]
    return (
        PROJECTION in names
        and any(name.endswith(".attn.qkv.weight") for name in in_blocks)
        and all(VIT_NAMES.knows(name) for name in in_blocks)
    )


def is_bare_vit(view: View) -> bool:
    """Whether a plain ViT comes without a config.json."""
    return view.config is None and has_plain_vit(view.tensors)


def infer_structure(
    tensors: dict[str, Tensor],
    wishes: Wishes,
    *,
    final_norm: bool | None = None,
    known_heads: int = 0,
    known_size: tuple[int, int] | None = None,
) -> Converted:
    """Read the structure of the plain ViT that ``tensors`` (timm names) belong to.

    ``final_norm`` None = as in the file; True = the family always has one, so a file without it is incomplete.
    ``known_heads``, ``known_size``: number of heads and image size that a config beside the weights names.
    What the caller and the file's own arguments say (``wishes``) counts before any guess.
    Raises CheckpointError for shapes that no ViT has and for a table of unknown grid.
    """
    sizes, patch = size_arguments(tensors, wishes.where)
    width, depth, in_chans = sizes["embed_dim"], sizes["depth"], sizes["in_chans"]
    fc_norm = "fc_norm.weight" in tensors
    num_registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    table = tensors.get("pos_embed")
    entries = 0 if table is None or table.ndim != 3 else table.shape[1]
    # a file without ``cls_token`` whose table counts one is incomplete, not another ViT
    class_token = "cls_token" in tensors or (is_square(entries - 1) and not is_square(entries))
    num_prefix = int(class_token) + num_registers
    grid, prefix_in_table, grid_notes = table_grid(table, num_prefix, patch, in_chans, known_size, wishes)
    if depth == 0:
        others = [name for name in tensors if not is_encoder_name(name)] or list(tensors)
        raise CheckpointError(
            f"{wishes.where}: no tensor is named as those of blocks (blocks.0.attn.qkv.weight) but "
            f"{', '.join(others[:4])}; say in a key map (--key-map) which are the blocks'"
        )
    in_file = fc_norm or "norm.weight" in tensors or "norm.bias" in tensors
    has_norm = in_file if final_norm is None else final_norm
    arguments = sizes | {
        "img_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "qkv_bias": has_any(tensors, "attn.qkv.bias"),
        "proj_bias": has_any(tensors, "attn.proj.bias"),
        "qk_norm": has_any(tensors, "attn.q_norm.weight"),
        "class_token": class_token,
        "reg_tokens": num_registers,
        "no_embed_class": prefix_in_table == 0,
        "pre_norm": "norm_pre.weight" in tensors,
        "final_norm": has_norm,
        "fc_norm": fc_norm,
        "global_pool": "avg" if fc_norm or not class_token else "token",
    }
    mlp = {end: t.shape for n, t in tensors.items() for end in ("fc1", "fc2") if n.endswith(f"mlp.{end}.weight")}
    gated = len(mlp) == 2 and mlp["fc1"][0] == 2 * mlp["fc2"][-1]  # SwiGLU: half of fc1's outputs gate the others
    if has_any(tensors, "ls1.gamma"):
        arguments["init_values"] = 1e-5  # only switches layer scale on; the weights replace the value
    elif gated:  # timm's name brings the kind of MLP; a value of None would be dropped, and the name's own used
        arguments["init_values"] = 0.0
    from_norm = next((width // t.shape[0] for n, t in tensors.items() if n.endswith("attn.q_norm.weight")), 0)
    heads, notes = choose_heads(width, depth, known_heads or from_norm, wishes)
    notes += grid_notes
    if not has_norm and final_norm is None:
        notes.append("the file has no final norm, so the encoder has none")
    name = standard_name(width, depth, heads, patch) or BASE_ARCHITECTURE
    name = "vit_giant_patch14_dinov2" if gated else name  # timm's ViT whose MLP is a SwiGLU
    return Converted(name, arguments, heads, tensors, notes=tuple(notes))


def projection_sizes(tensors: Mapping[str, Tensor], where: str) -> tuple[int, int, tuple[int, int]]:
    """(width, input channels, patch) of the patch projection; CheckpointError if it is no such thing."""
    shape = tuple(tensors[PROJECTION].shape)
    if len(shape) != 4 or 0 in shape:
        raise CheckpointError(f"{where}: {PROJECTION} has shape {list(shape)}, not four dimensions; convert it first")
    return shape[0], shape[1], (shape[2], shape[3])


def size_arguments(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Any], tuple[int, int]]:
    """The constructor's arguments that shapes tell, all but the image size; and the patch."""
    width, in_chans, patch = projection_sizes(tensors, where)
    rows = next((t.shape[0] for n, t in tensors.items() if n.endswith("mlp.fc1.weight")), 4 * width)
    return {
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": count_blocks(tensors),
        "mlp_ratio": mlp_ratio(rows, width),
    }, patch


def count_blocks(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)


def choose_heads(width: int, depth: int, known: int, wishes: Wishes) -> tuple[int, list[str]]:
    """Number of heads (0 = nobody knows) and what to remark; InputError for one that does not divide the width.

    The caller's word counts first, then ``known`` (what tensors or config tell), then the file's own arguments, then
    the standard size, if that is the only usual number.
    """
    standard = 0 if width in USUAL_HEADS else _HEADS.get((width, depth), 0)
    by_size = width // wishes.told_head_dim if wishes.told_head_dim > 0 and width % wishes.told_head_dim == 0 else 0
    by_name = wishes.told_model[1] if wishes.told_model[0] == width else 0
    told = wishes.told_heads if wishes.told_heads > 0 and width % wishes.told_heads == 0 else by_size or by_name
    heads = wishes.num_heads or known or told or standard
    if heads and width % heads:
        raise InputError(
            f"{wishes.where}: num_heads={heads} does not divide the encoder's width {width}; pass num_heads= "
            "(--num-heads) with a divisor"
        )
    if heads and heads == standard and not (wishes.num_heads or known or told):
        return heads, [f"{GUESS}{heads} attention heads, as the standard ViT of this size; pass num_heads= if not"]
    return heads, []


def heads_question(arguments: Mapping[str, Any]) -> str:
    """The line that asks for the number of heads."""
    blocks = number_of(arguments["depth"], "blocks") if "depth" in arguments else "its blocks"
    width = arguments.get("embed_dim", 0)
    usual = f" ({' or '.join(map(str, USUAL_HEADS[width]))} are usual)" if width in USUAL_HEADS else ""
    return (
        f"the weights ({blocks} of width {width}) do not tell the number of attention heads{usual}; "
        "pass num_heads= (--num-heads, or behind the file: FILE::num_heads=N)"
    )


def table_grid(
    table: Tensor | None,
    num_prefix: int,
    patch: tuple[int, int],
    in_chans: int,
    known: tuple[int, int] | None,
    wishes: Wishes,
) -> tuple[tuple[int, int], int, list[str]]:
    """Grid (rows, columns) of the position table, how many prefix tokens have an entry in it, and what to remark.

    ``known``: image size of a config, which decides; then what the file's arguments say; then what the caller asks
    for, if the table has as many positions; then the square.
    Raises CheckpointError where nothing tells, and where the square is no better than other shapes.
    """
    where = wishes.where
    sizes = (known, wishes.told_size, wishes.image_size)
    grids = [size and (size[0] // patch[0], size[1] // patch[1]) for size in sizes]
    if table is None:
        return next(filter(None, grids), (224 // patch[0] or 1, 224 // patch[1] or 1)), 0, []
    if table.ndim != 3:
        raise CheckpointError(f"{where}: its position table is {list(table.shape)}; save it as [1, entries, width]")
    length = table.shape[1]
    squares = [p for p in (num_prefix, 0) if is_square(length - p)]
    for grid in grids:
        # A size that is only asked for may be one to resize to: it says nothing against a square of another number.
        for prefix in squares[:1] if grid is grids[2] and squares else (num_prefix, 0):
            if grid and 0 not in grid and grid[0] * grid[1] == length - prefix:
                return grid, prefix, []
    if squares:
        side = math.isqrt(length - squares[0])
        size = f"{side * patch[0]}x{side * patch[1]}"
        # many positions that make a square which is no usual image: text lines of 32x128 px, spectrograms
        small = side * max(patch) < _USUAL_SIDE and side >= 12
        if small or (in_chans == 1 and side >= 16 and side % 8 == 0):
            rows = next((rows for rows in (side // 2, side // 4) if side * side % rows == 0), 1)
            columns = side * side // rows
            other = f"{rows * patch[0]}x{columns * patch[1]}"
            raise CheckpointError(
                f"{where}: {side * side} positions may be {side}x{side} ({size} px) or {rows}x{columns} ({other} px); "
                "pass image_size=HEIGHTxWIDTH of its training (behind the file: FILE::image_size=32x128)"
            )
        note = f"{GUESS}images of {size} px in training, since {side * side} positions make a square; pass "
        return (side, side), squares[0], [f"{note}image_size= if not"] if side > 1 else []
    for pixels_told in filter(None, sizes[:2]):
        if stride := _overlap(pixels_told, patch, length - num_prefix):
            shown = f"{pixels_told[0]}x{pixels_told[1]} px, every {stride} px"
            raise CheckpointError(
                f"{where}: its {length - num_prefix} positions are those of overlapping patches ({shown}), which no "
                "encoder here has; give one whose patches lie side by side"
            )
    raise CheckpointError(
        f"{where}: the position table has {length} entries, no square grid; pass its image_size=(height, width) in "
        f"pixels (behind the file: FILE::image_size=HEIGHTxWIDTH), a multiple of {patch[0]}x{patch[1]} with "
        f"{length - num_prefix} positions"
    )


def _overlap(size: tuple[int, int], patch: tuple[int, int], positions: int) -> int:
    """The stride of patches that overlap (spectrogram transformers), 0 if none explains the number of positions."""
    for stride in range(1, min(patch)):
        rows, columns = ((side - length) // stride + 1 for side, length in zip(size, patch, strict=True))
        if rows * columns == positions:
            return stride
    return 0


def is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def has_any(tensors: Mapping[str, Tensor], ending: str) -> bool:
    return any(name.endswith(ending) for name in tensors)


# --- what families share

# (view, tensors under timm's names, wishes) -> what the file says; may change the tensors, and take some out.
Prepare = Callable[[View, dict[str, Tensor], Wishes], dict[str, Any]]
_FIELDS = {field.name for field in fields(Converted)}


def make_family(
    name: str,
    matches: Callable[[View], bool],
    *,
    anchor: str = PROJECTION,
    to_timm: Callable[[Mapping[str, Tensor]], Mapped] = VIT_NAMES.to_timm,
    infer: Callable[..., Converted] = infer_structure,
    dropped: Mapping[str, str] | None = None,
    prepare: Prepare | None = None,
    default_encoder: tuple[str, ...] = (),
    heads: Mapping[int, int] | None = None,
    **facts: Any,
) -> Family:
    """A family by what it differs in from others.

    ``to_timm``: its names. ``infer``: its structure, from (tensors, wishes, ...). ``dropped``: start of a name
    -> why the encoder does not take it, beside DROPPED. ``heads``: those of the authors' models by width, where other
    ViTs of that width have others. ``facts``: fields of :class:`Converted` (ImageNet's mean and std and the rule
    "bicubic" by default), or further arguments of ``infer``; those that depend on the file come from ``prepare``.
    """

    def convert(view: View, wishes: Wishes) -> Converted:
        tensors, origin = to_timm(view.tensors)
        said: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "position_rule": "bicubic"} | facts
        said |= prepare(view, tensors, wishes) if prepare else {}
        structure = {key: said.pop(key) for key in said.keys() - _FIELDS}
        if heads and PROJECTION in tensors and wishes.told_heads < 1:
            structure.setdefault("known_heads", heads.get(tensors[PROJECTION].shape[0], 0))
        found = infer(tensors, wishes, **structure)
        said["notes"] = found.notes + tuple(said.get("notes", ()))
        said["arguments"] = found.arguments | said.get("arguments", {})
        said["origin"] = {view.names[short]: target for short, target in origin.items()}
        return replace(found, reasons={**(dropped or {}), **DROPPED}, **said)

    return Family(name, anchor, matches, convert, default_encoder=default_encoder)
