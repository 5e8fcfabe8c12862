"""The order of training: golden values, and what must hold for every pack."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from proteus_cache.errors import UsageError
from proteus_cache.pack import order as order_module
from proteus_cache.pack.order import (
    WINDOW_SAMPLES,
    BatchPlan,
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


def views_of(plan: BatchPlan) -> list[int]:
    assert plan.view_indices is not None
    views: list[int] = plan.view_indices.tolist()
    return views


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

    assert [views_of(plan) for plan in plans] == [[view] * 16 for view in (1, 3, 1, 3)]
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
    assert order.batch(0).view_indices is None
    assert views_of(SequentialOrder(2, np.arange(5), batch_size=3).batch(1)) == [2, 2]


# Repeats: several view indices of a part of the images.


class Stored:
    """Made-up tars, some images of which have no stored view in some view indices."""

    def __init__(self, images: list[int], missing: dict[int, set[int]], n_views: int) -> None:
        self.images = np.array(images)
        self.starts = np.cumsum(self.images) - self.images
        self.rows = {
            view: [row for row in range(sum(images)) if row not in missing.get(view, set())] for view in range(n_views)
        }
        self.asked: list[tuple[int, int]] = []

    def order(self, repeats: int, **how: Any) -> TrainingOrder:  # options of TrainingOrder
        counts = {
            view: np.array([self.places_of(view, tar).size for tar in range(self.images.size)]) for view in self.rows
        }
        return TrainingOrder(counts, repeats=repeats, images=self.images, places=self.places, **how)

    def places(self, view: int, tar: int) -> NDArray[np.int64]:
        self.asked.append((view, tar))
        return self.places_of(view, tar)

    def places_of(self, view: int, tar: int) -> NDArray[np.int64]:
        rows = np.array(self.rows[view], dtype=np.int64) - self.starts[tar]
        places: NDArray[np.int64] = rows[(rows >= 0) & (rows < self.images[tar])]
        return places

    def entries(self, order: TrainingOrder, epoch: int) -> list[tuple[int, int]]:
        """(image row, view index) of every entry of an epoch."""
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        plans = [order.batch(step) for step in steps]
        assert all(plan.epoch == epoch and plan.records.size == order.batch_size for plan in plans)
        return [
            (self.rows[view][record], view)
            for plan in plans
            for view, record in zip(views_of(plan), plan.records.tolist(), strict=True)
        ]


def plain_epoch(stored: Stored, repeats: int, held_out: list[int], seed: int, epoch: int) -> list[tuple[int, int]]:
    """The rule as docs/pack-format.md says it, one image after the other."""
    n_views, entries, seen, drawn = len(stored.rows), list[tuple[int, int]](), 0, 0
    views = [(epoch * repeats + j) % n_views for j in range(repeats)]
    tars = [tar for tar in range(stored.images.size) if tar not in held_out]
    windows = list[list[int]]([[]])
    for tar in (tars[place] for place in permutation(len(tars), seed, epoch, "tars")):
        if len(windows[-1]) >= order_module.WINDOW_SAMPLES:
            windows.append([])
        of_tar = range(stored.starts[tar], stored.starts[tar] + stored.images[tar])
        windows[-1] += [row for row in of_tar if all(row in stored.rows[view] for view in views)]
    for number, rows in enumerate(windows):
        seen += len(rows)
        for place in permutation(len(rows), seed, epoch, "window", number)[: seen // repeats - drawn].tolist():
            entries += [(rows[place], views[(copy + drawn) % repeats]) for copy in range(repeats)]
            drawn += 1
    return entries


@given(
    images=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    n_views=st.integers(2, 5),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    window=st.sampled_from([1, 5, WINDOW_SAMPLES]),
    data=st.data(),
)
def test_repeats_draw_a_part_of_the_images_with_as_many_different_views(
    images: list[int], n_views: int, batch_size: int, seed: int, window: int, data: st.DataObject
) -> None:
    repeats = data.draw(st.integers(1, n_views))
    held_out = data.draw(st.lists(st.integers(0, len(images) - 1), unique=True, max_size=len(images) - 1))
    some = st.sets(st.integers(0, max(0, sum(images) - 1)), max_size=6)
    stored = Stored(images, data.draw(st.dictionaries(st.integers(0, n_views - 1), some)), n_views)
    hidden = {int(stored.starts[tar]) + place for tar in held_out for place in range(images[tar])}
    allowed = [
        set.intersection(*(set(stored.rows[(epoch * repeats + j) % n_views]) for j in range(repeats))) - hidden
        for epoch in range(n_views)
    ]
    n_drawn = min(len(rows) for rows in allowed) // repeats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WINDOW_SAMPLES", window)
        if n_drawn * repeats < batch_size:
            with pytest.raises(UsageError, match="larger than the"):
                stored.order(repeats, held_out=held_out, seed=seed, batch_size=batch_size)
            return
        order = stored.order(repeats, held_out=held_out, seed=seed, batch_size=batch_size)
        epochs = [stored.entries(order, epoch) for epoch in range(n_views)]
        plain = [plain_epoch(stored, repeats, held_out, seed, epoch) for epoch in range(n_views)]
        alone = stored.order(repeats, held_out=held_out, seed=seed, batch_size=batch_size)
        step = data.draw(st.integers(0, n_views * order.steps_per_epoch - 1))

        for asked in (step, 0, step):
            assert views_of(alone.batch(asked)) == views_of(order.batch(asked))
            assert alone.batch(asked).records.tolist() == order.batch(asked).records.tolist()
    assert order.n_samples == n_drawn * repeats
    for rows, entries, expected in zip(allowed, epochs, plain, strict=True):
        assert entries == expected[: len(entries)]
        assert len(set(entries)) == len(entries) > n_drawn * repeats - batch_size
        assert {row for row, _ in entries} <= rows
        groups = [entries[first : first + repeats] for first in range(0, len(entries), repeats)]
        assert len({group[0][0] for group in groups}) == len(groups) <= len(rows) // repeats
        assert all(len({row for row, _ in group}) == 1 for group in groups)
        assert all(len({view for _, view in group}) == len(group) for group in groups)
    used = Counter(view for entries in epochs for _, view in entries)
    # As often as each other over V epochs, but for an image cut off at the end of each.
    assert max(used.values()) - min(used[view] for view in range(n_views)) <= n_views


def test_repeats_have_their_golden_values() -> None:
    stored = Stored([5, 4, 5], {1: {3}, 2: {3, 12}}, 3)
    order = stored.order(2, held_out=[], seed=11, batch_size=4)

    plans = [order.batch(step) for step in (0, 1, 3)]

    assert order.n_samples == 12
    assert [views_of(plan) for plan in plans] == [[0, 1, 1, 0], [0, 1, 1, 0], [2, 0, 0, 2]]
    assert [plan.records.tolist() for plan in plans] == [[9, 8, 7, 8], [7, 6, 0, 0], [7, 8, 1, 1]]


def test_one_view_of_each_image_is_the_order_without_repeats() -> None:
    counts = [[5, 4, 5], [5, 5, 3]]
    stored = Stored([5, 5, 5], {0: {6}, 1: {11, 12}}, 2)

    order, plain = stored.order(1, held_out=[1], seed=3, batch_size=4), order_of(*counts, seed=3, held_out=[1])

    for step in range(2 * plain.steps_per_epoch):
        assert order.batch(step).records.tolist() == plain.batch(step).records.tolist()
        assert views_of(order.batch(step)) == views_of(plain.batch(step))
    assert stored.asked == []


def test_only_tars_with_missing_views_are_looked_into() -> None:
    stored = Stored([8] * 6, {1: {17}}, 3)

    order = stored.order(2, held_out=[], seed=0, batch_size=4)
    for step in range(3 * order.steps_per_epoch):
        order.batch(step)

    assert set(stored.asked) == {(1, 2)}


@pytest.mark.parametrize(("n_views", "repeats"), [(4, 2), (4, 3), (3, 3), (6, 4), (10, 3)])
def test_repeats_use_and_mask_all_view_indices_evenly(n_views: int, repeats: int) -> None:
    stored = Stored([60] * 4, {}, n_views)
    order = stored.order(repeats, held_out=[], seed=2, batch_size=6 * repeats)

    used, masked = Counter[int](), Counter[int]()
    for step in range(n_views * order.steps_per_epoch):
        views = views_of(order.batch(step))
        used.update(views)
        masked.update(views[1::2])

    each = repeats * (240 // repeats // 6 * 6)
    assert [used[view] for view in range(n_views)] == [each] * n_views
    assert [masked[view] for view in range(n_views)] == [each // 2] * n_views


def test_every_image_is_drawn_equally_often_in_the_long_run() -> None:
    stored = Stored([30] * 4, {}, 4)
    order = stored.order(3, held_out=[], seed=0, batch_size=12)

    drawn = Counter(row for epoch in range(400) for row, _ in stored.entries(order, epoch))

    # 36 to 40 of 120 images in each of 400 epochs, 3 entries each: 390 on average, +- 28.
    assert len(drawn) == 120
    assert min(drawn.values()) > 390 - 5 * 28
    assert max(drawn.values()) < 400 + 5 * 28


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        (0, "repeats must be at least 1"),
        (3, r"--repeats 3 shows 3 different views .* holds 2; choose --repeats 2 or less, or extract and pack more"),
    ],
)
def test_repeats_that_cannot_be_are_refused(repeats: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Stored([8], {}, 2).order(repeats, held_out=[], seed=0, batch_size=2)
