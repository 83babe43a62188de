"""Files as public repositories write them: names and shapes of their code around a small random ViT, whose tokens are
known from timm's own model. (test_golden_layouts.py has values of the public classes themselves.)"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import CheckpointError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import sinusoid_table

State = dict[str, Tensor]
WIDTH, HEADS, SIZE = 32, 4, (32, 32)


def model_of(name: str = "vit_tiny_patch16_224", **arguments: object) -> timm.models.VisionTransformer:
    """A random timm model: width 32, 3 blocks, 4 heads, patch 8, 32 px."""
    given = {"embed_dim": WIDTH, "depth": 3, "num_heads": HEADS, "patch_size": 8, "img_size": SIZE} | arguments
    if name.startswith("vit"):
        given.setdefault("fc_norm", False)
    model = timm.create_model(name, num_classes=0, **given).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def keyless(model: timm.models.VisionTransformer) -> timm.models.VisionTransformer:
    """The same without biases of the keys, as in BEiT's blocks."""
    for block in model.blocks:
        block.attn.qkv.bias.data[WIDTH : 2 * WIDTH] = 0
    return model


def renamed(state: State, *rules: tuple[str, str]) -> State:
    def name(text: str) -> str:
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text)
        return text

    return {name(key): tensor.clone() for key, tensor in state.items()}


def split_biases(state: State) -> State:
    """attn.qkv.bias as q_bias and v_bias."""
    split: State = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            start = name.removesuffix("qkv.bias")
            split |= {start + "q_bias": tensor[:WIDTH].clone(), start + "v_bias": tensor[2 * WIDTH :].clone()}
        else:
            split[name] = tensor.clone()
    return split


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def zeros(*names: str) -> State:
    return {name: torch.zeros(8, 8) for name in names}


DECODER = zeros("decoder_embed.weight", "decoder_blocks.0.norm1.weight", "decoder_pred.weight") | {
    "mask_token": torch.zeros(1, 1, 8)
}


def scale_mae() -> tuple[object, object]:
    model = model_of()
    decoder = DECODER | zeros("fpn.do_fpn1.0.weight", "fcn.layers.0.0.weight", "mask_token_decoder")
    return {"model": model.state_dict() | decoder}, model


def msm_mae() -> tuple[object, object]:
    model = keyless(model_of(class_token=False, global_pool="avg", in_chans=1, img_size=(16, 48)))
    return {"model": split_biases(model.state_dict()) | DECODER}, model


def msm_mae_with_class_token() -> tuple[object, object]:
    model = keyless(model_of(in_chans=1))
    return {"model": split_biases(model.state_dict()) | DECODER}, model


def _without_table(**arguments: object) -> tuple[State, timm.models.VisionTransformer]:
    model = keyless(model_of(class_token=False, global_pool="avg", **arguments))
    model.pos_embed.data = sinusoid_table(16, WIDTH).clone()
    state = split_biases(model.state_dict())
    del state["pos_embed"]
    return state, model


def mae_pytorch() -> tuple[object, object]:
    state, model = _without_table()
    decoder = zeros("decoder.blocks.0.attn.q_bias", "encoder_to_decoder.weight", "mask_token")
    return {"model": under("encoder.", state) | decoder, "epoch": 3}, model


def mae_pytorch_fine_tuned() -> tuple[object, object]:
    state, model = _without_table(init_values=0.1)
    state = renamed(state, (r"^norm\.", "fc_norm."), (r"ls(\d)\.gamma", r"gamma_\1"))
    return {"model": state | zeros("head.weight")}, model


def videomae() -> tuple[object, object]:
    state, model = _without_table()
    half = state["patch_embed.proj.weight"] / 2
    state["patch_embed.proj.weight"] = torch.stack([half, half], dim=2)
    return {"model": under("encoder.", state) | zeros("encoder_to_decoder.weight", "decoder.head.weight")}, model


def multimae() -> tuple[object, object]:
    model = model_of(final_norm=False)
    model.cls_token.data += model.pos_embed[:, :1]
    model.pos_embed.data[:, :1] = 0
    state = renamed(
        model.state_dict(),
        (r"^patch_embed\.", "input_adapters.rgb."),
        (r"^blocks\.", "encoder."),
        ("cls_token", "global_tokens"),
    )
    table = state.pop("pos_embed")[:, 1:].transpose(1, 2).reshape(1, WIDTH, 4, 4)
    others = zeros(
        "input_adapters.depth.proj.weight", "input_adapters.semseg.class_emb.weight", "output_adapters.rgb.x"
    )
    return {"model": state | {"input_adapters.rgb.pos_emb": table} | others}, model


def _chunked(name: str) -> str:
    return re.sub(r"^blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) // 2}.{match[1]}.", name)


def _dinov2_state(model: timm.models.VisionTransformer) -> State:
    state = renamed(model.state_dict(), ("reg_token", "register_tokens"))
    if "register_tokens" in state:  # the table counts the class token
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.zeros(1, WIDTH)}


def dinov2() -> tuple[object, object]:
    model = model_of(init_values=1.0)
    return _dinov2_state(model), model


def dinov2_registers_without_layer_scale() -> tuple[object, object]:
    model = model_of(reg_tokens=3, no_embed_class=True)
    return _dinov2_state(model), model


def dinov2_teacher_in_chunks() -> tuple[object, object]:
    model = model_of(init_values=1.0, reg_tokens=2, no_embed_class=True)
    state = {_chunked(name): tensor for name, tensor in _dinov2_state(model).items()}
    heads = zeros("dino_head.mlp.0.weight", "ibot_head.mlp.0.weight")
    return {"teacher": under("backbone.", state) | heads}, model


def dinov2_giant() -> tuple[object, object]:
    model = model_of("vit_giant_patch14_dinov2", mlp_ratio=3.0)
    return renamed(_dinov2_state(model), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")), model


def _mm(state: State) -> State:
    return renamed(
        state,
        (r"^norm\.", "ln1."),
        (r"^fc_norm\.", "ln2."),
        (r"patch_embed\.proj", "patch_embed.projection"),
        (r"^blocks\.", "layers."),
        (r"\.norm(\d)\.", r".ln\1."),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
    )


def mmpretrain() -> tuple[object, object]:
    model = model_of(init_values=1.0)
    state = renamed(
        _mm(model.state_dict()), (r"ls1\.gamma", "attn.gamma1.weight"), (r"ls2\.gamma", "ffn.gamma2.weight")
    )
    return {"meta": {}, "state_dict": under("backbone.", state) | zeros("neck.decoder_embed.weight", "head.x")}, model


def mmpretrain_fine_tuned() -> tuple[object, object]:
    model = model_of(fc_norm=True, global_pool="avg")
    return {"state_dict": under("backbone.", _mm(model.state_dict())) | zeros("head.fc.weight")}, model


def mmpretrain_beit() -> tuple[object, object]:
    model = model_of("beit_base_patch16_224", use_fc_norm=True, global_pool="avg", init_values=0.0)
    return {"state_dict": under("backbone.", _mm(model.state_dict())) | zeros("head.fc.weight")}, model


def prithvi() -> tuple[object, object]:
    model = model_of(in_chans=6, img_size=(32, 32))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    state["pos_embed"][:, 1:, -8:] = 1.0  # the last quarter is the date
    model.pos_embed.data.copy_(state["pos_embed"])
    table = [state["pos_embed"]] + [state["pos_embed"][:, 1:] + date for date in (1.0, 2.0, 3.0)]
    state["pos_embed"] = torch.cat(table, dim=1)
    decoder = zeros("decoder.mask_token", "decoder.decoder_embed.weight")
    scales = {"encoder.temporal_embed_enc.scale": torch.ones(1), "encoder.location_embed_enc.scale": torch.ones(1)}
    return under("encoder.", state) | decoder | scales, model


def vitpose() -> tuple[object, object]:
    model = model_of("vit_variant", class_token=False, global_pool="avg", img_size=(32, 24), patch_padding=2)
    state = renamed(model.state_dict(), (r"^norm\.", "last_norm."))
    first = torch.randn(1, 1, WIDTH)
    state["pos_embed"] = torch.cat([first, state["pos_embed"] - first], dim=1)
    return {"state_dict": under("backbone.", state) | zeros("keypoint_head.final_layer.weight"), "meta": {}}, model


def cae() -> tuple[object, object]:
    model = model_of(
        "beit_base_patch16_224", use_abs_pos_emb=True, use_rel_pos_bias=False, use_fc_norm=False, global_pool="token"
    )
    other = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    neck = zeros("pretext_neck.regressor_blocks.0.norm1_q.weight", "encoder_to_decoder.weight", "mask_token")
    return {"model": under("teacher.", other) | under("encoder.", model.state_dict()) | neck}, model


def eva01() -> tuple[object, object]:
    model = model_of(
        "beit_base_patch16_224",
        use_abs_pos_emb=True,
        use_rel_pos_bias=False,
        use_fc_norm=False,
        global_pool="token",
        init_values=0.0,
    )
    return {"module": model.state_dict() | {"mask_token": torch.zeros(1, 1, WIDTH)} | zeros("lm_head.weight")}, model


def mae_ct() -> tuple[object, object]:
    model = model_of(no_embed_class=True)
    return {"state_dict": model.state_dict(), "ctor_kwargs": {"attention_heads": HEADS, "patch_size": 8}}, model


def bird_mae() -> tuple[object, object]:
    model = model_of(in_chans=1, img_size=(64, 32), fc_norm=True, global_pool="avg")
    return model.state_dict() | {"norm.weight": torch.zeros(WIDTH), "norm.bias": torch.zeros(WIDTH)}, model


def bird_mae_refined() -> tuple[object, object]:
    model = model_of(in_chans=1, img_size=(64, 32))
    other = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    heads = zeros("projectors.0.0.weight", "predictors.0.0.weight", "fc_norm.weight", "encoder.head.weight")
    state = under("encoder.", other) | under("encoder_ema.", model.state_dict()) | heads
    return {"state_dict": state, "hyper_parameters": {"img_size_x": 64, "img_size_y": 32, "num_heads": HEADS}}, model


CLIP = (0.48145466, 0.4578275, 0.40821073)
IMAGENET = (0.485, 0.456, 0.406)
HALF = (0.5, 0.5, 0.5)
LAYOUTS: list[tuple[Callable[[], tuple[object, object]], str, str, tuple[float, ...] | None]] = [
    (scale_mae, "scale_mae", "cls", IMAGENET),
    (msm_mae, "mae", "mean", None),
    (msm_mae_with_class_token, "mae", "cls", None),
    (mae_pytorch, "mae_pytorch", "mean", IMAGENET),
    (mae_pytorch_fine_tuned, "mae_pytorch", "mean", IMAGENET),
    (videomae, "videomae", "mean", IMAGENET),
    (multimae, "multimae", "mean", IMAGENET),
    (dinov2, "dinov2", "cls", IMAGENET),
    (dinov2_registers_without_layer_scale, "dinov2", "cls", IMAGENET),
    (dinov2_teacher_in_chunks, "dinov2", "cls", IMAGENET),
    (dinov2_giant, "dinov2", "cls", IMAGENET),
    (mmpretrain, "mmpretrain", "cls", IMAGENET),
    (mmpretrain_fine_tuned, "mmpretrain", "mean", IMAGENET),
    (mmpretrain_beit, "mmpretrain_beit", "mean", HALF),
    (prithvi, "prithvi", "cls", None),
    (vitpose, "vitpose", "mean", IMAGENET),
    (cae, "cae", "mean", IMAGENET),
    (eva01, "eva01", "mean", CLIP),
    (mae_ct, "mae_ct", "cls", IMAGENET),
    (bird_mae, "bird_mae", "mean", None),
    (bird_mae_refined, "bird_mae", "mean", None),
]


@pytest.mark.parametrize(("make", "family", "pooling", "mean"), LAYOUTS, ids=[layout[0].__name__ for layout in LAYOUTS])
def test_layout_gives_the_encoders_tokens(
    tmp_path: Path, make: Callable[[], tuple[object, object]], family: str, pooling: str, mean: tuple[float, ...] | None
) -> None:
    state, model = make()
    torch.save(state, tmp_path / "weights.pth")
    native = Backbone.wrap(model)
    loaded = load_backbone(tmp_path / "weights.pth", num_heads=HEADS, image_size=native.info.image_size)
    assert (loaded.info.family, loaded.info.pooling, loaded.info.coverage) == (family, pooling, 1.0)
    assert mean is None or loaded.info.mean == mean
    images = torch.randn(2, native.info.in_chans, *native.info.image_size)
    assert_same(tokens(loaded, images), tokens(native, images))
    report = inspect_checkpoint(
        f"{tmp_path / 'weights.pth'}::image_size={native.info.image_size[0]}x{native.info.image_size[1]}"
    )
    assert (report.family, report.missing) == (family, ())
    assert all(record.target or record.reason for record in report.tensors)


def test_a_whole_model_below_a_prefix_is_the_same(tmp_path: Path) -> None:
    """What tells a family lies beside the encoder, wherever Lightning puts both: CAE's neck, the norm of a BEiT."""
    state, model = cae()
    assert isinstance(state, dict)
    torch.save({"state_dict": under("model.", state["model"])}, tmp_path / "weights.pth")
    loaded = load_backbone(tmp_path / "weights.pth", num_heads=HEADS)
    assert (loaded.info.family, loaded.info.mean) == ("cae", IMAGENET)
    assert torch.equal(loaded.model.cls_token, model.cls_token)


def tokens(backbone: Backbone, images: Tensor) -> list[Tensor]:
    depth = backbone.info.depth
    with torch.inference_mode():
        blocks = backbone.run_blocks(
            backbone.embed(images), 0, depth, range(depth), grid=backbone.grid_of(tuple(images.shape[-2:]))
        )[1]
    return list(blocks.values())


def assert_same(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_positions_that_are_computed_are_those_of_any_image_size(tmp_path: Path) -> None:
    state, model = mae_pytorch()
    torch.save(state, tmp_path / "weights.pth")
    images = torch.randn(1, 3, *SIZE)
    assert_same(
        tokens(load_backbone(tmp_path / "weights.pth", num_heads=HEADS), images), tokens(Backbone.wrap(model), images)
    )


def test_video_is_the_image_repeated(tmp_path: Path) -> None:
    """A tubelet of unequal weights: the sum over its frames."""
    state, _ = _without_table()
    weight = torch.randn(WIDTH, 3, 3, 8, 8)
    torch.save({"model": state | {"patch_embed.proj.weight": weight} | zeros("head.weight")}, tmp_path / "video.pth")
    loaded = load_backbone(tmp_path / "video.pth", num_heads=HEADS)
    images = torch.randn(1, 3, 8, 8)
    clip = images[:, :, None].expand(-1, -1, 3, -1, -1)
    expected = torch.nn.functional.conv3d(clip, weight, state["patch_embed.proj.bias"], stride=(3, 8, 8))
    torch.testing.assert_close(loaded.model.patch_embed.proj(images), expected[:, :, 0], rtol=0, atol=1e-4)


def _groups(state: State) -> State:
    patches = zeros("patch_embed.0.proj.weight", "patch_embed.1.proj.weight")
    return (
        {n: t for n, t in state.items() if "patch_embed" not in n} | patches | {"channel_embed": torch.zeros(1, 2, 8)}
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_groups, "is a SatMAE with groups of channels"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 17, 20)}, "is a temporal SatMAE"),
        (lambda state: state | {"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 2, 8, 8)}, "is a video encoder"),
        (lambda state: state | {"rope_embed.periods": torch.zeros(4)}, "is a DINOv3"),
        (lambda state: state | {"blocks.0.mlp.experts.0.weight": torch.zeros(4, 4)}, r"is a ViTPose\+"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_refused_by_name(tmp_path: Path, change: Callable[[State], State], reason: str, prefix: str) -> None:
    torch.save({"model": under(prefix, change(model_of().state_dict()))}, tmp_path / "weights.pth")
    for read in (load_backbone, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=reason):
            read(tmp_path / "weights.pth")


def test_beit_that_classifies_by_its_token_pools_by_it(tmp_path: Path) -> None:
    """Fine-tuned with --use_cls: the classifier reads the final norm's class token, and there is no fc_norm."""
    state = model_of("beit_base_patch16_224", use_fc_norm=False, global_pool="token").state_dict()
    for extra, pooling in ((zeros("lm_head.weight"), "mean"), (zeros("head.weight"), "cls")):
        torch.save({"model": state | extra}, tmp_path / "weights.pth")
        assert load_backbone(tmp_path / "weights.pth").info.pooling == pooling


def test_a_narrow_table_of_another_part_is_no_reason(tmp_path: Path) -> None:
    """A decoder's table before the encoder's is not the encoder's."""
    state = {"decoder.pos_embed": torch.zeros(1, 17, 8)} | under("encoder.", model_of().state_dict())
    torch.save({"model": state}, tmp_path / "weights.pth")
    assert load_backbone(tmp_path / "weights.pth", num_heads=HEADS).info.embed_dim == WIDTH


@pytest.mark.parametrize(("make", "width", "heads"), [(dinov2, 384, 6), (mae_pytorch, 384, 6), (vitpose, 384, 12)])
def test_heads_of_the_authors_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[object, object]], width: int, heads: int
) -> None:
    """384 wide is 6 or 12 heads: each family knows its own."""
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", width)
    state, model = make()
    torch.save(state, tmp_path / "weights.pth")
    assert (
        load_backbone(tmp_path / "weights.pth", image_size=Backbone.wrap(model).info.image_size).info.num_heads == heads
    )


def test_spectrograms_of_bird_mae_are_not_square(tmp_path: Path) -> None:
    """256 positions are 16x16 and 32x8."""
    model = model_of(in_chans=1, img_size=(512, 128), patch_size=16, depth=1, fc_norm=True, global_pool="avg")
    state = model.state_dict() | {"norm.weight": torch.zeros(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    torch.save(state, tmp_path / "weights.pth")
    assert load_backbone(tmp_path / "weights.pth", num_heads=HEADS).info.image_size == (512, 128)
    resized = load_backbone(tmp_path / "weights.pth", num_heads=HEADS, image_size=(256, 128))
    assert resized.info.image_size == (256, 128)


def test_tinymim_has_other_heads_in_its_last_block(tmp_path: Path) -> None:
    model = model_of("vit_variant", embed_dim=48, num_heads=6, block_heads=(6, 6, 12))
    args = argparse.Namespace(model="tinymim_vit_tiny_patch16", input_size=32)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "weights.pth")
    loaded = load_backbone(tmp_path / "weights.pth")
    assert loaded.info.family == "tinymim"
    images = torch.randn(1, 3, *SIZE)
    assert_same(tokens(loaded, images), tokens(Backbone.wrap(model), images))


def test_further_global_tokens_of_multimae_are_registers(tmp_path: Path) -> None:
    state, _ = multimae()
    tokens = torch.randn(1, 3, WIDTH)
    state["model"]["global_tokens"] = tokens  # type: ignore[index]
    torch.save(state, tmp_path / "tokens.pth")
    backbone = load_backbone(tmp_path / "tokens.pth", num_heads=HEADS)
    assert backbone.info.num_prefix_tokens == 3
    held = backbone.model.state_dict()
    assert torch.equal(torch.cat([held["cls_token"], held["reg_token"]], 1), tokens)
