"""Every number of a stream against the same number computed plainly, with numpy, from all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.codecs.codec import Codec, fit_codec
from proteus_cache.fidelity.sides import Entry
from proteus_cache.fidelity.spread import SpreadMeter
from proteus_cache.fidelity.stream import Fidelity, StreamMeter, streams_of
from proteus_cache.fidelity.verdict import judge

N_VIEWS, SIDE, WIDTH = 96, 4, 24


def make_tokens(n_lead: int = 0, seed: int = 0) -> Tensor:
    """(96, 16 or 17, 24) correlated tokens far from zero, with components of very different spread."""
    shape, rng = np.random.default_rng(99), np.random.default_rng(seed)
    mixing = np.linalg.qr(shape.normal(size=(WIDTH, WIDTH)))[0] * np.geomspace(4, 0.1, WIDTH)[:, None]
    tokens = rng.normal(size=(N_VIEWS, SIDE**2 + n_lead, WIDTH)) @ mixing
    return torch.from_numpy((tokens + 30 * shape.normal(size=WIDTH)).astype(np.float32))


def entries_of(n: int) -> list[Entry]:
    return [Entry(f"key_{number}", "0" * 16, None, "v000", 0, number) for number in range(n)]


def measure(target: str, codec: Codec, exact: Tensor, batch: int = 7) -> list[Fidelity]:
    """All streams of a target, taken in in batches."""
    found = []
    entries = entries_of(len(exact))
    for stream in streams_of(target, codec):
        spread = SpreadMeter()
        for part in torch.split(exact, batch):
            spread.add(stream.of(part).flatten(0, 1))
        images = {entry.key: entry.number for entry in entries}
        meter = StreamMeter(stream, spread.finish(), images, torch.device("cpu"))
        for first in range(0, len(exact), batch):
            part = exact[first : first + batch]
            codes = codec.encode(part.clone())
            meter.add(part, codec.decode(codes), codes, entries[first : first + batch])
        found.append(meter.finish())
    return found


@pytest.fixture(params=["int8", "int4", "klt:14dB"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return fit_codec(request.param, make_tokens(seed=1))


def arrays(codec: Codec, exact: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, D) exact tokens about their mean, and errors."""
    decoded = codec.decode(codec.encode(exact.clone()))
    y = exact.double().numpy().reshape(-1, WIDTH)
    e = (decoded.double() - exact.double()).numpy().reshape(-1, WIDTH)
    return y - y.mean(axis=0), e


def test_numbers_worked_out_by_hand() -> None:
    exact = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 2.0], [0.0, -2.0]]])
    decoded = torch.tensor([[[1.1, 0.0], [-1.1, 0.0]], [[0.0, 2.0], [0.1, -2.0]]])
    (stream,) = streams_of("patch", fit_codec("float32", exact))
    spread = SpreadMeter()
    spread.add(exact.flatten(0, 1))
    meter = StreamMeter(stream, spread.finish(), {"key_0": 0, "key_1": 1}, torch.device("cpu"))

    meter.add(exact, decoded, torch.zeros(2, 16, dtype=torch.uint8), entries_of(2))

    found = meter.finish()
    assert found.relative_error == pytest.approx(0.03 / 10)
    assert found.snr_db == pytest.approx(25.2288, abs=1e-4)
    assert found.channels.slope.tolist() == pytest.approx([1.1, 1.0])
    assert found.channels.relative_error.tolist() == pytest.approx([0.03 / 2, 0.0])
    assert found.channels.mean_error.tolist() == pytest.approx([0.1 / 4 / 0.5**0.5, 0.0])
    assert found.channels.pooled_slope is not None
    assert found.channels.pooled_slope.value == pytest.approx(1.02)
    assert found.tokens.worst is not None
    assert (found.tokens.worst.key, found.tokens.worst.token) == ("key_0", 0)
    assert found.tokens.worst.relative_error == pytest.approx(0.01)
    assert found.tokens.cosine_mean == pytest.approx((3 + 2 / 4.01**0.5) / 4)
    assert found.rate.bits_per_value == 32
    # Variances 1/2 and 2, error 0.03 / 8 a value: log2(1/2 / 0.00375) / 4 + log2(2 / 0.00375) / 4.
    assert found.rate.bound == pytest.approx(4.029446, abs=1e-5)
    assert found.loss.noise_floor == pytest.approx(0.03 / 8)


def test_distortion_cosines_and_worst_token_are_those_of_numpy(codec: Codec) -> None:
    exact = make_tokens()
    z, e = arrays(codec, exact)
    y = exact.double().numpy().reshape(-1, WIDTH)
    ratio = (e**2).sum(axis=1) / (z**2).sum(axis=1)
    cosine = (y * (y + e)).sum(axis=1) / np.linalg.norm(y, axis=1) / np.linalg.norm(y + e, axis=1)
    centred = (z * (z + e)).sum(axis=1) / np.linalg.norm(z, axis=1) / np.linalg.norm(z + e, axis=1)

    (found,) = measure("patch", codec, exact)

    assert found.snr_db == pytest.approx(-10 * np.log10((e**2).sum() / (z**2).sum()), abs=1e-4)
    tokens = found.tokens
    assert tokens.worst is not None
    assert tokens.worst.relative_error == pytest.approx(ratio.max(), rel=1e-4)
    place = int(ratio.argmax())
    assert (tokens.worst.key, tokens.worst.token) == (f"key_{place // SIDE**2}", place % SIDE**2)
    assert tokens.relative_error_p999 == pytest.approx(np.percentile(ratio, 99.9), rel=1e-4)
    assert (tokens.cosine_mean, tokens.cosine_p1) == pytest.approx((cosine.mean(), np.percentile(cosine, 1)), abs=1e-7)
    assert (tokens.centred_cosine_mean, tokens.centred_cosine_p1) == pytest.approx(
        (centred.mean(), np.percentile(centred, 1)), abs=1e-6
    )


def test_channels_are_those_of_numpy(codec: Codec) -> None:
    exact = make_tokens()
    z, e = arrays(codec, exact)

    (found,) = measure("patch", codec, exact)

    np.testing.assert_allclose(found.channels.relative_error, (e**2).sum(axis=0) / (z**2).sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.channels.slope, 1 + (z * e).sum(axis=0) / (z**2).sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.channels.mean_error, e.mean(axis=0) / z.std(axis=0), atol=1e-5)


def test_components_are_those_of_numpy_along_what_the_codec_keeps_or_the_klt(codec: Codec) -> None:
    exact = make_tokens()
    z, e = arrays(codec, exact)
    vectors = np.linalg.eigh(z.T @ z / len(z)).eigenvectors
    axes = vectors[:, ::-1] if codec.basis is None else codec.basis.vectors.double().numpy()
    zk, ek = z @ axes, e @ axes

    (found,) = measure("patch", codec, exact)

    slope = 1 + (zk * ek).sum(axis=0) / (zk**2).sum(axis=0)
    assert found.components is not None
    np.testing.assert_allclose(found.components.slope, slope, atol=1e-4)
    np.testing.assert_allclose(found.components.relative_error, (ek**2).sum(axis=0) / (zk**2).sum(axis=0), rtol=2e-3)
    assert found.loss.noise_floor == pytest.approx((ek**2).sum() / z.size, rel=1e-4)
    assert found.loss.n_kept == axes.shape[1]
    assert found.loss.dropped_share == pytest.approx(1 - (zk**2).sum() / (z**2).sum(), abs=1e-6)


def test_binned_errors_are_those_of_numpy(codec: Codec) -> None:
    exact = make_tokens()
    z, e = arrays(codec, exact)
    axes = np.eye(WIDTH) if codec.basis is None else codec.basis.vectors.double().numpy()
    sd = (z @ axes).std(axis=0)
    values, errors = ((part @ axes) / sd for part in (z, e))
    edges = np.linspace(-4, 4, 41)[1:-1]
    bins = np.digitize(values, edges)

    (found,) = measure("patch", codec, exact)

    assert sum(found.conditional.counts) == values.size
    full = [number for number in range(40) if found.conditional.counts[number] > 200]
    assert full
    for number in full:
        chosen = errors[bins == number]
        assert found.conditional.counts[number] == pytest.approx(len(chosen), abs=2)  # values on an edge
        assert found.conditional.mean_errors[number] == pytest.approx(chosen.mean(), abs=2e-3)


def test_a_standard_error_is_that_of_slopes_over_images() -> None:
    codec = fit_codec("int4", make_tokens(seed=1))
    exact = make_tokens()
    z, e = (part.reshape(N_VIEWS, -1, WIDTH) for part in arrays(codec, exact))
    zz, ze = (z**2).sum(axis=1), (z * e).sum(axis=1)
    left_out = 1 + (ze.sum(axis=0) - ze) / (zz.sum(axis=0) - zz)  # the jackknife: another way to the same number
    expected = np.sqrt((N_VIEWS - 1) / N_VIEWS * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))

    (found,) = measure("patch", codec, exact)

    assert found.channels.slope_error is not None
    np.testing.assert_allclose(found.channels.slope_error, expected, rtol=0.35)
    assert float(np.mean(found.channels.slope_error.numpy() / expected)) == pytest.approx(1, abs=0.12)


def test_the_bound_is_reverse_water_filling_over_the_covariance() -> None:
    codec = fit_codec("klt:14dB", make_tokens(seed=1))
    exact = make_tokens()
    z, e = arrays(codec, exact)
    variances = np.linalg.eigvalsh(z.T @ z / len(z))
    distortion = (e**2).mean()
    levels = np.geomspace(variances.min() / 10, variances.max(), 200_001)
    level = levels[np.argmin(np.abs(np.minimum(variances, levels[:, None]).mean(axis=1) - distortion))]
    bound = np.maximum(0, 0.5 * np.log2(variances / level)).mean()

    (found,) = measure("patch", codec, exact)

    assert found.rate.bound == pytest.approx(bound, abs=1e-3)
    assert found.rate.bits_per_value == 8 * codec.code_bytes / (SIDE**2 * WIDTH)
    assert found.rate.gap == pytest.approx(found.rate.bits_per_value - bound, abs=1e-3)
    # Its own transform is nearly the best one: fitted to other tokens of the same kind.
    assert found.rate.own_bound == pytest.approx(bound, abs=0.1)
    assert found.rate.own_bound is not None
    assert found.rate.own_bound >= bound - 1e-3


def test_with_a_dct_the_own_bound_is_that_of_components_at_frequencies() -> None:
    def smooth(seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        falling = 1 / (1 + np.add.outer(np.arange(SIDE), np.arange(SIDE))) ** 2  # most variance at low frequencies
        coefficients = rng.normal(size=(4 * N_VIEWS, SIDE, SIDE, 8)) * falling[:, :, None] * np.geomspace(3, 1, 8)
        places = np.einsum("fx,nfgc,gy->nxyc", dct, coefficients, dct)
        return torch.from_numpy(places.reshape(4 * N_VIEWS, SIDE**2, 8).astype(np.float32))

    place = np.arange(SIDE)
    dct = np.cos(np.pi * np.outer(place, 2 * place + 1) / (2 * SIDE)) * np.sqrt(2 / SIDE)
    dct[0] /= np.sqrt(2)
    codec, exact = fit_codec("klt:17dB", smooth(1)), smooth(0)
    assert codec.calibration is not None
    assert codec.calibration.dct
    assert codec.basis is not None
    assert codec.basis.vectors.shape[1] == 8  # all are kept, so the transform is known
    y = (exact.double().numpy() - codec.basis.mean.double().numpy()) @ codec.basis.vectors.double().numpy()
    coefficients = np.einsum("fx,nxyc,gy->nfgc", dct, y.reshape(-1, SIDE, SIDE, 8), dct)
    variances = (coefficients**2).mean(axis=0).reshape(-1)
    distortion = float((codec.decode(codec.encode(exact.clone())) - exact).double().square().mean())
    levels = np.geomspace(variances.min() / 10, variances.max(), 200_001)
    level = levels[np.argmin(np.abs(np.minimum(variances, levels[:, None]).mean(axis=1) - distortion))]

    (found,) = measure("patch", codec, exact)

    own = np.maximum(0, 0.5 * np.log2(variances / level)).mean()
    assert found.rate.own_bound == pytest.approx(own, abs=1e-3)
    assert found.rate.bound is not None
    assert found.rate.bound > own + 0.05  # the covariance over channels alone knows nothing of neighbours


def test_the_tokens_in_front_of_a_block_are_a_stream_of_their_own() -> None:
    codec = fit_codec("klt:14dB", make_tokens(n_lead=1, seed=1))
    exact = make_tokens(n_lead=1)

    lead, patches = measure("block.3", codec, exact)

    assert (lead.stream.name, patches.stream.name) == ("block.3 cls", "block.3 patch")
    assert lead.rate.bits_per_value == 16
    front = exact[:, 0].double().numpy()
    rounding = exact[:, 0].half().double().numpy() - front  # whole, as float16
    expected = (rounding**2).sum() / ((front - front.mean(axis=0)) ** 2).sum()
    assert lead.relative_error == pytest.approx(expected, rel=1e-4)
    assert patches.snr_db == pytest.approx(14, abs=1)
    assert lead.stream.code_bytes + patches.stream.code_bytes == codec.code_bytes
    assert patches.tokens.worst is not None
    assert patches.tokens.worst.token >= 1


def test_a_channel_without_variance_is_left_out_and_counted() -> None:
    exact = make_tokens()
    exact[:, :, 5] = 3.0
    codec = fit_codec("int8", exact)

    (found,) = measure("patch", codec, exact)

    assert found.channels.n_constant == 1
    assert float(found.channels.relative_error[5]) == 0
    assert float(found.channels.slope[5]) == 1
    assert torch.isfinite(found.channels.mean_error).all()


def test_equal_tokens_are_exact() -> None:
    exact = make_tokens()

    (found,) = measure("patch", fit_codec("float32", exact), exact)

    assert found.snr_db is None
    assert found.relative_error == 0
    assert found.tokens.worst is not None
    assert found.tokens.worst.relative_error == 0
    assert found.tokens.cosine_p1 == pytest.approx(1)
    assert found.rate.bound is None
    assert torch.equal(found.channels.slope, torch.ones(WIDTH))


@pytest.mark.parametrize("n_views", [1, 40])
def test_an_error_of_tokens_that_are_all_the_same_is_not_called_exact(n_views: int) -> None:
    exact = torch.full((n_views, 24), 1.0001)

    (found,) = measure("cls", fit_codec("float16", exact), exact)
    verdict = judge(found)

    assert found.relative_error == float("inf")
    assert found.snr_db is None
    assert found.snr_error_db == 0
    assert verdict.is_good is None
    assert verdict.reasons == ("all exact tokens are the same, so there is nothing to compare the error with",)


def test_batches_do_not_matter(codec: Codec) -> None:
    exact = make_tokens()

    (small,), (large,) = (measure("patch", codec, exact, batch) for batch in (3, N_VIEWS))

    assert small.relative_error == pytest.approx(large.relative_error, rel=1e-6)
    torch.testing.assert_close(small.judged.slope, large.judged.slope, atol=1e-5, rtol=0)
    assert small.n_widened == large.n_widened


def test_an_overflow_is_counted() -> None:
    codec = fit_codec("klt:14dB", make_tokens(seed=1))
    exact = make_tokens()
    exact[5, 3] += 4000.0

    (usual,), (found,) = measure("patch", codec, make_tokens()), measure("patch", codec, exact)

    assert found.n_widened > usual.n_widened
    assert found.n_widened_views >= 1


@pytest.mark.parametrize(("name", "n_lead_widened"), [("int4", 1), ("klt:14dB", 0)])
@pytest.mark.parametrize("token", [0, 4])
def test_an_overflow_counts_for_the_stream_that_it_is_in(name: str, n_lead_widened: int, token: int) -> None:
    exact = make_tokens(n_lead=1)
    codec = fit_codec(name, make_tokens(n_lead=1, seed=1))
    usual = measure("block.3", codec, exact)
    exact[5, token, 3] += 4000.0

    lead, patches = measure("block.3", codec, exact)

    n = n_lead_widened if token == 0 else 0
    assert lead.n_widened - usual[0].n_widened == n
    assert lead.n_widened_views - usual[0].n_widened_views == n
    if token == 0:
        assert patches.n_widened == usual[1].n_widened
    else:
        assert patches.n_widened > usual[1].n_widened
    whole = codec.widened(codec.encode(exact))
    assert lead.n_widened + patches.n_widened == int(whole.sum())
