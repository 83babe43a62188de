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
    "dinov2": "Apache-2.0",
    "eva01": "MIT",
    "mmpretrain": "Apache-2.0",
    "mmpretrain_beit": "Apache-2.0",
    "multimae": "CC-BY-NC-4.0",
    "prithvi": "Apache-2.0",
    "scale_mae": "CC-BY-NC-4.0",
    "videomae": "CC-BY-NC-4.0",
    "vitpose": "Apache-2.0",
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
    (``page``). ``size``: as the publisher states it, "" = unknown. ``sha256`` is whole or "", ``hash_start`` the first
    digits of a hash as the publisher gives them ("md5:8cad7c"; OpenMMLab and torch's hub put SHA-256's in names).
    """

    name: str
    family: str
    architecture: str
    image_size: int | str  # "512x128" where it is no square
    data: str
    licence: str
    address: str
    page: str
    size: str = ""
    sha256: str = ""
    hash_start: str = ""

    @property
    def file_name(self) -> str:
        """Name of the file in the cache: that of the address."""
        return self.address.rpartition("/")[2]


_FB = "https://dl.fbaipublicfiles.com"
_LF3 = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource"
_JKU = "https://ml.jku.at/research/mimrefiner/download"
_CROSSMAE = "https://huggingface.co/longlian/CrossMAE/resolve/main"
_GITHUB, _RELEASES = "https://github.com", "releases/download"
_IN1K, _IN22K = "ImageNet-1K", "ImageNet-22K"


def _crossmae(folder: str, size: str, end: str = "kmr0.75-dd12-ep800-ui.pth") -> str:
    return f"{_CROSSMAE}/{folder}/imagenet-mae-cross-{size}-pretrain-wfm-mr0.75-{end}"


def _entry(
    family: str, name: str, architecture: str, address: str, page: str, *, image_size: int | str = 224,
    data: str = _IN1K, licence: str | None = None, **known: str,
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
        _entry("mae", "mae_b16", "ViT-B/16", f"{pretrain}_base.pth", page, hash_start="md5:8cad7c"),
        _entry("mae", "mae_l16", "ViT-L/16", f"{pretrain}_large.pth", page, hash_start="md5:b8b06e"),
        _entry("mae", "mae_h14", "ViT-H/14", f"{pretrain}_huge.pth", page, hash_start="md5:9bdbb0"),
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


def _domains() -> list[Entry]:
    """Encoders of satellite images, retinas, spectrograms and videos."""
    hub, nasa, zenodo = (
        "https://huggingface.co",
        "https://huggingface.co/ibm-nasa-geospatial",
        "https://zenodo.org/record",
    )
    scale, satmae = f"{_GITHUB}/bair-climate-initiative/scale-mae", f"{_GITHUB}/sustainlab-group/SatMAE"
    hls, fmow, ssl4eo = "HLS (6 bands, 16 bit)", "fMoW", "SSL4EO-S12 (Sentinel-2, 13 bands)"
    prithvi1, prithvi2 = f"{nasa}/Prithvi-100M", f"{nasa}/Prithvi-EO-2.0"
    retfound = f"{_GITHUB}/rmaphoh/RETFound_MAE"
    bird, spectrograms = f"{_GITHUB}/DBD-research-group/Bird-MAE", "AudioSet (spectrograms)"
    return [
        _entry("scale_mae", "scale_mae_l16", "ViT-L/16", f"{scale}/{_RELEASES}/base-800/scalemae-vitlarge-800.pth",
               scale, data=fmow),
        _entry("mae", "satmae_l16", "ViT-L/16", f"{zenodo}/7369797/files/fmow_pretrain.pth", satmae, data=fmow),
        _entry("mae", "ssl4eo_mae_s16", "ViT-S/16", "", f"{_GITHUB}/zhu-xlab/SSL4EO-S12", data=ssl4eo,
               licence="Apache-2.0"),
        _entry("prithvi", "prithvi_eo1_b16", "ViT-B/16", f"{prithvi1}/resolve/main/Prithvi_100M.pt", prithvi1,
               data=hls),
        _entry("prithvi", "prithvi_eo2_l16", "ViT-L/16", f"{prithvi2}-300M/resolve/main/Prithvi_EO_V2_300M.pt",
               f"{prithvi2}-300M", data=hls),
        _entry("prithvi", "prithvi_eo2_h14", "ViT-H/14", f"{prithvi2}-600M/resolve/main/Prithvi_EO_V2_600M.pt",
               f"{prithvi2}-600M", data=hls),
        *(_entry("mae", f"retfound_{kind.lower()}_l16", "ViT-L/16", "", f"{hub}/YukunZhou/RETFound_mae_nature{kind}",
                 data=f"retinas ({kind})") for kind in ("CFP", "OCT")),
        _entry("dinov2", "retfound_dinov2_l14", "ViT-L/14", "", retfound, data="retinas", licence="CC-BY-NC-4.0"),
        *(_entry("bird_mae", f"bird_mae_{word[0].lower()}16", f"ViT-{word[0]}/16",
                 f"hf-hub:DBD-research-group/Bird-MAE-{word}", bird, image_size="512x128", data="BirdSet")
          for word in ("Base", "Large", "Huge")),
        _entry("mae", "audiomae_b16", "ViT-B/16", "", f"{_GITHUB}/facebookresearch/AudioMAE", image_size="1024x128",
               data=spectrograms),
        _entry("mae", "msm_mae_b16", "ViT-B/16", "", f"{_GITHUB}/nttcslab/msm-mae", image_size="80x208",
               data=spectrograms, licence="NTT's software evaluation licence"),
        _entry("videomae", "videomae_b16", "ViT-B/16", "", f"{_GITHUB}/MCG-NJU/VideoMAE", data="Kinetics-400"),
    ]  # fmt: skip


def _further() -> list[Entry]:
    """Other code bases for photographs, and what came after MAE and BEiT."""
    dinov2, dinov2_files = f"{_GITHUB}/facebookresearch/dinov2", f"{_FB}/dinov2"
    mm, mm_files = f"{_GITHUB}/open-mmlab/mmpretrain", "https://download.openmmlab.com/mmselfsup/1.x"
    multimae = f"{_GITHUB}/EPFL-VILAB/MultiMAE"
    mae_ct, mae_ct_files = f"{_GITHUB}/ml-jku/MAE-CT", "https://ml.jku.at/research/maect/download"
    run = "16_8xb512-fp16-coslr-1600e"
    mm_mae = {"b": ("base", "f7569ca2"), "l": ("large", "cc7e98c9")}
    mm_beit = {
        "beit": "8xb256-amp-coslr-300e_in1k_20221128-ab79e626",
        "beitv2": "8xb256-amp-coslr-300e_in1k_20221212-a157be30",
    }
    pages = (
        ("mae_pytorch", "mae_pytorch_b16", "ViT-B/16", "pengzhiliang/MAE-pytorch", None),
        ("mae", "mae_lite_t16", "ViT-T/16, 12 heads", "wangsr126/mae-lite", "Apache-2.0"),
        ("tinymim", "tinymim_t16", "ViT-T/16", "OliverRensu/TinyMIM", None),
        ("cae", "cae_b16", "ViT-B/16", "lxtGH/CAE", None),
        ("vitpose", "vitpose_b16", "ViT-B/16", "ViTAE-Transformer/ViTPose", None),
    )
    return [
        *(_entry("dinov2", f"dinov2_{size}14{reg}", f"ViT-{size.upper() if size != 'g' else 'g'}/14",
                 f"{dinov2_files}/dinov2_vit{size}14/dinov2_vit{size}14{reg and '_reg4'}_pretrain.pth", dinov2,
                 image_size=518, data="LVD-142M") for size in "sblg" for reg in ("", "_reg")),
        _entry("eva01", "eva01_g14", "ViT-g/14", "https://huggingface.co/BAAI/EVA/resolve/main/eva_psz14.pt",
               f"{_GITHUB}/baaivision/EVA/tree/master/EVA-01", data="merged 30M images", size="2GB"),
        *(_entry("mmpretrain", f"mm_mae_{short}16", f"ViT-{short.upper()}/16",
                 f"{mm_files}/mae/mae_vit-{word}-p{run}_in1k/mae_vit-{word}-p{run}_in1k_20220825-{digits}.pth", mm,
                 hash_start=f"sha256:{digits}") for short, (word, digits) in mm_mae.items()),
        *(_entry("mmpretrain_beit", f"mm_{kind}_b16", "ViT-B/16", f"{mm_files}/{kind}/{kind}_vit-base-p16_"
                 f"{end.split('_')[0]}_in1k/{kind}_vit-base-p16_{end}.pth", mm, hash_start=f"sha256:{end[-8:]}")
          for kind, end in mm_beit.items()),
        _entry("multimae", "multimae_b16", "ViT-B/16", f"{multimae}/{_RELEASES}/pretrained-weights/"
               "multimae-b_98_rgb+-depth-semseg_1600e_multivit-afff3f8c.pth", multimae, hash_start="sha256:afff3f8c"),
        *(_entry("mae_ct", f"{kind}_{size}", f"ViT-{size[0].upper()}/{size[1:]}", f"{mae_ct_files}/{file}_{word}.th",
                 mae_ct)
          for kind, file in (("mae_ct", "maect"), ("mae_ct_aug", "maectaug"))
          for size, word in (("b16", "base16"), ("l16", "large16"), ("h14", "huge14"))),
        *(_entry(family, name, size, "", f"{_GITHUB}/{repository}", licence=licence)
          for family, name, size, repository, licence in pages),
    ]  # fmt: skip


_PARTS = (_mae, _latent_targets, _tokens_and_pixels, _further, _domains, _refined)
CATALOGUE: dict[str, Entry] = {entry.name: entry for part in _PARTS for entry in part()}


def record(entry: Entry) -> dict[str, Any]:
    """The entry as a flat mapping; what nobody states is "unknown"."""
    facts = asdict(entry)
    for key in ("size", "sha256"):
        facts[key] = facts[key] or "unknown"
    algorithm, _, digits = facts.pop("hash_start").partition(":")
    if digits:
        facts[f"{algorithm} starts with"] = f"{digits} (only these digits are published)"
    facts["address"] = entry.address or f"none for programs; see {entry.page}"
    return facts
