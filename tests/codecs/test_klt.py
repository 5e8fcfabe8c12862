"""klt: bytes, goals, slope, masks, and what outliers cost."""

import hashlib
import math
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.codecs import fit_codec, load_codec
from proteus_cache.codecs.bits import packed_bytes
from proteus_cache.codecs.calibration import N_NUMBERS
from proteus_cache.codecs.codec import Codec
from proteus_cache.codecs.klt import KltCodec, gain_table
from proteus_cache.codecs.names import codec_for_target, parse_codec
from proteus_cache.codecs.waterfill import gaussian_rate
from proteus_cache.errors import ConfigError, FormatError
from tests.codecs.fields import slopes, smooth_tokens, snr_db, white_tokens


@pytest.fixture(scope="module")
def codec() -> KltCodec:
    """With a DCT and a token in front."""
    fitted = fit_codec("klt:20dB", smooth_tokens(0, 600, n_lead=1))
    assert isinstance(fitted, KltCodec)
    return fitted


def _decode_by_the_book(codec: KltCodec, codes: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens in front and components of one view, read as docs/codecs.md says, in plain Python."""
    width, n, side = codec.width, codec.n_places, codec.side
    lead = codes[: codec.lead_bytes].view("<f2").astype(np.float64).reshape(codec.n_lead, width)
    place = codec.lead_bytes

    def integers(count: int, bits: int) -> list[int]:
        nonlocal place
        values = [0] * count
        for field in (w for w in (8, 4, 2, 1) if bits & w):
            size = -(-count * field // 8)
            data = codes[place : place + size]
            for index in range(count):
                value = int(data[index % size]) >> (index // size * field) & ((1 << field) - 1)
                values[index] = values[index] << field | value
            place += size
        return values

    gains = np.array([2.0 ** (i / 4 - 3) for i in range(24)] + [2.0**o for o in (0, 1, 2, 3, 5, 8, 13, 24)])
    gain = gains[integers(n, 5)]
    bits = np.broadcast_to(codec.bits.numpy(), (codec.n_kept, n))
    scale = np.broadcast_to(codec.scale.numpy().astype(np.float64), (codec.n_kept, n))
    planes = np.zeros((codec.n_kept, n))
    levels, first = codec.levels.numpy().astype(np.float64), 0
    for b in range(8, 0, -1):
        where = np.argwhere(bits == b)
        table = {k: first + t * 2**b for t, k in enumerate(dict.fromkeys(where[:, 0].tolist()))}
        for (k, f), q in zip(where.tolist(), integers(len(where), b) if len(where) else [], strict=True):
            planes[k, f] = gain[f] * scale[k, f] * levels[table[k] + q]
        first += len(table) * 2**b
    assert place == len(codes)
    if codec.has_dct:
        u = np.arange(side)
        matrix = np.cos(np.pi * (2 * u + 1) * u[:, None] / (2 * side)) * np.sqrt(np.where(u == 0, 1, 2) / side)[:, None]
        planes = np.einsum("ui,vj,kuv->kij", matrix, matrix, planes.reshape(-1, side, side)).reshape(-1, n)
    return lead, planes.T


@pytest.mark.parametrize("with_dct", [True, False])
def test_codes_decode_as_documented(codec: KltCodec, with_dct: bool) -> None:
    tokens = smooth_tokens(1, 2, n_lead=1)
    if not with_dct:
        tokens = white_tokens(1, 300, 17, 24) * torch.linspace(3, 0.1, 24)
        other = fit_codec("klt:12dB", tokens)
        assert isinstance(other, KltCodec)
        codec, tokens = other, tokens[:2]
    assert codec.has_dct == with_dct
    codes = codec.encode(tokens)

    lead, components = _decode_by_the_book(codec, codes[0].numpy())

    found_lead, found = codec.components(codes)
    np.testing.assert_array_equal(found_lead[0].numpy(), lead)
    np.testing.assert_allclose(found[0].numpy(), components, atol=1e-4)
    np.testing.assert_array_equal(lead, tokens[0, :1].half().double().numpy())
    expected = codec.mean.numpy() + components @ codec.vectors.numpy().T
    np.testing.assert_allclose(codec.decode(codes)[0, 1:].numpy(), expected, atol=1e-4)


def test_golden_codes() -> None:
    quarter = math.sqrt(0.5)
    codec = KltCodec(
        "klt:9dB",
        (4, 2),
        {
            "mean": torch.tensor([1.0, -1.0]),
            "vectors": torch.tensor([[quarter, quarter], [quarter, -quarter]]),
            "scale": torch.tensor([[4.0], [2.0]]),
            "bits": torch.tensor([[3], [1]], dtype=torch.uint8),
            "levels": torch.tensor([-4.0, -3, -2, -1, 1, 2, 3, 4, -0.5, 0.5]),
            "thresholds": torch.tensor([-3.5, -2.5, -1.5, 0, 1.5, 2.5, 3.5, 0]),
            "stretch": torch.ones(2),
            "low": torch.tensor([-9.0, -9.0]),
            "high": torch.tensor([9.0, 9.0]),
            "gains": gain_table(),
            "calibration": torch.zeros(N_NUMBERS, dtype=torch.float64),
        },
    )
    # Gains 12, 16, 8, 25 (1, 2, 0.5 and a coarse 2): high four bits 6 8 4 12, low bits 0 0 0 1. Levels of component 0:
    # 7 0 4 3, high bits 3 0 2 1 and low bits 1 0 0 1. Levels of component 1: 1 0 1 0.
    codes = torch.tensor([[6 | 4 << 4, 8 | 12 << 4, 8, 3 | 0 << 2 | 2 << 4 | 1 << 6, 9, 5]], dtype=torch.uint8)

    _, components = codec.components(codes)

    assert codec.code_bytes == 6
    assert components[0].tolist() == [[16, 1], [-32, -2], [2, 0.5], [-8, -2]]
    assert codec.widened(codes).tolist() == [1]
    assert codec.decode(codes)[0, 0].tolist() == pytest.approx([1 + 17 * quarter, -1 + 15 * quarter], rel=1e-6)


@pytest.mark.parametrize("goal", [10.0, 20.0, 30.0])
def test_a_goal_in_db_is_reached_on_other_views(goal: float) -> None:
    codec = fit_codec(f"klt:{goal:g}dB", smooth_tokens(0, 600))
    held_out = smooth_tokens(9, 400)

    assert snr_db(held_out, codec.decode(codec.encode(held_out))) == pytest.approx(goal, abs=0.3)
    assert codec.name == f"klt:{goal:g}dB"


@pytest.mark.parametrize("kilobytes", [0.1, 0.25, 0.6])
def test_a_goal_in_bytes_is_kept_and_used(kilobytes: float) -> None:
    codec = fit_codec(f"klt:{kilobytes:g}KB", smooth_tokens(0, 600, n_lead=1))

    patch_bytes = codec.code_bytes - 2 * 32
    assert 0.9 * kilobytes * 1000 < patch_bytes <= kilobytes * 1000
    assert codec.calibration is not None
    assert codec.calibration.bits_per_value == pytest.approx(8 * patch_bytes / (36 * 32))


def test_dct_is_on_where_patches_are_alike_and_off_where_they_are_not(codec: KltCodec) -> None:
    assert codec.calibration is not None
    assert codec.has_dct
    assert codec.calibration.dct_saves_bits > 0.05
    white = fit_codec("klt:15dB", white_tokens(0, 300, 36, 24))
    assert isinstance(white, KltCodec)
    assert not white.has_dct
    assert white.calibration is not None
    assert white.calibration.dct_saves_bits < 0.05


def test_kept_components_are_unbiased_and_the_others_are_left_out(codec: KltCodec) -> None:
    held_out = smooth_tokens(2, 800, n_lead=1)
    codes = codec.encode(held_out)

    _, decoded = codec.components(codes)

    basis = codec.basis
    original = (held_out[:, 1:] - basis.mean) @ basis.vectors
    assert 0 < codec.n_kept < 32
    assert float((slopes(original, decoded) - 1).abs().max()) < 0.03  # 800 views
    assert float((slopes(original, decoded) - 1).mean().abs()) < 5e-3
    back = (codec.decode(codes)[:, 1:] - basis.mean) @ basis.vectors
    torch.testing.assert_close(back, decoded, atol=1e-3, rtol=1e-4)
    projector = basis.vectors @ basis.vectors.T
    left = codec.decode(codes)[:, 1:] - basis.mean
    torch.testing.assert_close(left @ projector, left, atol=1e-3, rtol=1e-4)


def test_rate_is_near_the_gaussian_bound(codec: KltCodec) -> None:
    report = codec.calibration
    assert report is not None
    held_out = smooth_tokens(3, 600, n_lead=1)
    centred = held_out[:, 1:] - codec.mean
    all_directions = torch.linalg.eigh(torch.cov(centred.reshape(-1, 32).T))[1]
    planes = (centred @ all_directions).transpose(1, 2)
    side = codec.side
    u = torch.arange(side)
    matrix = torch.cos(torch.pi * (2 * u + 1) * u.unsqueeze(1) / (2 * side)) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    spectrum = matrix @ planes.reshape(600, 32, side, side) @ matrix.T
    variances = spectrum.double().square().mean(dim=0)
    error = float((codec.decode(codec.encode(held_out))[:, 1:] - held_out[:, 1:]).double().square().mean())
    gap = report.bits_per_value - gaussian_rate(variances, error)
    assert 0 < gap < 0.9
    assert report.gap_bits == pytest.approx(gap, abs=0.1)


def test_an_overflow_widens_its_own_view_and_is_counted(codec: KltCodec) -> None:
    tokens = smooth_tokens(4, 5, n_lead=1)
    broken = tokens.clone()
    broken[2, 10, 4] = -500.0

    before, after = codec.encode(tokens), codec.encode(broken)

    widened = codec.widened(after)
    assert int(widened[2]) > int(codec.widened(before)[2])
    assert bool(torch.isfinite(codec.decode(after)).all())
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], before[others])


def test_a_planted_channel_and_a_cluster_cost_only_what_they_add() -> None:
    tokens = smooth_tokens(0, 400)
    plain = fit_codec("klt:20dB", tokens)
    planted = tokens.clone()
    planted[..., 3] = -500 + 0.01 * white_tokens(8, 400, 36, 1)[..., 0]
    far = torch.from_numpy(np.random.default_rng(3).random((400, 36)) < 0.02)
    clustered = tokens.clone()
    clustered[far] = torch.linspace(-30, 30, 32) + 0.1 * white_tokens(7, 1, int(far.sum()), 32)[0]

    for changed in (planted, clustered):
        codec = fit_codec("klt:20dB", changed)
        assert snr_db(changed, codec.decode(codec.encode(changed))) > 19.7
        assert codec.code_bytes <= 1.1 * plain.code_bytes
    # The cluster is one direction with two values: its tokens come out close, whatever the others do.
    decoded = codec.decode(codec.encode(clustered))
    energy = clustered[far].square().sum(dim=1)
    assert float(((decoded - clustered)[far].square().sum(dim=1) / energy).mean()) < 0.02


def test_values_beyond_every_fine_gain_are_held(codec: KltCodec) -> None:
    tokens = smooth_tokens(5, 2, n_lead=1) * 1000

    codes = codec.encode(tokens)

    assert codec.widened(codes).tolist() == [36, 36]
    size = codec.decode(codes)[:, 1:].square().mean() / tokens[:, 1:].square().mean()
    assert 0.2 < float(size) < 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("klt:70dB", r"cannot be reached.*ask for klt:4[0-9](\.[0-9])?dB"),
        ("klt:0.01dB", "too little for a single component; the smallest are klt:"),
        ("klt:64KB", r"the largest is klt:1\.[0-9]+KB"),
        ("klt:0.001KB", "too little for a single component"),
    ],
)
def test_goals_that_cannot_be_met_name_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_codec(name, smooth_tokens(0, 100))


@pytest.mark.parametrize("name", ["klt:70dB", "klt:0.5dB", "klt:64KB", "klt:0.02KB", "klt:0.03KB", "klt:5.5dB"])
def test_what_a_refusal_names_can_be_had(name: str) -> None:
    tokens = smooth_tokens(0, 300)
    try:
        fit_codec(name, tokens)
    except ConfigError as error:
        nearest = re.findall(r"klt:[0-9.]+(?:dB|KB)", str(error))[1:]
        assert nearest
        for other in nearest:
            fit_codec(other, tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (smooth_tokens(0, 3), "128 are needed and there are 108"),
        (torch.ones(20, 16, 8), "the same"),
        (torch.full((20, 16, 8), torch.inf), "view 0 of the 20"),
        (white_tokens(0, 200, 4, 8)[:, 0], "tokens of patches"),
        (torch.cat((white_tokens(0, 200, 1, 8), torch.ones(200, 16, 8)), dim=1), "patches of all .* the same"),
    ],
)
def test_calibration_views_that_teach_nothing_are_refused(tokens: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_codec("klt:20dB", tokens)


def test_parameters_come_back_and_rows_may_begin_at_an_odd_byte(codec: KltCodec) -> None:
    again = load_codec(codec.record(), codec.shape, codec.parameters_blob())
    codes = codec.encode(smooth_tokens(6, 3, n_lead=1))
    padded = torch.nn.functional.pad(codes, (1, 2))

    assert again.calibration == codec.calibration
    for row in range(3):
        found = again.decode(padded[row : row + 1, 1:-2])
        torch.testing.assert_close(found, codec.decode(codes)[row : row + 1], atol=1e-5, rtol=1e-5)


def test_integers_do_not_depend_on_threads(codec: KltCodec) -> None:
    codes = codec.encode(smooth_tokens(6, 40, n_lead=1))[:, codec.lead_bytes :]
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = codec.integers(codes)
        torch.set_num_threads(2)
        two = codec.integers(codes)
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert sum(part.shape[1] for part in one) == codec.n_kept * codec.n_places
    assert codec.code_bytes == codec.lead_bytes + packed_bytes(36, 5) + sum(
        packed_bytes(part.shape[1], group.bits) for part, group in zip(one, codec._groups, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "int4", "klt:20dB"])
def test_a_gpu_reads_the_same_integers(name: str) -> None:
    tokens = smooth_tokens(0, 600, n_lead=1)
    codec: Codec = fit_codec(name, tokens)
    codes = codec.encode(tokens[:64])
    here = codec.decode(codes)
    whole = None if not isinstance(codec, KltCodec) else codec.integers(codes[:, codec.lead_bytes :])

    codec = codec.to("cuda")

    there = codec.decode(codes.cuda()).cpu()
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-5)
    if whole is not None:
        assert isinstance(codec, KltCodec)
        on_gpu = codec.integers(codes[:, codec.lead_bytes :].cuda())
        assert all(torch.equal(a, b.cpu()) for a, b in zip(whole, on_gpu, strict=True))


def test_codes_that_were_cut_short_and_foreign_parameters_are_refused(codec: KltCodec) -> None:
    codes = codec.encode(smooth_tokens(6, 2, n_lead=1))
    for part in (codes[:, :-1], codes[:, :0], codes.float()):
        with pytest.raises(FormatError, match="bytes of codes"):
            codec.decode(part)
    with pytest.raises(FormatError, match="bits for 36 places, and a view has 25"):
        load_codec(codec.record(), (26, 32), codec.parameters_blob())
    for key, value in (
        ("bits", codec.bits.clone().fill_(9)),
        ("levels", codec.levels[:-1]),
        ("scale", -codec.scale),
        ("mean", torch.full_like(codec.mean, torch.nan)),
        ("low", codec.low[1:]),
        ("levels", codec.levels.reshape(2, -1)),
        ("scale", codec.scale.double()),
        ("calibration", torch.zeros(N_NUMBERS, dtype=torch.complex64)),
        ("gains", codec.gains.flip(0)),
    ):
        with pytest.raises(FormatError, match="codec klt:20dB"):
            KltCodec(codec.name, codec.shape, codec.parameters_of() | {key: value})


def test_a_blob_that_is_no_safetensors_file_is_refused(codec: KltCodec) -> None:
    blob = b"x" * 100
    record = codec.record().model_copy(update={"parameters": hashlib.sha256(blob).hexdigest()})
    with pytest.raises(FormatError, match="not a safetensors file"):
        load_codec(record, codec.shape, blob)


def test_autocast_changes_nothing(codec: KltCodec) -> None:
    tokens = smooth_tokens(6, 3, n_lead=1)
    codes = codec.encode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(tokens), codes)
        within = (codec.decode(codes), *codec.components(codes))
    for found, expected in zip(within, (codec.decode(codes), *codec.components(codes)), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_names() -> None:
    assert parse_codec("KLT:20.50db").name == "klt:20.5dB"
    assert parse_codec("klt:64kb").goal_bytes == 64_000
    assert codec_for_target("klt:64KB", "cls") == "float16"
    assert codec_for_target("klt:20.0dB", "block.3") == "klt:20dB"
    for wrong in ("klt", "klt:", "klt:0dB", "klt:20", "klt:1e3dB", "klt:99999dB", "klt:0.004dB", "int16"):
        with pytest.raises(ConfigError, match="codec"):
            parse_codec(wrong)
