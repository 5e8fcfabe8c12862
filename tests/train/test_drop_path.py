from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from proteus_cache.train.drop_path import draw_kept, drop_rates


def _draw(begin: int, end: int, *, seed: int = 0, step: int = 0, rate: float = 0.5, depth: int = 3) -> list[object]:
    kept: list[object] = draw_kept(seed, step, np.arange(begin, end), drop_path=rate, depth=depth).tolist()
    return kept


def test_rates_are_timms() -> None:
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=5, num_heads=2, drop_path_rate=0.3)

    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]

    assert isinstance(model.blocks[0].drop_path1, nn.Identity)
    assert drop_rates(0.3, 5).tolist() == pytest.approx(rates)
    assert drop_rates(0.3, 1).tolist() == [0.0]


@given(
    borders=st.lists(st.integers(1, 19), max_size=3, unique=True), step=st.integers(0, 1000), depth=st.integers(1, 24)
)
def test_any_split_over_processes_draws_the_same(borders: list[int], step: int, depth: int) -> None:
    edges = [0, *sorted(borders), 20]

    parts = [row for begin, end in itertools.pairwise(edges) for row in _draw(begin, end, step=step, depth=depth)]

    assert parts == _draw(0, 20, step=step, depth=depth)


def test_draws_depend_on_seed_step_and_position() -> None:
    draws = [_draw(0, 2, depth=24), _draw(0, 2, step=1, depth=24), _draw(0, 2, seed=1, depth=24)]

    assert len({str(image) for images in draws for image in images}) == 6


def test_branches_are_left_out_at_the_rate_of_their_block() -> None:
    n_images, rate, depth = 4000, 0.4, 5

    kept = draw_kept(0, 0, np.arange(n_images), drop_path=rate, depth=depth)

    assert kept.shape == (n_images, 2, depth, 2)
    for number, expected in enumerate(drop_rates(rate, depth)):
        shares = 1 - kept[:, :, number].mean(axis=0)
        # Five standard deviations.
        assert shares.ravel() == pytest.approx(expected, abs=5 * (expected * (1 - expected) / n_images) ** 0.5)
    # Passes and branches draw for themselves.
    assert abs(np.corrcoef(kept[:, :, -1].reshape(n_images, 4).T) - np.eye(4)).max() < 5 / n_images**0.5


def test_draws_stay_the_same_over_versions() -> None:
    assert _draw(7, 8, seed=3, step=11, rate=0.5, depth=3) == GOLDEN


GOLDEN = [[[[1, 1], [0, 0], [0, 1]], [[1, 1], [1, 0], [1, 1]]]]
