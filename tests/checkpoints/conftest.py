"""A tiny ViT state dict that tests save, damage and load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mim_refiner.models.backbone import create_vit


@pytest.fixture
def vit_state() -> dict[str, Tensor]:
    """State dict of a randomised ViT: width 32, 2 blocks, 4 heads, patch 8, 32 px, class token."""
    model = create_vit("vit_w32_d2_h4_p8", 32)
    generator = torch.Generator().manual_seed(2)
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
