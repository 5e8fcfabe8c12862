"""The four student sizes of Proteus and a tiny one for first runs, built as plain timm VisionTransformers.

A student takes picture size, patch size and pixel statistics from the pack, so its token grid is the
teacher's. Initialisation is the released one (timm's default for this class): truncated normal 0.02 for
matrices and the position embedding, CLS normal 1e-6, zero biases, LayerScale 1.0, no drop path. A seed fixes
every value. torch is imported only when a student is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSize:
    """The widths of one student and the batch it was published with."""

    width: int
    depth: int
    heads: int
    batch_size: int = 1024
    """Global batch of the published run."""


STUDENTS: Mapping[str, StudentSize] = {
    "vit_demo": StudentSize(width=96, depth=4, heads=3, batch_size=128),
    "vit_ti14": StudentSize(width=192, depth=12, heads=3),
    "vit_s14": StudentSize(width=384, depth=12, heads=6),
    "vit_b14": StudentSize(width=768, depth=12, heads=12),
    "vit_l14": StudentSize(width=1024, depth=24, heads=16, batch_size=256),
}


def student_size(name: str) -> StudentSize:
    """The size called `name`.

    Raises:
        UsageError: no student has that name.
    """
    if name in STUDENTS:
        return STUDENTS[name]
    raise UsageError(unknown("student", name, STUDENTS))


def student_architecture(name: str, *, size_px: int, patch_px: int) -> dict[str, object]:
    """timm VisionTransformer arguments of a student, JSON-able.

    Args:
        name: one of `STUDENTS`.
        size_px: side of the square picture.
        patch_px: side of a patch; divides `size_px`.

    Raises:
        UsageError: unknown name.
        ConfigError: the patches do not tile the picture.

    Source: BeSpontaneous/Proteus-pytorch models_proteus_dinov2 (DINOv2's ViT class, LayerScale 1.0, no
        registers).
    """
    size = student_size(name)
    if patch_px < 1 or size_px < patch_px or size_px % patch_px:
        raise ConfigError(f"student {name}: patches of {patch_px} px do not tile a picture of {size_px} px")
    return {
        "img_size": size_px,
        "patch_size": patch_px,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "num_classes": 0,
        "init_values": 1.0,
        "global_pool": "token",
    }


def build_student(
    name: str, *, size_px: int, patch_px: int, mean: Sequence[float], std: Sequence[float], seed: int
) -> VisionTransformer:
    """A freshly initialised student on the CPU, in float32.

    Args:
        name: one of `STUDENTS`.
        size_px: side of the square picture.
        patch_px: side of a patch.
        mean: three pixel means, for the model's own data config.
        std: three pixel standard deviations.
        seed: fixes every initial value; the global random state is left as it was.
    """
    import torch
    from timm.models.vision_transformer import VisionTransformer

    architecture = student_architecture(name, size_px=size_px, patch_px=patch_px)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = VisionTransformer(**architecture)  # type: ignore[arg-type]  # one dict of checked arguments
    data_config = {
        "input_size": (3, size_px, size_px),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    student.default_cfg = data_config  # type: ignore[assignment]  # plain attributes of every timm model
    student.pretrained_cfg = data_config  # type: ignore[assignment]  # likewise
    return student


def student_metadata(
    name: str, *, size_px: int, patch_px: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, str]:
    """safetensors metadata that let a weights file be read as the teacher `vit`, or by any timm user.

    Returns:
        `timm_vision_transformer` (JSON of the arguments), `pixel_mean` and `pixel_std` (JSON lists of three).
    """
    architecture = student_architecture(name, size_px=size_px, patch_px=patch_px)
    return {
        "timm_vision_transformer": json.dumps(architecture),
        "pixel_mean": json.dumps([float(value) for value in mean]),
        "pixel_std": json.dumps([float(value) for value in std]),
    }
