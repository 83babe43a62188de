"""A refined encoder as a LoRA adapter: a few percent of its size, in PEFT's layout, with the hash of its base."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from mim_refiner.core.identity import tensors_sha256
from mim_refiner.files import write_bytes, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.lora import adapted


def write_adapter(backbone: Backbone, folder: Path, base: str) -> Path:
    """Write adapter_config.json and adapter_model.safetensors of the adapters in ``backbone``.

    ``base`` is the source of the weights that they were made for; ``base_sha256`` is of those that are adapted, and
    :func:`~mim_refiner.load_backbone` refuses others.
    """
    layers = adapted(backbone)
    change = next(iter(layers.values()))[0]  # all have one rank and scale
    rank = change.a.shape[0]
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": part.detach().cpu().contiguous()
        for name, parts in layers.items()
        for letter, part in (("A", parts[0].a), ("B", parts[0].b))
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).exists() else base,
        "base_sha256": tensors_sha256({name: parts.original.detach().cpu().float() for name, parts in layers.items()}),
        "r": rank,
        "lora_alpha": change.scale * rank,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_bytes(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    return write_json(folder / "adapter_config.json", config)
