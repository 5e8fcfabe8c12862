"""k nearest neighbours: a test image takes the weighted vote of the training images most like it.

The search is exact: plain matrix products and top-k over chunks, on the device that the caller names. Nothing
is learned and nothing is drawn, so a score is a property of the features alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

K_NEIGHBOURS: Final = (10, 20, 100, 200)
"""DINOv2's numbers of neighbours."""
TEMPERATURE: Final = 0.07
"""DINOv2's: a neighbour of similarity s weighs exp(s / 0.07)."""

_TEST_CHUNK = 1024
_TRAIN_CHUNK = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnScore:
    """How often the vote of k neighbours was right."""

    k: int
    """Neighbours asked for."""
    n_neighbours: int
    """Neighbours that voted: k, or all training images where there are fewer."""
    top1: float | None
    """Share of the test images whose class has the most votes; None without test images."""
    top5: float | None
    """Share of the test images whose class is among the five with the most votes."""


def knn_scores(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    n_classes: int,
    ks: Sequence[int] = K_NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> tuple[KnnScore, ...]:
    """Score test features by the labels of their nearest training features.

    Args:
        train: (N, D) float32 of length 1.
        train_labels: (N,) int64, 0 to n_classes - 1.
        test: (M, D) float32 of length 1.
        test_labels: (M,) int64.
        n_classes: classes that labels can name.
        ks: numbers of neighbours, each at least 1.
        temperature: of the votes.
        device: where products are computed; the training features visit it once, in chunks.

    Returns:
        One score for each of `ks`, in that order.

    Raises:
        ValueError: there is no training feature.

    Source: DINOv2 eval/knn.py. There the weights are a softmax over the largest k; it only rescales, so each
    k equals exp-weighted voting over its own neighbours. Deviations: a class without a vote is never a hit
    (the original fills the top 5 with classes of weight 0), and of classes with equal votes the one with the
    lower number wins.
    """
    if not len(train):
        raise ValueError("k-NN needs at least one training feature")
    similarity, neighbour = nearest(train, test, k=max(ks), device=device)
    neighbour_labels = train_labels[neighbour]
    return tuple(
        _score(
            similarity[:, :k],
            neighbour_labels[:, :k],
            test_labels,
            k,
            n_classes=n_classes,
            temperature=temperature,
        )
        for k in ks
    )


def nearest(
    train: Tensor,
    test: Tensor,
    *,
    k: int,
    device: torch.device | str = "cpu",
    train_chunk: int = _TRAIN_CHUNK,
    test_chunk: int = _TEST_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The k training rows with the largest dot product, for each test row.

    Args:
        train: (N, D) float32.
        test: (M, D) float32.
        k: rows wanted; all N where there are fewer.
        device: where products are computed.
        train_chunk: training rows on the device at a time.
        test_chunk: test rows in one product.

    Returns:
        (M, min(k, N)) float32 products, descending, and (M, min(k, N)) int64 training rows; both on the CPU.
    """
    k = min(k, len(train))
    best = torch.full((len(test), k), -torch.inf)
    rows = torch.zeros((len(test), k), dtype=torch.int64)
    for first in range(0, len(train), train_chunk):
        bank = train[first : first + train_chunk].to(device).T
        for start in range(0, len(test), test_chunk):
            part = slice(start, start + test_chunk)
            product = test[part].to(device) @ bank
            found, index = product.topk(min(k, product.shape[1]), dim=1)
            candidates = torch.cat((best[part], found.cpu()), dim=1)
            candidate_rows = torch.cat((rows[part], index.cpu() + first), dim=1)
            best[part], order = candidates.topk(k, dim=1)
            rows[part] = candidate_rows.gather(1, order)
    return best, rows


def _score(
    similarity: Tensor, labels: Tensor, wanted: Tensor, k: int, *, n_classes: int, temperature: float
) -> KnnScore:
    """The score of one k from (M, n) neighbours, most similar first."""
    n_neighbours = labels.shape[1]
    if not len(wanted):
        return KnnScore(k=k, n_neighbours=n_neighbours, top1=None, top5=None)
    ranks = torch.cat(
        [
            _ranks(similarity[part], labels[part], wanted[part], n_classes, temperature)
            for part in (slice(start, start + _TEST_CHUNK) for start in range(0, len(wanted), _TEST_CHUNK))
        ]
    )
    top1, top5 = ((ranks < places).double().mean().item() for places in (1, 5))
    return KnnScore(k=k, n_neighbours=n_neighbours, top1=top1, top5=top5)


def _ranks(similarity: Tensor, labels: Tensor, wanted: Tensor, n_classes: int, temperature: float) -> Tensor:
    """Place of each wanted class among the votes, 0 the first; n_classes where it has no vote: (B,) int64."""
    # Relative to the nearest neighbour, which changes no ranking and keeps the exponentials within (0, 1].
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = torch.zeros(len(wanted), n_classes, dtype=torch.float64).scatter_add_(1, labels, weights)
    own = votes.gather(1, wanted.unsqueeze(1))
    is_lower = torch.arange(n_classes) < wanted.unsqueeze(1)
    ahead = ((votes > own) | ((votes == own) & is_lower)).sum(dim=1)
    return torch.where(own.squeeze(1) > 0, ahead, n_classes)
