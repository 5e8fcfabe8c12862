"""A DINOv2 of two blocks that answers to the real names, and its weights under the official names."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import cast

import pytest
import torch
from torch import Tensor

from proteus_cache.teachers.dinov2_models import DINOV2, NATIVE_GRID, PATCH_PX, Dinov2Architecture

WIDTH = 24


@pytest.fixture
def tiny_dinov2(monkeypatch: pytest.MonkeyPatch) -> Dinov2Architecture:
    """Make `dinov2_vits14` and `dinov2_vits14_reg` two blocks wide 24; returns the one without registers."""
    tiny = Dinov2Architecture(width=WIDTH, depth=2, n_heads=2)
    models = cast(MutableMapping[str, Dinov2Architecture], DINOV2)
    monkeypatch.setitem(models, "dinov2_vits14", tiny)
    with_registers = Dinov2Architecture(width=WIDTH, depth=2, n_heads=2, n_register_tokens=4)
    monkeypatch.setitem(models, "dinov2_vits14_reg", with_registers)
    return tiny


@pytest.fixture
def official_state() -> dict[str, Tensor]:
    """Weights of the tiny model without registers as Meta's files name them, positions 37 x 37."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    block_shapes = {
        **{f"{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        **{"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)},
        **{"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,)},
        **{"attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,)},
        **{"mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,)},
        **{"mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,)},
    }
    return {
        "cls_token": draw(1, 1, WIDTH),
        "mask_token": draw(1, WIDTH),
        "pos_embed": draw(1, 1 + NATIVE_GRID**2, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH_PX, PATCH_PX),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": draw(WIDTH) + 1,
        "norm.bias": draw(WIDTH),
        **{f"blocks.{block}.{name}": draw(*shape) for block in (0, 1) for name, shape in block_shapes.items()},
    }


@pytest.fixture
def views() -> Tensor:
    """(2, 28, 28, 3) uint8: two by two patches of 14 px."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8, generator=generator)
