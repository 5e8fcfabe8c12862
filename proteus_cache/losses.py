"""The Proteus objectives: plain mean-squared errors between head outputs and teacher tokens, in float32 or wider.

    token     token head(CLS) against the teacher's CLS
    feature   [token head(CLS), feature head(patches)] against [CLS, patches]: CLS re-uses the token head
    patch     patch head(masked pass) against the teacher's patches, at masked positions only
    block     block heads(blocks of the clean pass) against the teacher's blocks; ours, off unless asked for

Every mean runs over all elements, channels included. Several processes that each hold a part of the batch
pass the batch's counts divided by their own number, and the average of their losses is then the loss of the
whole batch, however it was cut.

Patches of a teacher may be known along K orthonormal directions only (`Components`). Then the squares of the errors
along these are summed, and divided by what the mean of whole tokens is divided by: all channels. So a direction weighs
the same as with whole tokens, and one that is unknown adds neither loss nor gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Components(NamedTuple):
    """Tokens of which the rear ones are known along some orthonormal directions of their space only."""

    lead_BLD: Tensor
    """Tokens in front, in all D channels; L may be 0."""
    rest_BNK: Tensor
    """The others along K <= D directions."""


Tokens = Tensor | Components
"""Predictions and targets come in the same kind."""


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
    predicted_patches_BND: Tokens,
    cls_BD: Tensor,
    patches_BND: Tokens,
    *,
    n_images: float | None = None,
) -> Tensor:
    """Mean squared error over CLS and all patches of the clean pass.

    Computed as two sums, so that no (B, 1 + N, D) tensor is put together.

    Args:
        predicted_cls_BD: (B, D) output of the **token** head.
        predicted_patches_BND: (B, N, D) output of the feature head, or its components.
        cls_BD: (B, D) teacher's CLS.
        patches_BND: (B, N, D) teacher's patches, or their components.
        n_images: images to average over, B when None.

    Returns:
        float32 scalar.

    Source: arXiv 2407.10366, feature-level objective; Proteus-pytorch MetaArch.forward (the shared token
        head).
    """
    n_patches = _shape(patches_BND)[0]
    cls = _mean_squared_error(predicted_cls_BD, cls_BD, n_images)
    patches = _mean_squared_error(predicted_patches_BND, patches_BND, n_images)
    return (cls + n_patches * patches) / (1 + n_patches)


def patch_loss(predicted_MKD: Tokens, target_MKD: Tokens, *, n_images: float | None = None) -> Tensor:
    """Mean squared error over masked patches.

    Args:
        predicted_MKD: (M, K, D) patch head's output of the masked pass at the masked positions, or its components; M
            may be 0 where `n_images` is given.
        target_MKD: (M, K, D) teacher's patches (clean view) at the same positions, or their components.
        n_images: masked images to average over, M when None.

    Returns:
        float32 scalar.

    Source: arXiv 2407.10366, patch-level objective; Proteus-pytorch MetaArch.forward.
    """
    return _mean_squared_error(predicted_MKD, target_MKD, n_images)


def block_loss(
    predicted_BTD: Sequence[Tokens], target_BTD: Sequence[Tokens], *, n_images: float | None = None
) -> Tensor:
    """Mean over block targets of the mean squared error over CLS and patches.

    Args:
        predicted_BTD: of each block target, (B, 1 + N, D) output of its head in the clean pass, or CLS and components.
        target_BTD: (B, 1 + N, D) teacher's tokens, or CLS and components, in the same order; one or more.
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


def _mean_squared_error(predicted: Tokens, target: Tokens, n_images: float | None) -> Tensor:
    """Mean over all elements, as if the first axis had `n_images` rows; unknown components count as exact."""
    total = _squares(predicted, target)
    n_rows = len(_parts(predicted)[0])
    return total / (math.prod(_shape(predicted)) * (n_rows if n_images is None else n_images))


def _squares(predicted: Tokens, target: Tokens) -> Tensor:
    """Sum of the squared errors."""
    sums = []
    for ours, theirs in zip(_parts(predicted), _parts(target), strict=True):
        dtype = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        sums.append(F.mse_loss(ours.to(dtype), theirs.to(dtype), reduction="sum"))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _parts(tokens: Tokens) -> tuple[Tensor, ...]:
    """All that is known of them."""
    if isinstance(tokens, Tensor):
        return (tokens,)
    return tuple(tokens) if tokens.lead_BLD.shape[1] else (tokens.rest_BNK,)


def _shape(tokens: Tokens) -> tuple[int, ...]:
    """Of the whole tokens of one image."""
    if isinstance(tokens, Tensor):
        return tuple(tokens.shape[1:])
    _, n_lead, width = tokens.lead_BLD.shape
    return (n_lead + tokens.rest_BNK.shape[1], width)
