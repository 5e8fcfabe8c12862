"""How many calibration views are kept, in which type, and what is said of too few."""

import numpy as np
import pytest
import torch

from proteus_cache.calibration_tokens import TokenStore, enough_images, room_for, spread, warn_of_few_views
from proteus_cache.codecs.calibration import CalibrationReport

GIANT = {"patch": (256, 1536)}


def test_two_thousand_views_of_the_largest_teacher_are_kept_in_half_precision() -> None:
    room = room_for(GIANT, 2_000, free_bytes=64_000_000_000)

    assert (room.n_views, room.dtype) == (2_000, torch.float16)


def test_few_tokens_stay_exact() -> None:
    room = room_for({"patch": (36, 128), "block.1": (37, 128)}, 2_000, free_bytes=64_000_000_000)

    assert (room.n_views, room.dtype) == (2_000, torch.float32)


@pytest.mark.parametrize("free_bytes", [8_000_000_000, 1_000_000_000, 10_000_000, 0])
def test_all_targets_together_stay_below_a_quarter_of_the_free_memory(free_bytes: int) -> None:
    shapes = GIANT | {"block.9": (257, 1536)}

    room = room_for(shapes, 2_000, free_bytes)

    values = room.n_views * (256 + 257) * 1536
    assert room.n_views == 1 or values * room.dtype.itemsize <= free_bytes / 4
    assert room.n_views == max(1, min(2_000, free_bytes // 4 // (2 * 513 * 1536)))


def test_what_fitting_klt_takes_is_left_free() -> None:
    cost = 3.5 * 125_000 * 1536 * 4  # 2.7 GB
    a_view = 256 * 1536 * 2

    for codec, free_bytes, expected in (
        ("int4", 4_000_000_000, int(1e9) // a_view),
        ("klt:20dB", 4_000_000_000, int((4e9 - cost) / 4) // a_view),
        ("klt:64KB", 2_800_000_000, 64),  # the least, and check_calibration wants 24
        ("klt:20dB", 100_000_000, 25_000_000 // a_view),  # which no quarter holds
        ("klt:20dB", 0, 1),
        ("klt:20dB", 64_000_000_000, 2_000),
    ):
        room = room_for(GIANT, 2_000, free_bytes, {"patch": codec})
        assert (room.n_views, room.dtype) == (expected, torch.float16)


def test_only_the_widest_klt_counts_and_no_more_tokens_than_there_are() -> None:
    shapes = {"patch": (16, 24), "block.0": (17, 24), "cls": (1, 1000)}
    codecs = {"patch": "klt:20dB", "block.0": "klt:20dB", "cls": "float16"}
    kept, fitting = 4 * 10 * (16 * 24 + 17 * 24 + 1000), int(3.5 * 10 * 17 * 24 * 4)

    assert room_for(shapes, 10, 4 * kept + fitting, codecs).dtype == torch.float32
    assert room_for(shapes, 10, 4 * kept + fitting - 4, codecs).dtype == torch.float16


@pytest.mark.parametrize(("n", "n_all"), [(3, 10), (10, 10), (12, 10), (1, 7), (0, 5)])
def test_spread_numbers_are_different_and_reach_over_all(n: int, n_all: int) -> None:
    found = spread(n, n_all)

    assert len(set(found.tolist())) == len(found) == min(n, n_all)
    assert all(0 <= number < n_all for number in found)
    assert np.diff(found).max(initial=0) - np.diff(found).min(initial=n_all) <= 1


@pytest.mark.parametrize(("n_tokens", "n_images"), [(256, 2_000), (58, 2_000), (36, 3_183)])
def test_views_with_few_tokens_have_to_be_more(n_tokens: int, n_images: int) -> None:
    n = enough_images({"patch": (n_tokens, 64), "block.1": (n_tokens + 1, 64)})

    assert n == n_images
    n_fitted = n - n // 8
    assert n_fitted * n_tokens >= 100_000


def test_a_store_keeps_what_it_has_room_for() -> None:
    store = TokenStore({"patch": (2, 3)}, room_for({"patch": (2, 3)}, 5, 1 << 30))
    tokens = torch.randn(8, 2, 3)

    store.add({"patch": tokens[:4]})
    assert store.n_missing == 1
    store.add({"patch": tokens[4:]})

    assert torch.equal(store.tokens()["patch"], tokens[:5])
    assert (store.n_views, store.n_missing) == (5, 0)


def report(**changes: object) -> CalibrationReport:
    values = {
        **{"n_views": 2_000, "n_tokens": 448_000, "snr_db": 20.0, "bits_per_value": 2.0, "gap_bits": 0.4},
        **{"n_kept": 9, "width": 10, "dct": False, "dct_saves_bits": 0.0, "transform_bound_excess_bits": 0.01},
    }
    return CalibrationReport(**(values | changes))  # type: ignore[arg-type]  # its fields


def test_of_too_few_views_none_is_left_out_to_measure_on(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_few_views({"patch": "int4"}, {"patch": report(n_views=7, transform_bound_excess_bits=0.0)})

    assert caplog.messages[0].endswith("it would do better")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"n_views": 1_999}, "codec klt:20dB is fitted to 1,999 views with 448,000 tokens"),
        ({"n_tokens": 99_999}, "from 2,000 views with 100,000 tokens on it would do better"),
        (
            {"n_tokens": 500, "transform_bound_excess_bits": 0.25},
            "the expected loss is at least patch 0.25 bits a value",
        ),
        (
            {"n_views": 30, "snr_db": 19.84, "transform_bound_excess_bits": 0.0},
            "would do better; on views that it was not fitted to it keeps patch 19.8 dB",
        ),
    ],
)
def test_too_few_views_or_tokens_are_said_in_one_line(
    changes: dict[str, object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_few_views({"cls": "float16", "patch": "klt:20dB"}, {"patch": report(**changes)})

    assert len(caplog.messages) == bool(words)
    assert words in "".join(caplog.messages)
