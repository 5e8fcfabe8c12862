"""The Proteus objectives: plain mean-squared errors between head outputs and teacher tokens, in float32 or wider.

    token     token head(CLS) against the teacher's CLS
    feature   [token head(CLS), feature head(patches)] against [CLS, patches]: CLS re-uses the token head
    patch     patch head(masked pass) against the teacher's patches, at masked positions only
    block     block heads(blocks of the clean pass) against the teacher's blocks; ours, off unless asked for

Every mean runs over all elements, channels included. Several processes that each hold a part of the batch
pass the batch's counts divided by their own number, and the average of their losses is then the loss of the
whole batch, however it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loss(predicted_BD: Tensor, target_BD: Tensor, *, n_images: float | None = None) -> Tensor:
    """Mean squared error of the CLS token.

    Args:
        predicted_BD: (B, D) token head's output.
        target_BD: (B, D) teacher's CLS after its final norm.
        n_images: images to average over, B when None.

    Returns:
        float32 scalar.

    Source: arXiv 2407.10366, token-level objective; Proteus-pytorch MetaArch.forward.
    """
    return _mean_squared_error(predicted_BD, target_BD, n_images)


def feature_loss(
    predicted_cls_BD: Tensor,
    predicted_patches_BND: Tensor,
    cls_BD: Tensor,
    patches_BND: Tensor,
    *,
    n_images: float | None = None,
) -> Tensor:
    """Mean squared error over CLS and all patches of the clean pass.

    Computed as two sums, so that no (B, 1 + N, D) tensor is put together.

    Args:
        predicted_cls_BD: (B, D) output of the **token** head.
        predicted_patches_BND: (B, N, D) output of the feature head.
        cls_BD: (B, D) teacher's CLS.
        patches_BND: (B, N, D) teacher's patches.
        n_images: images to average over, B when None.

    Returns:
        float32 scalar.

    Source: arXiv 2407.10366, feature-level objective; Proteus-pytorch MetaArch.forward (the shared token
        head).
    """
    n_patches = patches_BND.shape[1]
    cls = _mean_squared_error(predicted_cls_BD, cls_BD, n_images)
    patches = _mean_squared_error(predicted_patches_BND, patches_BND, n_images)
    return (cls + n_patches * patches) / (1 + n_patches)


def patch_loss(predicted_MKD: Tensor, target_MKD: Tensor, *, n_images: float | None = None) -> Tensor:
    """Mean squared error over masked patches.

    Args:
        predicted_MKD: (M, K, D) patch head's output of the masked pass at the masked positions; M may be 0
            where `n_images` is given.
        target_MKD: (M, K, D) teacher's patches (clean view) at the same positions.
        n_images: masked images to average over, M when None.

    Returns:
        float32 scalar.

    Source: arXiv 2407.10366, patch-level objective; Proteus-pytorch MetaArch.forward.
    """
    return _mean_squared_error(predicted_MKD, target_MKD, n_images)


def block_loss(
    predicted_BTD: Sequence[Tensor], target_BTD: Sequence[Tensor], *, n_images: float | None = None
) -> Tensor:
    """Mean over block targets of the mean squared error over CLS and patches.

    Args:
        predicted_BTD: of each block target, (B, 1 + N, D) output of its head in the clean pass.
        target_BTD: (B, 1 + N, D) teacher's tokens, in the same order; one or more.
        n_images: images to average over, B when None.

    Returns:
        float32 scalar.

    Source: ours; Proteus has no loss on intermediate blocks.
    """
    losses = [
        _mean_squared_error(predicted, target, n_images)
        for predicted, target in zip(predicted_BTD, target_BTD, strict=True)
    ]
    return torch.stack(losses).mean()


def _mean_squared_error(predicted: Tensor, target: Tensor, n_images: float | None) -> Tensor:
    """Mean over all elements, as if the first axis had `n_images` rows."""
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    total = F.mse_loss(predicted.to(dtype), target.to(dtype), reduction="sum")
    per_image = predicted[0:1].numel() if len(predicted) else 1
    return total / (per_image * (len(predicted) if n_images is None else n_images))
