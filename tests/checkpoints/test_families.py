"""Each family at other sizes: made under its names, loaded, and written back; wrappers and choices of encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.checkpoints.families import beit, hf, plain_vit, renamed
from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.backbone import Backbone, create_vit

State = dict[str, Tensor]


def to_capi(state: State) -> State:
    return {f"backbone.{name}": tensor for name, tensor in renamed.CAPI_KEYS.from_timm(state).items()}


def written_as(family: str, backbone: Backbone) -> State:
    """The encoder under the names of its family's files."""
    keys = {"beit": beit.BEIT_NAMES, "hf_vitmae": hf.VIT_KEYS, "hf_ijepa": hf.VIT_KEYS, "hf_beit": hf.BEIT_KEYS}
    keys |= {"hf_data2vec_vision": hf.BEIT_KEYS}
    state = backbone.model.state_dict()
    if family == "mim_refiner":
        table = state["pos_embed"].reshape(1, *backbone.grid_of(backbone.info.image_size), -1)
        return renamed.REFINER_KEYS.from_timm(state | {"pos_embed": table})
    return to_capi(state) if family == "capi" else keys.get(family, plain_vit.VIT_NAMES).from_timm(state)


def state_of(name: str, **arguments: object) -> State:
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 24} | arguments
    model = timm.create_model(name, num_classes=0, **arguments)
    return {name: tensor + 0.2 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def save(state: object, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("family", ["mae", "beit", "capi", "mim_refiner", "timm"])
@pytest.mark.parametrize(("size", "patch"), [((24, 24), 8), ((48, 16), 8), ((20, 20), 4)])
def test_round_trip_is_bit_equal(tmp_path: Path, family: str, size: tuple[int, int], patch: int) -> None:
    kinds = {
        "beit": ("beit_base_patch16_224", {"use_fc_norm": False, "global_pool": "token"}),
        "capi": ("vit_capi", {"reg_tokens": 4}),
        "mim_refiner": ("vit_tiny_patch16_224", {"no_embed_class": True}),
    }
    name, arguments = kinds.get(family, ("vit_tiny_patch16_224", {}))
    state = state_of(name, img_size=size, patch_size=patch, **arguments)
    native = Backbone.wrap(
        timm.create_model(
            name, num_classes=0, embed_dim=24, depth=2, num_heads=3, patch_size=patch, img_size=size, **arguments
        )
    )
    native.model.load_state_dict(state)
    written = written_as(family, native)
    section = {"mae": "model", "beit": "model", "mim_refiner": "state_dict"}.get(family)
    path = save({section: written} if section else written, tmp_path)
    loaded = load_backbone(path, num_heads=3, image_size=size)
    assert loaded.info.family == family
    assert (loaded.info.image_size, loaded.info.coverage) == (size, 1.0)
    again = written_as(family, loaded)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in again)
    images = torch.randn(2, 3, *size)
    [expected], [got] = native.eval().forward_blocks(images, [-1]), loaded.forward_blocks(images, [-1])
    torch.testing.assert_close(got.patches, expected.patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "heads"),
    [
        ("checkpoints/mae_pretrain.pth", 4),
        ("checkpoints/timm_vit_layerscale_reg2.safetensors", 4),
        ("checkpoints/capi_vit.pth", 4),
        ("checkpoints/hf_vitmae_base", 4),
        ("checkpoints/hf_beit_shared", 4),
        ("checkpoints/hf_beit_perblock", 4),
        ("checkpoints/hf_data2vec_vision_abspos", 4),
        ("checkpoints/hf_ijepa", 4),
        ("hub/prenorm_d64.th", 4),
        ("hub/postnorm_d64.th", 4),
    ],
)
def test_golden_files_come_back_bit_equal(shared_dir: Path, file: str, heads: int) -> None:
    path = shared_dir / "golden" / file
    backbone = load_backbone(path, num_heads=heads)
    written = written_as(backbone.info.family, backbone)
    weights = path / "model.safetensors" if path.is_dir() else path
    raw = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    raw = raw.get("model", raw.get("state_dict", raw))
    placed = {record.name for record in inspect_checkpoint(path).tensors if record.target}
    assert written.keys() == placed
    assert all(torch.equal(tensor, raw[name]) for name, tensor in written.items())


@pytest.mark.parametrize(
    "prefix", ["module._orig_mod.", "_orig_mod.backbone.", "model.encoder.", "_fsdp_wrapped_module."]
)
def test_wrappers_and_prefixes_of_a_mae(tmp_path: Path, prefix: str) -> None:
    state = state_of("vit_tiny_patch16_224", img_size=40)
    mid = {n.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for n, t in state.items()}
    path = save({"model": {prefix + n: t for n, t in mid.items()} | {"head.bias": torch.ones(3)}}, tmp_path)
    backbone = load_backbone(path, num_heads=3)
    assert (backbone.info.family, backbone.info.image_size, backbone.info.coverage) == ("mae", (40, 40), 1.0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.model.state_dict().items())


def test_running_averages_are_preferred(tmp_path: Path) -> None:
    first, second = (state_of("vit_tiny_patch16_224") for _ in range(2))
    path = save({"state_dict": first, "state_dict_ema": second}, tmp_path)
    assert torch.equal(load_backbone(path, num_heads=3).model.cls_token, second["cls_token"])
    chosen = load_backbone(f"{path}::num_heads=3,encoder=model")
    assert torch.equal(chosen.model.cls_token, first["cls_token"])
    assert chosen.info.source == str(path)
    with pytest.raises(InputError, match="has no encoder 'teacher'; it holds model, ema"):
        load_backbone(path, num_heads=3, encoder="teacher")


@pytest.mark.parametrize("average", ["encoder_k", "momentum_encoder", "key_encoder"])
def test_the_average_of_moco_is_taken(tmp_path: Path, average: str) -> None:
    first, second = (state_of("vit_tiny_patch16_224") for _ in range(2))
    state = {f"module.encoder_q.{name}": tensor for name, tensor in first.items()}
    state |= {f"module.{average}.{name}": tensor for name, tensor in second.items()}
    path = save({"state_dict": state | {"module.queue": torch.zeros(4, 4)}}, tmp_path)
    assert torch.equal(load_backbone(path, num_heads=3).model.cls_token, second["cls_token"])
    assert torch.equal(load_backbone(path, num_heads=3, encoder="encoder_q").model.cls_token, first["cls_token"])
    assert inspect_checkpoint(path, num_heads=3).encoders == ("encoder_q", average)


def test_what_tools_put_beside_an_encoder_is_left_out(tmp_path: Path) -> None:
    state = state_of("vit_tiny_patch16_224")
    extra = {"n_averaged": torch.tensor(3), "masked_embed": torch.zeros(1, 24), "decoder_x": torch.zeros(2)}
    path = save({f"module.{name}": tensor for name, tensor in (state | extra).items()}, tmp_path)
    assert load_backbone(path, num_heads=3).info.coverage == 1.0
    path = save({"model": {"_fsdp_wrapped_module._flat_param": torch.zeros(9)}}, tmp_path)
    with pytest.raises(CheckpointError, match="flat parameters of FSDP; save the full state dict"):
        load_backbone(path)


def test_data2vec_of_another_size_with_heads_from_its_config(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_postnorm",
        num_classes=0,
        embed_dim=48,
        depth=1,
        num_heads=6,
        patch_size=4,
        img_size=12,
        no_embed_class=True,
    )
    written = renamed.DATA2VEC2_KEYS.from_timm(model.state_dict())
    assert "modality_encoders.IMAGE.context_encoder.norm.weight" in written
    path = save({"cfg": {"model": {"num_heads": 6, "decoder": {"depth": 2}}}, "model": written}, tmp_path)
    backbone = load_backbone(path)
    assert (backbone.info.family, backbone.info.num_heads, backbone.info.image_size) == ("data2vec2", 6, (12, 12))
    images = torch.randn(1, 3, 12, 12)
    [last] = backbone.forward_blocks(images, [-1])
    torch.testing.assert_close(last.patches, model.eval().forward_features(images)[:, 1:], rtol=0, atol=1e-6)
    wide = load_backbone(path, image_size=(16, 8)).forward_blocks(torch.randn(1, 3, 16, 8), [0])
    assert wide[0].patches.shape == (1, 8, 48)


def test_capi_tells_its_heads_and_takes_any_shape(tmp_path: Path) -> None:
    model = timm.create_model("vit_capi", num_classes=0, embed_dim=48, depth=1, num_heads=2, patch_size=8, reg_tokens=8)
    Backbone.wrap(model)  # which makes it take any shape
    backbone = load_backbone(save(to_capi(model.state_dict()), tmp_path))
    assert (backbone.info.num_heads, backbone.info.num_prefix_tokens, backbone.info.pooling) == (2, 8, "mean")
    images = torch.randn(2, 3, 16, 40)
    [last] = backbone.forward_blocks(images, [-1], norm=True)
    torch.testing.assert_close(last.patches, model.eval().forward_features(images)[:, 8:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels_of_a_beit(tmp_path: Path, channels: int) -> None:
    state = state_of("beit_base_patch16_224", use_fc_norm=False, global_pool="token")
    backbone = load_backbone(save({"model": state}, tmp_path), in_chans=channels)
    assert len(backbone.info.mean) == backbone.info.in_chans == channels
    assert backbone.forward_blocks(torch.randn(1, channels, 24, 24), [-1])[0].patches.shape == (1, 9, 24)


def test_info_of_create_vit_is_unchanged() -> None:
    info = Backbone.wrap(create_vit("vit_w24_d1_h3_p8", 24)).info
    assert (info.position_rule, info.norm_eps, info.pooling) == ("timm", 1e-6, "cls")
