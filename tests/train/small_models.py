"""Small distillation modules on made-up batches, and how gradients are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.masking import draw_masks
from proteus_cache.train.model import build_distillation

SIZE_PX, PATCH_PX, WIDTH, DEPTH, TEACHER_WIDTH = 12, 4, 24, 3, 20
N_PATCHES = (SIZE_PX // PATCH_PX) ** 2
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
HEADS = ("token", "feature", "patch")
BLOCKS = {"block.1": 0, "block.3": 2, "block.1.raw": 0}


def model_config(**settings: object) -> TrainConfig:
    """A run of which only what the model needs matters."""
    return config_from_mapping({"student": "vit_s14", "data": "pack", "out": "run"} | settings)


def small_student(seed: int = 0) -> VisionTransformer:
    """No part of it is zero or the same everywhere."""
    torch.manual_seed(seed)
    student = VisionTransformer(
        img_size=SIZE_PX,
        patch_size=PATCH_PX,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=3,
        num_classes=0,
        init_values=1.0,
        global_pool="token",
    )
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return student


def small_model(dtype: torch.dtype = torch.float32, blocks: Mapping[str, int] | None = None, **settings: object) -> Any:
    """A `Distillation`; as Any, since mypy takes a Module's attributes for tensors or modules."""
    config = model_config(**settings)
    bare = build_distillation(
        config, small_student(), teacher_width=TEACHER_WIDTH, mean=MEAN, std=STD, blocks=blocks or {}
    )
    torch.manual_seed(1)
    for parameter in bare.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return bare.to(dtype)


def made_up_batch(
    n_images: int, dtype: torch.dtype, step: int = 3
) -> tuple[Tensor, dict[str, Tensor], NDArray[np.int64]]:
    """Views, all targets, and masks of every second view."""
    torch.manual_seed(step)
    views = torch.randint(0, 256, (n_images, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)
    targets = {
        "cls": torch.randn(n_images, TEACHER_WIDTH, dtype=dtype),
        "patch": torch.randn(n_images, N_PATCHES, TEACHER_WIDTH, dtype=dtype),
        **{name: torch.randn(n_images, 1 + N_PATCHES, TEACHER_WIDTH, dtype=dtype) for name in BLOCKS},
    }
    masks = draw_masks(0, step, np.arange(n_images), n_patches=N_PATCHES, n_masked=N_PATCHES // 2)
    return views, targets, masks


def gradients(bare: nn.Module) -> dict[str, Tensor]:
    """Of all parameters by name, which are then cleared."""
    found = {}
    for name, parameter in bare.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    bare.zero_grad()
    return found


def check_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Gradients agree within 1e-12 (double) or 1e-5 (single) of the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        tolerance = largest * (1e-12 if dtype == torch.float64 else 1e-5)
        off = (found[name] - gradient).abs().max().item()
        assert off <= tolerance, f"{name}: off by {off:.3g}"
