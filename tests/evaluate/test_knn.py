"""k-NN: hand-computed votes, a naive loop, chunks, ties and too few neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from proteus_cache.evaluate.knn import TEMPERATURE, KnnScore, knn_scores, nearest


def _features(n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, width, generator=generator), dim=1)


def _at(*degrees: float) -> Tensor:
    """Unit vectors of the plane."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1).float()


def _score_one(train: Tensor, labels: list[int], wanted: int, *, k: int, n_classes: int = 8) -> KnnScore:
    (score,) = knn_scores(train, torch.tensor(labels), _at(0), torch.tensor([wanted]), n_classes=n_classes, ks=[k])
    return score


def test_one_close_neighbour_outweighs_two_far_ones() -> None:
    train, labels = _at(5, 30, -30), [0, 1, 1]
    near, far = (math.exp(math.cos(math.radians(angle)) / TEMPERATURE) for angle in (5, 30))
    assert near > 2 * far

    assert _score_one(train, labels, wanted=0, k=3).top1 == 1.0
    assert _score_one(train, labels, wanted=1, k=3).top1 == 0.0


def test_two_neighbours_outweigh_a_slightly_closer_one() -> None:
    train, labels = _at(5, 8, -8), [0, 1, 1]
    near, far = (math.exp(math.cos(math.radians(angle)) / TEMPERATURE) for angle in (5, 8))
    assert near < 2 * far

    assert _score_one(train, labels, wanted=1, k=3).top1 == 1.0
    assert _score_one(train, labels, wanted=0, k=1).top1 == 1.0


def test_top5_counts_the_fifth_class_and_not_the_sixth() -> None:
    train, labels = _at(1, 11, 21, 31, 41, 51), [5, 4, 3, 2, 1, 0]

    assert _score_one(train, labels, wanted=1, k=6).top5 == 1.0
    assert _score_one(train, labels, wanted=0, k=6).top5 == 0.0


def test_a_class_without_a_vote_is_never_among_the_best_five() -> None:
    score = _score_one(_at(1, 2), [3, 3], wanted=0, k=2)

    assert (score.top1, score.top5) == (0.0, 0.0)


def test_of_equal_votes_the_lower_class_wins() -> None:
    train, labels = _at(10, -10), [6, 2]

    assert _score_one(train, labels, wanted=2, k=2).top1 == 1.0
    assert _score_one(train, labels, wanted=6, k=2).top1 == 0.0


def test_few_training_images_all_vote_and_the_score_says_how_many() -> None:
    train, labels = _at(1, 2, 3), [0, 0, 1]

    scores = knn_scores(train, torch.tensor(labels), _at(0), torch.tensor([0]), n_classes=2, ks=[2, 3, 10])

    assert [(score.k, score.n_neighbours) for score in scores] == [(2, 2), (3, 3), (10, 3)]
    assert scores[2].top1 == scores[1].top1


def test_without_test_images_there_is_no_score() -> None:
    none = torch.empty(0, 2)

    (score,) = knn_scores(_at(1), torch.tensor([0]), none, torch.empty(0, dtype=torch.int64), n_classes=1, ks=[1])

    assert score == KnnScore(k=1, n_neighbours=1, top1=None, top5=None)


def test_without_training_features_it_refuses() -> None:
    with pytest.raises(ValueError, match="at least one training feature"):
        knn_scores(torch.empty(0, 2), torch.empty(0), _at(0), torch.tensor([0]), n_classes=1)


def test_a_large_similarity_does_not_overflow_the_votes() -> None:
    long = 100 * _at(1, 2)

    (score,) = knn_scores(long, torch.tensor([0, 1]), 100 * _at(0), torch.tensor([0]), n_classes=2, ks=[2])

    assert score.top1 == 1.0


@pytest.mark.parametrize("ks", [(1,), (3, 10, 200)])
def test_scores_equal_those_of_a_naive_loop(ks: tuple[int, ...]) -> None:
    n_classes = 9
    train, test = _features(150, 12, seed=1), _features(40, 12, seed=2)
    train_labels, test_labels = torch.arange(150) % n_classes, torch.arange(40) * 7 % n_classes

    scores = knn_scores(train, train_labels, test, test_labels, n_classes=n_classes, ks=ks)

    for score in scores:
        expected = _naive(train, train_labels, test, test_labels, n_classes, score.k)
        assert (score.top1, score.top5) == pytest.approx(expected, abs=1e-12)


def _naive(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, n_classes: int, k: int
) -> tuple[float, float]:
    """The published rule, word by word: softmax over all neighbours, then sums of the first k."""
    hits = np.zeros(2)
    for row, wanted in zip(test.double().numpy(), test_labels.tolist(), strict=True):
        similarity = train.double().numpy() @ row
        order = np.argsort(-similarity)[:200]
        weights = np.exp(similarity[order] / TEMPERATURE)
        weights /= weights.sum()
        votes = np.zeros(n_classes)
        for weight, label in zip(weights[:k], train_labels.numpy()[order][:k], strict=True):
            votes[label] += weight
        ranking = [int(label) for label in np.argsort(-votes) if votes[label] > 0]
        hits += [wanted in ranking[:1], wanted in ranking[:5]]
    top1, top5 = hits / len(test)
    return float(top1), float(top5)


@settings(max_examples=30)
@given(
    n_train=st.integers(1, 40),
    n_test=st.integers(0, 12),
    k=st.integers(1, 50),
    train_chunk=st.integers(1, 50),
    test_chunk=st.integers(1, 15),
)
def test_chunks_do_not_change_the_neighbours(
    n_train: int, n_test: int, k: int, train_chunk: int, test_chunk: int
) -> None:
    train, test = _features(n_train, 5, seed=3), _features(n_test, 5, seed=4)

    similarity, rows = nearest(train, test, k=k, train_chunk=train_chunk, test_chunk=test_chunk)

    exact = test @ train.T
    expected, _ = exact.topk(min(k, n_train), dim=1)
    # A product over another chunk may differ in its last bit.
    torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.gather(1, rows), expected, atol=1e-6, rtol=0)
    assert all(len(set(row)) == len(row) for row in rows.tolist())


@pytest.mark.gpu
def test_a_gpu_finds_the_same_neighbours() -> None:
    train, test = _features(500, 16, seed=5), _features(64, 16, seed=6)

    on_cpu, _ = nearest(train, test, k=20)
    on_gpu, _ = nearest(train, test, k=20, device="cuda", train_chunk=128)

    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=0)
