"""The random stream: pinned, open at both ends, and uniform."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_cache.views.draws import Draws


def test_words_are_those_of_the_specification() -> None:
    draws = Draws(7, "cat_0123456789", "v002")
    blocks = [
        hashlib.blake2b(b"7/v002/cat_0123456789" + bytes([block, *[0] * 7]), person=b"proteus-cache").digest()
        for block in range(2)
    ]
    words = [int.from_bytes(block[start : start + 8], "little") for block in blocks for start in range(0, 64, 8)]

    assert [draws.below(2**64) for _ in range(16)] == words


def test_streams_differ_by_seed_key_and_view() -> None:
    names = itertools.product((0, 1), ("a", "b"), ("v000", "v001", "probe"))

    assert len({Draws(seed, key, view).below(2**64) for seed, key, view in names}) == 12


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1])
def test_extreme_words_stay_inside(word: int) -> None:
    def only() -> Draws:
        draws = Draws(0, "key", "v000")
        draws._words = [word]
        return draws

    assert 0 < only().uniform() < 1
    assert math.isfinite(only().normal())
    assert 0 <= only().below(3) < 3
    assert only().below(1) == 0


def test_numbers_have_the_moments_they_should() -> None:
    draws = Draws(0, "moments", "v000")
    n = 20_000
    uniform = [draws.uniform() for _ in range(n)]
    normal = [draws.normal() for _ in range(n)]
    thirds = [draws.below(3) for _ in range(n)]

    # Five standard errors each.
    assert abs(sum(uniform) / n - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(sum(normal) / n) < 5 / math.sqrt(n)
    assert abs(sum(value * value for value in normal) / n - 1) < 5 * math.sqrt(2 / n)
    assert all(abs(thirds.count(value) / n - 1 / 3) < 5 * math.sqrt(2 / 9 / n) for value in range(3))


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_between_keeps_its_bounds(low: float, span: float) -> None:
    assert low <= Draws(0, "key", "v000").between(low, low + span) <= low + span
