"""What one step computes: student, mask token and heads on a batch, to the losses.

One module with one forward pass, so that data-parallel training sees every parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.losses import block_loss, feature_loss, patch_loss, token_loss
from proteus_cache.pixels import channel_values, normalise
from proteus_cache.students.heads import Heads, block_head, build_heads
from proteus_cache.students.start import load_start
from proteus_cache.students.vit import StudentTokens, clean_and_masked_tokens, clean_tokens
from proteus_cache.train.blocks import is_raw
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.drop_path import drop_rates

_NO_BLOCKS: Mapping[str, int] = {}


class Distillation(nn.Module):
    """A student with what training adds to it; the losses come out of `forward`.

    Args:
        student: in float32, without dropout or drop path of its own.
        heads: those that the weights need.
        mask_token: (1, D), or None when no image is masked.
        weights: of the token, feature, patch and block loss.
        mean: of the pixels in 0..1, per channel.
        std: likewise.
        feature_cls_head: head of the CLS token in the feature loss.
        blocks: block targets of the block loss, and the student's block that faces each.
        drop_path: rate of the last block where `forward` is told which branches to keep.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    branch_scale: Tensor

    def __init__(
        self,
        student: VisionTransformer,
        heads: Heads,
        mask_token: nn.Parameter | None,
        *,
        weights: tuple[float, float, float, float],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        feature_cls_head: Literal["token", "feature"] = "token",
        blocks: Mapping[str, int] = _NO_BLOCKS,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.heads = heads
        self.mask_token = mask_token
        self.weights = weights
        self._feature_cls_head = feature_cls_head
        self._blocks = dict(blocks)
        self._tapped = frozenset(blocks.values())
        self.register_buffer("pixel_mean", channel_values(mean), persistent=False)
        self.register_buffer("pixel_std", channel_values(std), persistent=False)
        rates = torch.from_numpy(drop_rates(drop_path, len(student.blocks))).float()
        self.register_buffer("branch_scale", (1 / (1 - rates)).reshape(-1, 1), persistent=False)

    def forward(
        self,
        views: Tensor,
        targets: Mapping[str, Tensor],
        masked_MK: Tensor,
        first_odd: int,
        counts: tuple[float, float],
        kept: Tensor | None = None,
    ) -> Tensor:
        """The losses of a part of a batch.

        Args:
            views: (b, H, W, 3) uint8, or of floating point and normalised already.
            targets: `cls` (b, D), `patch` (b, N, D) and `block.N` (b, 1 + N, D) float32, those that the losses need.
            masked_MK: (M, K) int64 masked patches of every second view.
            first_odd: 0 or 1, the first masked view.
            counts: views and masked views that the means run over.
            kept: (b, 2, depth, 2) of 0 and 1, as `draw_kept` gives; None: no drop path.

        Returns:
            (5,) float32: weighted sum, token, feature, patch and block loss; NaN stands for a loss of weight 0.
        """
        pixels = normalise(views, self.pixel_mean, self.pixel_std)
        masked_rows = slice(first_odd, None, 2)
        tokens = self._tokens(pixels, masked_MK, masked_rows, kept)
        parts = self._losses(tokens, targets, masked_MK, masked_rows, counts)
        weighted = [weight * part for weight, part in zip(self.weights, parts, strict=True) if part is not None]
        off = torch.full_like(pixels[0, 0, 0, 0], torch.nan)
        return torch.stack([torch.stack(weighted).sum(), *(off if part is None else part for part in parts)])

    def _tokens(self, pixels: Tensor, masked_MK: Tensor, masked_rows: slice, kept: Tensor | None) -> StudentTokens:
        scales = None if kept is None else kept.to(self.branch_scale.dtype) * self.branch_scale
        if self.mask_token is None:
            return clean_tokens(self.student, pixels, tapped=self._tapped, branch_scales=scales)
        return clean_and_masked_tokens(
            self.student,
            pixels,
            masked_rows,
            masked_MK,
            self.mask_token,
            tapped=self._tapped,
            branch_scales=scales,
        )

    def _losses(
        self,
        tokens: StudentTokens,
        targets: Mapping[str, Tensor],
        masked_MK: Tensor,
        masked_rows: slice,
        counts: tuple[float, float],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        n_images, n_masked = counts
        clean = tokens.clean
        token = feature = patch = block = None
        if self.mask_token is not None:
            predicted = self.heads["patch"](_take(tokens.masked[:, 1:], masked_MK))
            patch = patch_loss(predicted, _take(targets["patch"][masked_rows], masked_MK), n_images=n_masked)
        if "token" in self.heads:
            cls = self.heads["token"](clean[:, 0])
            token = token_loss(cls, targets["cls"], n_images=n_images) if self.weights[0] > 0 else None
        if "feature" in self.heads:
            if self._feature_cls_head == "feature":
                cls = self.heads["feature"](clean[:, 0])
            patches = self.heads["feature"](clean[:, 1:])
            feature = feature_loss(cls, patches, targets["cls"], targets["patch"], n_images=n_images)
        if self._blocks:
            outputs = [self._block_prediction(name, tokens.blocks[number]) for name, number in self._blocks.items()]
            block = block_loss(outputs, [targets[name] for name in self._blocks], n_images=n_images)
        return token, feature, patch, block

    def _block_prediction(self, target: str, tokens_BTD: Tensor) -> Tensor:
        """What the student says of a block target: as the teacher's tokens, with or without the final norm."""
        tokens = tokens_BTD if is_raw(target) else self.student.norm(tokens_BTD)
        predicted: Tensor = self.heads[block_head(target)](tokens)
        return predicted

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
    blocks: Mapping[str, int] = _NO_BLOCKS,
) -> Distillation:
    """The module that a run trains, on the CPU, initialised from the run's seed and start weights.

    Args:
        config: of the run.
        student: freshly built; it takes the weights of `config.init`.
        teacher_width: D of the targets.
        mean: of the pixels.
        std: of the pixels.
        blocks: as `source.student_blocks` gives.

    Raises:
        WeightsError: `config.init` is not of this student.
    """
    width = student.embed_dim
    heads = build_heads(
        (*config.heads, *map(block_head, blocks)),
        student_width=width,
        teacher_width=teacher_width,
        seed=config.seed,
        norm_eps=config.head_norm_eps,
    )
    start = None if config.init is None else load_start(config.init, student, config.student)
    mask_token = None
    if config.weight_patch > 0:
        mask_token = nn.Parameter(torch.zeros(1, width) if start is None else start)
    return Distillation(
        student,
        heads,
        mask_token,
        weights=config.loss_weights,
        mean=mean,
        std=std,
        feature_cls_head=config.feature_cls_head,
        blocks=blocks,
        drop_path=config.drop_path,
    )


def _take(tokens_MND: Tensor, index_MK: Tensor) -> Tensor:
    """The tokens at the given positions: (M, K, D)."""
    return tokens_MND.gather(1, index_MK.unsqueeze(-1).expand(-1, -1, tokens_MND.shape[-1]))
