"""int4: bytes, error, slope, and what an overflow costs."""

import numpy as np
import pytest
import torch

from proteus_cache.codecs import fit_codec, load_codec
from proteus_cache.codecs.calibration import N_NUMBERS, CalibrationReport
from proteus_cache.codecs.codec import Codec
from proteus_cache.codecs.int4 import Int4Codec
from proteus_cache.errors import ChecksumError, ConfigError, FormatError
from tests.codecs.fields import slopes, smooth_tokens, snr_db


@pytest.fixture(scope="module")
def codec() -> Codec:
    return fit_codec("int4", smooth_tokens(0, 300))


def _by_hand(width: int = 3) -> Int4Codec:
    """Levels -8 to 7 times channel number plus one, thresholds between them, mean of the channel's number."""
    numbers = torch.arange(1, width + 1).float()
    steps = torch.arange(-8, 8).float()
    return Int4Codec(
        (2, width),
        {
            "mean": numbers - 1,
            "levels": steps * numbers.unsqueeze(1),
            "inverse_scale": 1 / numbers,
            "thresholds": (steps[1:] - 0.5).expand(width, 15).clone(),
            "low": torch.full((width,), -20.0),
            "high": torch.full((width,), 20.0),
            "calibration": torch.zeros(N_NUMBERS, dtype=torch.float64),
        },
    )


def test_golden_codes() -> None:
    codec = _by_hand()
    # Gains 2 and 0.5 as float16; levels (3, 12, 8) and (0, 15, 7): channels 0 and 1 in a byte, channel 2 in the next.
    codes = torch.tensor(list(bytes.fromhex("00400038c308f007")), dtype=torch.uint8).unsqueeze(0)

    decoded = codec.decode(codes)

    assert codec.code_bytes == 8
    expected = [[2 * -5 * 1, 1 + 2 * 4 * 2, 2 + 0], [0.5 * -8, 1 + 0.5 * 7 * 2, 2 + 0.5 * -1 * 3]]
    assert decoded[0].tolist() == expected
    assert codec.widened(codes).tolist() == [0]


def test_codes_are_those_of_the_documented_rule(codec: Codec) -> None:
    assert isinstance(codec, Int4Codec)
    tokens = smooth_tokens(1, 3)

    codes = codec.encode(tokens).numpy()

    gain = codes[:, :72].copy().view("<f2").astype(np.float64)
    packed = codes[:, 72:].reshape(3, 36, 16)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 36, 32)
    scaled = (tokens.numpy() - codec.mean.numpy()) * codec.inverse_scale.numpy()
    np.testing.assert_allclose(np.abs(gain), np.sqrt((scaled**2).mean(-1)), rtol=1e-3)
    normal = scaled / np.abs(gain)[..., None]
    cells = (normal[..., None] > codec.thresholds.numpy()).sum(-1)
    assert (levels != cells).mean() < 1e-4  # but for values on a threshold
    table = codec.levels.numpy()
    expected = codec.mean.numpy() + np.abs(gain)[..., None] * table[np.arange(32), levels]
    np.testing.assert_allclose(codec.decode(torch.from_numpy(codes)).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_error_is_small_and_unbiased(codec: Codec) -> None:
    held_out = smooth_tokens(2, 400)

    decoded = codec.decode(codec.encode(held_out))

    assert snr_db(held_out, decoded) > 19.5
    mean = held_out.mean(dim=(0, 1))
    assert (slopes(held_out - mean, decoded - mean) - 1).abs().max() < 5e-3
    assert codec.calibration is not None
    assert codec.calibration.snr_db == pytest.approx(snr_db(held_out, decoded), abs=0.3)


def test_rate_is_four_bits_and_sixteen_a_token(codec: Codec) -> None:
    assert codec.code_bytes == 36 * (2 + 16)
    assert fit_codec("int4", smooth_tokens(0, 20, width=31)).code_bytes == 36 * (2 + 16)


def test_odd_widths_and_single_vectors() -> None:
    for shape in ((36, 31), (31,)):
        tokens = smooth_tokens(0, 80, width=31)[:, 0] if len(shape) == 1 else smooth_tokens(0, 80, width=31)
        codec = fit_codec("int4", tokens)
        decoded = codec.decode(codec.encode(tokens))
        assert decoded.shape == tokens.shape
        assert float((decoded - tokens).square().mean() / (tokens - tokens.mean(0)).square().mean()) < 0.02


def test_an_overflow_costs_its_own_token_no_more_than_itself_and_is_counted(codec: Codec) -> None:
    tokens = smooth_tokens(3, 4)
    broken = tokens.clone()
    broken[1, 7, 3] = -500.0

    before, after = codec.encode(tokens), codec.encode(broken)

    assert codec.widened(before).tolist() == [0, 0, 0, 0]
    assert codec.widened(after).tolist() == [0, 1, 0, 0]
    decoded, other = codec.decode(after), codec.decode(before)
    error = float((decoded[1, 7] - broken[1, 7]).square().sum())
    assert error < 500**2  # clipping it at its old gain would cost more
    others = torch.ones(4, 36, dtype=torch.bool)
    others[1, 7] = False
    assert torch.equal(decoded[others], other[others])


@pytest.mark.parametrize("value", [60_000.0, -60_000.0, 500.0])
def test_a_value_in_a_channel_that_was_constant_stays_finite_and_is_counted(value: float) -> None:
    tokens = smooth_tokens(0, 200)
    tokens[..., 5] = -500.0
    codec = fit_codec("int4", tokens)
    moved = smooth_tokens(1, 2)
    moved[..., 5] = -500.0
    moved[0, 3, 5] = value

    codes = codec.encode(moved)

    assert bool(torch.isfinite(codec.decode(codes)).all())
    assert codec.widened(codes).tolist() == [1, 0]


def test_a_channel_that_hardly_varies_costs_the_others_nothing() -> None:
    tokens = smooth_tokens(0, 300)
    tokens[..., 5] = 7.0
    codec = fit_codec("int4", tokens)

    decoded = codec.decode(codec.encode(tokens))

    assert torch.allclose(decoded[..., 5], torch.tensor(7.0), atol=1e-2)
    assert snr_db(tokens, decoded) > 19.5


def test_parameters_come_back_and_rows_may_begin_at_an_odd_byte(codec: Codec) -> None:
    blob = codec.parameters_blob()
    again = load_codec(codec.record(), codec.shape, blob)
    codes = codec.encode(smooth_tokens(4, 3))
    padded = torch.nn.functional.pad(codes, (1, 2))

    assert again.record() == codec.record()
    for row in range(3):
        found = again.decode(padded[row : row + 1, 1:-2])
        assert torch.equal(found, codec.decode(codes)[row : row + 1])


def test_damaged_parameters_and_codes_are_refused(codec: Codec) -> None:
    blob, record = codec.parameters_blob(), codec.record()
    assert blob is not None
    damaged = bytearray(blob)
    damaged[-1] ^= 1
    with pytest.raises(ChecksumError, match="damaged"):
        load_codec(record, codec.shape, bytes(damaged))
    with pytest.raises(FormatError, match="not"):
        load_codec(record, (36, 30), blob)
    with pytest.raises(FormatError, match="layout 2"):
        load_codec(record.model_copy(update={"layout": 2}), codec.shape, blob)
    with pytest.raises(FormatError, match="cut short"):
        codec.decode(codec.encode(smooth_tokens(4, 2))[:, :-1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (smooth_tokens(0, 1), "64 are needed and there are 36"),
        (torch.ones(20, 16, 8), "the same"),
        (torch.full((20, 16, 8), torch.nan), "view 0 of the 20"),
    ],
)
def test_calibration_views_that_teach_nothing_are_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_codec("int4", tokens)


def test_report_survives_its_tensor() -> None:
    report = CalibrationReport(
        n_views=3,
        n_tokens=5,
        snr_db=20.5,
        bits_per_value=4.1,
        gap_bits=0.7,
        n_kept=8,
        width=9,
        dct=True,
        dct_saves_bits=0.1,
        transform_bound_excess_bits=0.01,
    )
    assert CalibrationReport.from_tensor(report.to_tensor()) == report
    assert not report.is_enough
