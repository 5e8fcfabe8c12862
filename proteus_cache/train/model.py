"""What one step computes: student, mask token and heads on a batch, to the three losses.

One module with one forward pass, so that data-parallel training sees every parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.losses import feature_loss, patch_loss, token_loss
from proteus_cache.students.heads import Heads, build_heads
from proteus_cache.students.vit import clean_and_masked_tokens
from proteus_cache.train.config import TrainConfig


class Distillation(nn.Module):
    """A student with what training adds to it; the losses come out of `forward`.

    Args:
        student: in float32, without dropout or drop path.
        heads: those that the weights need.
        mask_token: (1, D), or None when no image is masked.
        weights: of the token, feature and patch loss.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        student: VisionTransformer,
        heads: Heads,
        mask_token: nn.Parameter | None,
        *,
        weights: tuple[float, float, float],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.student = student
        self.heads = heads
        self.mask_token = mask_token
        self.weights = weights
        self.register_buffer("pixel_mean", 255 * torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(
        self,
        views: Tensor,
        targets: Mapping[str, Tensor],
        masked_MK: Tensor,
        first_odd: int,
        counts: tuple[float, float],
    ) -> Tensor:
        """The losses of a part of a batch.

        Args:
            views: (b, H, W, 3) uint8.
            targets: `cls` (b, D) and `patch` (b, N, D) float32, those that the losses need.
            masked_MK: (M, K) int64 masked patches of every second view.
            first_odd: 0 or 1, the first masked view.
            counts: views and masked views that the means run over.

        Returns:
            (4,) float32: weighted sum, token, feature and patch loss; NaN stands for a loss of weight 0.
        """
        pixels = (views.permute(0, 3, 1, 2).float() - self.pixel_mean) / self.pixel_std
        token, feature, patch = self._losses(pixels, targets, masked_MK, slice(first_odd, None, 2), counts)
        parts = [
            torch.full_like(pixels[0, 0, 0, 0], torch.nan) if part is None else part for part in (token, feature, patch)
        ]
        weighted = [weight * part for weight, part in zip(self.weights, parts, strict=True) if weight > 0]
        return torch.stack([torch.stack(weighted).sum(), *parts])

    def _losses(
        self,
        pixels: Tensor,
        targets: Mapping[str, Tensor],
        masked_MK: Tensor,
        masked_rows: slice,
        counts: tuple[float, float],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        n_images, n_masked = counts
        token = feature = patch = None
        if self.mask_token is not None:
            clean, masked = clean_and_masked_tokens(self.student, pixels, masked_rows, masked_MK, self.mask_token)
            predicted = self.heads["patch"](_take(masked[:, 1:], masked_MK))
            patch = patch_loss(predicted, _take(targets["patch"][masked_rows], masked_MK), n_images=n_masked)
        else:
            clean = self.student.forward_features(pixels)
        if "token" in self.heads:
            cls = self.heads["token"](clean[:, 0])
            token = token_loss(cls, targets["cls"], n_images=n_images) if self.weights[0] > 0 else None
        if "feature" in self.heads:
            patches = self.heads["feature"](clean[:, 1:])
            feature = feature_loss(cls, patches, targets["cls"], targets["patch"], n_images=n_images)
        return token, feature, patch

    def head_tensors(self) -> dict[str, Tensor]:
        """What training adds to the student: `mask_token` and `token.0.weight`, ..."""
        tensors = dict(self.heads.state_dict())
        if self.mask_token is not None:
            tensors["mask_token"] = self.mask_token.detach()
        return tensors


def build_distillation(
    config: TrainConfig,
    student: VisionTransformer,
    *,
    teacher_width: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Distillation:
    """The module that a run trains, on the CPU, initialised from the run's seed."""
    width = student.embed_dim
    heads = build_heads(config.heads, student_width=width, teacher_width=teacher_width, seed=config.seed)
    mask_token = nn.Parameter(torch.zeros(1, width)) if config.weight_patch > 0 else None
    weights = (config.weight_token, config.weight_feature, config.weight_patch)
    return Distillation(student, heads, mask_token, weights=weights, mean=mean, std=std)


def _take(tokens_MND: Tensor, index_MK: Tensor) -> Tensor:
    """The tokens at the given positions: (M, K, D)."""
    return tokens_MND.gather(1, index_MK.unsqueeze(-1).expand(-1, -1, tokens_MND.shape[-1]))
