"""What a teacher is made of, without its weights: enough to say what its targets weigh and what a view costs.

Models are built on torch's meta device: names and shapes, no memory, no download.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from proteus_cache.teachers.backbone import TokenModel, build_vision_transformer, check_size, check_tokens
from proteus_cache.teachers.dinov2_models import DEFAULT_SIZE_PX, DINOV2, PATCH_PX
from proteus_cache.teachers.identity import IMAGENET_MEAN, IMAGENET_STD, Statistics
from proteus_cache.teachers.registry import check_teacher_name
from proteus_cache.teachers.teacher import target_shape
from proteus_cache.teachers.timm_model import outline_timm
from proteus_cache.teachers.vit_file import described_file


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOutline:
    """A teacher's sizes; those of its identity that do not depend on weights, and its matrices."""

    name: str
    size_px: int
    """Side of the square view."""
    patch_px: int
    width: int
    depth: int
    n_prefix_tokens: int
    """CLS and registers."""
    block_weights: int
    """Entries of the matrices of one block, on average."""
    mean: Statistics
    std: Statistics

    @property
    def n_patches(self) -> int:
        """Patch tokens of one view."""
        return (self.size_px // self.patch_px) ** 2

    def target_shape(self, name: str) -> tuple[int, ...]:
        """As `Teacher.target_shape`."""
        return target_shape(name, teacher=self.name, n_patches=self.n_patches, width=self.width, depth=self.depth)


def outline_teacher(name: str, *, weights: str | None, size_px: int | None) -> TeacherOutline:
    """The outline of a teacher; arguments as for `registry.load_teacher`, weights are not loaded.

    Raises:
        UsageError: unknown name, a size that patches do not tile, or a model without CLS and patch tokens.
        WeightsError: `vit` whose file is missing or does not describe a model.
    """
    check_teacher_name(name)
    if name in DINOV2:
        side_px = DEFAULT_SIZE_PX if size_px is None else size_px
        check_size(side_px, PATCH_PX, name)
        model: TokenModel = build_vision_transformer(DINOV2[name].timm_arguments(side_px), (side_px, side_px))
        return _outline(name, model, side_px, IMAGENET_MEAN, IMAGENET_STD)
    if name.startswith("timm:"):
        model, side_px, mean, std = outline_timm(name.removeprefix("timm:"), size_px)
        return _outline(name, model, side_px, mean, std)
    vit = described_file(name, weights)
    side_px = vit.size_px if size_px is None else size_px
    check_size(side_px, vit.patch_px, name)
    model = build_vision_transformer({**vit.arguments, "num_classes": 0}, (side_px, side_px))
    check_tokens(model, f"teacher {name}")
    return _outline(name, model, side_px, vit.mean, vit.std)


def _outline(name: str, model: TokenModel, size_px: int, mean: Statistics, std: Statistics) -> TeacherOutline:
    matrices = [module.weight.numel() for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    return TeacherOutline(
        name=name,
        size_px=size_px,
        patch_px=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        n_prefix_tokens=model.num_prefix_tokens,
        block_weights=round(sum(matrices) / len(model.blocks)),
        mean=mean,
        std=std,
    )
