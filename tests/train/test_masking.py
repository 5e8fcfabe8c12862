from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_cache.train.masking import draw_masks, n_masked_images, n_masked_patches


def _draw(positions: range, *, seed: int = 0, step: int = 0, n_patches: int = 16, n_masked: int = 8) -> list[list[int]]:
    masks = draw_masks(seed, step, np.array(positions, np.int64), n_patches=n_patches, n_masked=n_masked)
    return [[int(patch) for patch in row] for row in masks]


@given(
    n_patches=st.integers(1, 300),
    ratio=st.floats(0.01, 1.0),
    n_images=st.integers(1, 20),
    seed=st.integers(0, 2**63),
)
def test_every_odd_image_hides_a_fixed_number_of_distinct_patches(
    n_patches: int, ratio: float, n_images: int, seed: int
) -> None:
    n_masked = n_masked_patches(ratio, n_patches)

    rows = _draw(range(n_images), seed=seed, n_patches=n_patches, n_masked=n_masked)

    assert len(rows) == n_masked_images(n_images)
    for row in rows:
        assert len(row) == n_masked == int(ratio * n_patches)
        assert row == sorted(set(row))
        assert all(0 <= patch < n_patches for patch in row)


@given(borders=st.lists(st.integers(0, 24), max_size=4), step=st.integers(0, 1000), n_patches=st.integers(2, 40))
def test_any_split_over_processes_draws_the_same_masks(borders: list[int], step: int, n_patches: int) -> None:
    edges = [0, *sorted(borders), 24]

    parts = [
        row
        for begin, end in itertools.pairwise(edges)
        for row in _draw(range(begin, end), step=step, n_patches=n_patches, n_masked=n_patches // 2)
    ]

    assert parts == _draw(range(24), step=step, n_patches=n_patches, n_masked=n_patches // 2)


def test_masks_depend_on_seed_step_and_position() -> None:
    rows = [_draw(range(4)), _draw(range(4), step=1), _draw(range(4), seed=1)]

    drawn = [tuple(row) for masks in rows for row in masks]
    assert len(set(drawn)) == 6


def test_every_patch_is_hidden_equally_often() -> None:
    rows = np.array(_draw(range(8000), n_patches=17, n_masked=8))

    shares = np.bincount(rows.ravel(), minlength=17) / len(rows)

    # Five standard deviations of a share of 8/17 over 4,000 images.
    assert shares == pytest.approx(8 / 17, abs=5 * (8 / 17 * 9 / 17 / 4000) ** 0.5)


def test_masks_stay_the_same_over_versions() -> None:
    assert _draw(range(4), seed=7, step=1234, n_patches=10, n_masked=5) == GOLDEN


def test_a_slice_without_odd_positions_has_no_masks() -> None:
    masks = draw_masks(0, 0, np.array([6], np.int64), n_patches=16, n_masked=8)

    assert masks.shape == (0, 8)
    assert masks.dtype == np.int64


GOLDEN = [[0, 1, 3, 6, 7], [0, 2, 4, 6, 8]]
