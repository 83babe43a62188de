"""Published masked-image-model encoders by name: where they are, what they are, and under which licence.

Facts come from the authors' repositories and model pages (``page``). What is not stated there is left empty: a size
or hash is given only where the publisher gives one. Weights trained by others carry their own licence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

UNKNOWN_LICENCE = "unknown"

# Licence of the weights that the family's authors published (not of our code, nor of weights that others trained).
FAMILY_LICENCES = {
    "mae": "CC-BY-NC-4.0",
    "crossmae": "CC-BY-NC-4.0",
    "ijepa": "CC-BY-NC-4.0",
    "data2vec2": "CC-BY-NC",  # fairseq's page of data2vec 2.0 names no version
    "dbot": "Apache-2.0",
    "ibot": "Apache-2.0",
    "capi": "Apache-2.0",
    "beit": "MIT",
    "beit2": "MIT",
}
# Other spellings of a family, as checkpoints and Hugging Face configs have them.
_ALIASES = {
    "vit_mae": "mae", "hf_vitmae": "mae", "beitv2": "beit2", "beit_v2": "beit2", "d2v2": "data2vec2",
    "data2vec_2": "data2vec2", "i_jepa": "ijepa", "hf_ijepa": "ijepa", "hf_beit": "beit",
}  # fmt: skip


def family_licence(family: str) -> str:
    """Licence of the family's published weights, "unknown" where a file alone does not tell."""
    key = family.lower().replace("-", "_").replace(" ", "_").replace(".0", "")
    return FAMILY_LICENCES.get(_ALIASES.get(key, key), UNKNOWN_LICENCE)


@dataclass(frozen=True)
class Entry:
    """One published encoder.

    ``address``: a file to download, or "hf-hub:owner/name". Empty where the authors offer only a page for browsers
    (``page``). ``size``: as the publisher states it, "" = unknown. ``sha256`` is whole or "", ``md5_start`` the first
    digits of the MD5 sum, as MAE's authors give them.
    """

    name: str
    family: str
    architecture: str
    image_size: int
    data: str
    licence: str
    address: str
    page: str
    size: str = ""
    sha256: str = ""
    md5_start: str = ""

    @property
    def file_name(self) -> str:
        """Name of the file in the cache: that of the address."""
        return self.address.rpartition("/")[2]


_FB = "https://dl.fbaipublicfiles.com"
_LF3 = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource"
_JKU = "https://ml.jku.at/research/mimrefiner/download"
_CROSSMAE = "https://huggingface.co/longlian/CrossMAE/resolve/main"
_GITHUB = "https://github.com"
_IN1K, _IN22K = "ImageNet-1K", "ImageNet-22K"


def _crossmae(folder: str, size: str, end: str = "kmr0.75-dd12-ep800-ui.pth") -> str:
    return f"{_CROSSMAE}/{folder}/imagenet-mae-cross-{size}-pretrain-wfm-mr0.75-{end}"


def _entry(
    family: str, name: str, architecture: str, address: str, page: str, *, image_size: int = 224, data: str = _IN1K,
    licence: str | None = None, **known: str,
) -> Entry:  # fmt: skip
    licence = licence or family_licence(family)
    return Entry(name, family, architecture, image_size, data, licence, address, page, **known)


def _mae() -> list[Entry]:
    page = f"{_GITHUB}/facebookresearch/mae"
    maws = f"{_GITHUB}/facebookresearch/maws"
    cross = f"{_GITHUB}/TonyLianLong/CrossMAE"
    pretrain = f"{_FB}/mae/pretrain/mae_pretrain_vit"
    sha_b = "a9a84dd671b819ba6feeb10d888dc1f9d043c073715a6331d7bfdf6e8f7e3a99"
    sha_l = "7465615f2af93066ff1a00843be199dde5836c88676315690be93d8290905780"
    return [
        _entry("mae", "mae_b16", "ViT-B/16", f"{pretrain}_base.pth", page, md5_start="8cad7c"),
        _entry("mae", "mae_l16", "ViT-L/16", f"{pretrain}_large.pth", page, md5_start="b8b06e"),
        _entry("mae", "mae_h14", "ViT-H/14", f"{pretrain}_huge.pth", page, md5_start="9bdbb0"),
        _entry("mae", "mae_2b14", "ViT-2B/14", f"{_FB}/maws/pretrain/mae_in1k/vit_2b14.pt", maws),
        _entry("mae", "mae_b16_hf", "ViT-B/16", "hf-hub:facebook/vit-mae-base", page),
        _entry("mae", "mae_l16_hf", "ViT-L/16", "hf-hub:facebook/vit-mae-large", page, size="1.32 GB"),
        _entry("mae", "mae_h14_hf", "ViT-H/14", "hf-hub:facebook/vit-mae-huge", page, size="2.63 GB"),
        _entry("crossmae", "crossmae_s16", "ViT-S/16", _crossmae("vits-mr0.75-kmr0.75-dd12", "vits"), cross),
        _entry(
            "crossmae", "crossmae_b16", "ViT-B/16", _crossmae("vitb-mr0.75-kmr0.75-dd12", "vitb"), cross,
            size="1.53 GB", sha256=sha_b,
        ),
        _entry(
            "crossmae", "crossmae_b16_448", "ViT-B/16",
            _crossmae("vitb-mr0.75-kmr0.75-dd12-448-400", "vitb", "kmr0.25-dd12-ep400-ui-res-448.pth"), cross,
            image_size=448,
        ),
        _entry(
            "crossmae", "crossmae_l16", "ViT-L/16", _crossmae("vitl-mr0.75-kmr0.75-dd12", "vitl"), cross,
            size="4.17 GB", sha256=sha_l,
        ),
    ]  # fmt: skip


def _latent_targets() -> list[Entry]:
    d2v2 = f"{_GITHUB}/facebookresearch/fairseq/tree/main/examples/data2vec"
    dbot, jepa = f"{_GITHUB}/liuxingbin/dbot", f"{_GITHUB}/facebookresearch/ijepa"
    ibot, capi = f"{_GITHUB}/bytedance/ibot", f"{_GITHUB}/facebookresearch/capi"
    data2vec2, dbot_files, ibot_files = f"{_FB}/fairseq/data2vec2", f"{_LF3}/mmodal/dbot", f"{_LF3}/archive/2022/ibot"
    return [
        _entry("data2vec2", "data2vec2_b16", "ViT-B/16", f"{data2vec2}/base_imagenet.pt", d2v2),
        _entry("data2vec2", "data2vec2_l16", "ViT-L/16", f"{data2vec2}/large_imagenet.pt", d2v2),
        _entry("data2vec2", "data2vec2_h14", "ViT-H/14", f"{data2vec2}/huge_imagenet.pt", d2v2),
        _entry("dbot", "dbot_b16", "ViT-B/16", f"{dbot_files}/84.5_dbot_base_pre.pth", dbot),
        _entry("dbot", "dbot_l16", "ViT-L/16", f"{dbot_files}/86.6_dbot_large_pre.pth", dbot),
        _entry("dbot", "dbot_h14", "ViT-H/14", f"{dbot_files}/87.4_dbot_huge_pre.pth", dbot),
        _entry("ijepa", "ijepa_h14", "ViT-H/14", f"{_FB}/ijepa/IN1K-vit.h.14-300e.pth.tar", jepa),
        _entry(
            "ijepa", "ijepa_h16_448", "ViT-H/16", f"{_FB}/ijepa/IN1K-vit.h.16-448px-300e.pth.tar", jepa, image_size=448
        ),
        _entry("ijepa", "ijepa_h14_in22k", "ViT-H/14", f"{_FB}/ijepa/IN22K-vit.h.14-900e.pth.tar", jepa, data=_IN22K),
        _entry("ijepa", "ijepa_g16_in22k", "ViT-g/16", f"{_FB}/ijepa/IN22K-vit.g.16-600e.pth.tar", jepa, data=_IN22K),
        _entry("ibot", "ibot_s16", "ViT-S/16", f"{ibot_files}/vits_16/checkpoint_teacher.pth", ibot),
        _entry("ibot", "ibot_b16", "ViT-B/16", f"{ibot_files}/vitb_16/checkpoint_teacher.pth", ibot),
        _entry("ibot", "ibot_l16", "ViT-L/16", f"{ibot_files}/vitl_16_rand_mask/checkpoint_teacher.pth", ibot),
        _entry("capi", "capi_l14", "ViT-L/14", f"{_FB}/capi/capi_vitl14_in1k.pth", capi),
        _entry("capi", "capi_l14_in22k", "ViT-L/14", f"{_FB}/capi/capi_vitl14_i22k.pth", capi, data=_IN22K),
        _entry("capi", "capi_l14_places", "ViT-L/14", f"{_FB}/capi/capi_vitl14_p205.pth", capi, data="Places205"),
        _entry("capi", "capi_l14_lvd", "ViT-L/14", f"{_FB}/capi/capi_vitl14_lvd.pth", capi, data="LVD-142M"),
    ]


def _tokens_and_pixels() -> list[Entry]:
    unilm, simmim = f"{_GITHUB}/microsoft/unilm/tree/master", f"{_GITHUB}/microsoft/SimMIM"
    blob = "https://unilm.blob.core.windows.net/beit"
    hub = "https://conversationhub.blob.core.windows.net/beit-share-public/beitv2"
    return [
        _entry("beit", "beit_b16", "ViT-B/16", f"{blob}/beit_base_patch16_224_pt22k.pth", f"{unilm}/beit", data=_IN22K),
        _entry(
            "beit", "beit_l16", "ViT-L/16", f"{blob}/beit_large_patch16_224_pt22k.pth", f"{unilm}/beit", data=_IN22K
        ),
        _entry("beit2", "beit2_b16", "ViT-B/16", f"{hub}/beitv2_base_patch16_224_pt1k.pth", f"{unilm}/beit2"),
        _entry("beit2", "beit2_l16", "ViT-L/16", f"{hub}/beitv2_large_patch16_224_pt1k.pth", f"{unilm}/beit2"),
        _entry("simmim", "simmim_b16", "ViT-B/16", "", simmim),
    ]


def _refined() -> list[Entry]:
    page = f"{_GITHUB}/ml-jku/MIM-Refiner"
    sizes = {"l16": "ViT-L/16", "h14": "ViT-H/14", "twob14": "ViT-2B/14"}
    made = [
        ("mae", "l16"), ("mae", "h14"), ("mae", "twob14"), ("d2v2", "l16"), ("d2v2", "h14"), ("dbot", "l16"),
        ("dbot", "h14"), ("crossmae", "l16"),
    ]  # fmt: skip
    return [
        _entry(
            "mim_refiner", f"{base}_refined_{size}", sizes[size], f"{_JKU}/{base}refined_{size}.th", page,
            licence=f"{family_licence(base)} (inherited from the base weights)",
        )
        for base, size in made
    ]  # fmt: skip


CATALOGUE: dict[str, Entry] = {
    entry.name: entry for part in (_mae, _latent_targets, _tokens_and_pixels, _refined) for entry in part()
}


def record(entry: Entry) -> dict[str, Any]:
    """The entry as a flat mapping; what nobody states is "unknown"."""
    facts = asdict(entry)
    for key in ("size", "sha256"):
        facts[key] = facts[key] or "unknown"
    if entry.md5_start:
        facts["md5"] = f"{entry.md5_start}... (only these digits are published)"
    del facts["md5_start"]
    facts["address"] = entry.address or f"none for programs; see {entry.page}"
    return facts
