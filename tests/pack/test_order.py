"""The order of training: golden values, and what must hold for every pack."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_cache.errors import UsageError
from proteus_cache.pack.order import (
    WINDOW_SAMPLES,
    SequentialOrder,
    TrainingOrder,
    permutation,
    records_of_tars,
)


def order_of(
    *counts: list[int], seed: int = 0, batch_size: int = 4, held_out: list[int] | None = None
) -> TrainingOrder:
    by_view = {view: np.array(count) for view, count in enumerate(counts)}
    return TrainingOrder(by_view, held_out=held_out or [], seed=seed, batch_size=batch_size)


def second_philox(key: int, n: int) -> list[int]:
    """Philox4x64-10 after Salmon et al. 2011, counter from 1: what a second implementation would write."""
    mask, outputs, counter = (1 << 64) - 1, list[int](), 0
    while len(outputs) < n:
        counter += 1
        words, key_0, key_1 = [counter, 0, 0, 0], key & mask, key >> 64
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
            words = [
                (second >> 64) ^ words[1] ^ key_0,
                second & mask,
                (first >> 64) ^ words[3] ^ key_1,
                first & mask,
            ]
            key_0, key_1 = (key_0 + 0x9E3779B97F4A7C15) & mask, (key_1 + 0xBB67AE8584CAA73B) & mask
        outputs += words
    return outputs[:n]


def test_permutations_are_those_of_a_second_implementation() -> None:
    text = "proteus-cache/order/1\n7\n3\nwindow\n2"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")

    outputs = second_philox(key, 999)

    assert permutation(999, 7, 3, "window", 2).tolist() == sorted(range(999), key=lambda place: outputs[place])


def test_permutations_have_their_golden_values() -> None:
    assert permutation(8, 0, 0, "tars").tolist() == [0, 2, 5, 6, 4, 1, 7, 3]
    assert permutation(8, 1, 2, "window", 3).tolist() == [4, 1, 3, 2, 7, 0, 6, 5]
    assert permutation(0, 1).tolist() == []


def test_batches_have_their_golden_values() -> None:
    order = order_of([5, 4, 5], [5, 5, 5], seed=11)

    batches = [order.batch(step).records.tolist() for step in (0, 2, 3)]

    assert batches == [[4, 8, 7, 13], [12, 2, 9, 11], [6, 7, 0, 12]]


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_an_epoch_draws_every_sample_once_and_no_held_out_one(
    counts: list[int], batch_size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    held_out = data.draw(st.lists(st.integers(0, len(counts) - 1), unique=True, max_size=len(counts) - 1))
    allowed = records_of_tars(np.array(counts), np.setdiff1d(np.arange(len(counts)), held_out))
    if allowed.size < batch_size:
        with pytest.raises(UsageError, match="larger than the"):
            order_of(counts, batch_size=batch_size, held_out=held_out)
        return

    order = order_of(counts, seed=seed, batch_size=batch_size, held_out=held_out)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    plans = [order.batch(step) for step in steps]

    drawn = np.concatenate([plan.records for plan in plans])
    assert all(plan.records.size == batch_size and plan.epoch == epoch for plan in plans)
    assert np.unique(drawn).size == drawn.size
    assert np.isin(drawn, allowed).all()
    assert allowed.size - drawn.size < batch_size


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    counts = [3000] * 20
    forward, alone = order_of(counts, counts, batch_size=512), order_of(counts, counts, batch_size=512)

    batches = [forward.batch(step).records for step in range(2 * forward.steps_per_epoch)]

    for step in (150, 3, 117, 36, 32):
        assert np.array_equal(alone.batch(step).records, batches[step])


def test_epochs_go_round_the_view_indices_and_differ() -> None:
    order = TrainingOrder({1: np.array([8, 8]), 3: np.array([8, 8])}, held_out=[], seed=0, batch_size=16)

    plans = [order.batch(step) for step in range(4)]

    assert [plan.view_index for plan in plans] == [1, 3, 1, 3]
    assert len({plan.records.tobytes() for plan in plans}) == 4


def test_seeds_differ() -> None:
    assert not np.array_equal(order_of([64], seed=1).batch(0).records, order_of([64], seed=2).batch(0).records)


def test_windows_hold_whole_tars_and_mix_them() -> None:
    order = order_of([1000] * 64, batch_size=1000)

    drawn = np.concatenate([order.batch(step).records for step in range(17)])

    tars = np.unique(drawn // 1000)
    assert tars.size == -(-WINDOW_SAMPLES // 1000) == 17
    first_batch = order.batch(0).records // 1000
    assert np.unique(first_batch).size == 17


def test_view_indices_with_fewer_samples_shorten_every_epoch() -> None:
    order = order_of([8, 8], [8, 3])

    assert order.steps_per_epoch == 2
    assert order.batch(3).records.max() < 11


def test_a_batch_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        order_of([4], batch_size=0)


def test_a_sequence_ends_with_a_smaller_batch() -> None:
    order = SequentialOrder(None, np.arange(10, 17), batch_size=3)

    assert [order.batch(step).records.tolist() for step in range(order.n_steps)] == [[10, 11, 12], [13, 14, 15], [16]]
    assert order.batch(0).view_index is None
