"""Fitting `klt`: moments, transform, bits, tables, and whether the DCT pays; all on calibration views.

Every eighth view takes no part in the fit: what it shows of the error decides how many bits a goal in dB needs and
whether the DCT is on, and is what the plan reports. Moments come from all other views, tables from as many of them as
hold 100,000 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from proteus_cache.codecs.calibration import (
    ENOUGH_TOKENS,
    CalibrationReport,
    expected_excess_bits,
)
from proteus_cache.codecs.dct import bands, dct_matrix, to_frequencies
from proteus_cache.codecs.klt import KltCodec, code_bytes_of, gain_table, grid_of
from proteus_cache.codecs.klt_tables import CalibrationViews, KltFit, fit_tables
from proteus_cache.codecs.names import CodecChoice
from proteus_cache.codecs.waterfill import MAX_BITS, allocate, gaussian_rate, price_for_error, price_for_rate
from proteus_cache.errors import ConfigError

DCT_MUST_SAVE = 0.05
"""Bits a value."""
TOLERANCE_DB = 0.3
_CLOSE_DB = 0.03
_TRIES = 6
_BYTE_STEPS = 64
_TOKENS_AT_ONCE = 1 << 14
_TOKENS_FOR_TRIES = 1 << 14
_NULL = 1e-10
"""Of the largest variance: a direction that the tokens do not use (a final LayerNorm leaves one)."""
_PRIOR_VIEWS = 16
"""Weight of a band's mean variance beside a coefficient's own."""


def fit_klt(choice: CodecChoice, tokens: Tensor, device: str | torch.device = "cpu") -> KltCodec:
    """A codec that meets a goal on tokens like these.

    Args:
        choice: with a goal.
        tokens: (n, T, D) float of calibration views.
        device: where to compute.

    Raises:
        ConfigError: no choice of bits reaches the goal; the message names the nearest that can be had.
    """
    if tokens.dim() != 3:
        raise ConfigError(
            f"codec {choice.name}: codes tokens of patches, not tokens of shape {tuple(tokens.shape[1:])}"
        )
    n_views, n_tokens, width = tokens.shape
    n_lead, side = grid_of(n_tokens)
    patches = tokens[:, n_lead:]
    is_test = torch.arange(n_views) % 8 == 7
    if not bool(is_test.any()):
        is_test[-1] = True
    fitted = patches[~is_test] if n_views > 1 else patches
    tested = patches[is_test]
    mean, vectors = _transform(fitted, device)
    plain = _in_components(fitted, tested, mean, vectors, None, device)
    fit, views = _fit_goal(choice, plain), plain
    saves = 0.0
    if side > 1:
        with_dct = _in_components(fitted, tested, mean, vectors, dct_matrix(side).to(device), device)
        other = _fit_goal(choice, with_dct)
        saves = _saved_bits(fit, other, plain)
        if saves > DCT_MUST_SAVE:
            fit, views = other, with_dct
    _check_goal(choice, fit, views)
    report = _report(fit, views, n_views, fitted.shape[0] * fitted.shape[1], saves)
    is_kept = fit.bits[:, 0] > 0
    parameters = fit.tables | {
        "mean": mean,
        "vectors": vectors[:, is_kept],
        "scale": views.variances[is_kept].sqrt().float(),
        "bits": fit.bits[is_kept].to(torch.uint8),
        "gains": gain_table(),
        "calibration": report.to_tensor(),
    }
    return KltCodec(choice.name, (n_tokens, width), {key: value.cpu() for key, value in parameters.items()})


def _transform(patches: Tensor, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(D,) mean and (D, K) eigenvectors of the covariance, largest variance first, null directions left out."""
    width = patches.shape[-1]
    first = patches[: max(1, _TOKENS_AT_ONCE // patches.shape[1])].to(device, torch.float64).reshape(-1, width)
    near = first.mean(dim=0).float()  # so that a large mean costs no digits
    total = torch.zeros(width, dtype=torch.float64, device=device)
    products = torch.zeros((width, width), dtype=torch.float64, device=device)
    for part in _parts(patches, device):
        rows = part.reshape(-1, width) - near
        total += rows.double().sum(dim=0)
        products += rows.T @ rows
    n = patches.shape[0] * patches.shape[1]
    covariance = products / n - torch.outer(total / n, total / n)
    variances, vectors = torch.linalg.eigh(covariance)
    is_used = variances > max(float(variances[-1]) * _NULL, 1e-20)
    used = vectors[:, is_used].flip(1).float()
    # A sign that does not depend on the solver: the largest entry of every vector is positive.
    largest = used.gather(0, used.abs().argmax(dim=0, keepdim=True))
    return (near + (total / n).float()), (used * largest.sign()).contiguous()


def _in_components(
    fitted: Tensor, tested: Tensor, mean: Tensor, vectors: Tensor, dct: Tensor | None, device: str | torch.device
) -> CalibrationViews:
    """Views in components, and the variances of all fitted ones."""
    n_fitted, n_places = fitted.shape[:2]

    def planes(patches: Tensor) -> Iterator[Tensor]:
        for part in _parts(patches, device):
            values = torch.matmul(vectors.T, (part - mean).transpose(1, 2))
            yield values if dct is None else to_frequencies(values, dct)

    n_tables = min(n_fitted, -(-ENOUGH_TOKENS // n_places))
    chosen = torch.linspace(0, n_fitted - 1, n_tables).round().long()
    squares = torch.zeros((vectors.shape[1], n_places), dtype=torch.float64, device=device)
    kept = []
    first = 0
    for values in planes(fitted):
        squares += values.double().square().sum(dim=0)
        here = chosen[(chosen >= first) & (chosen < first + values.shape[0])] - first
        kept.append(values[here.to(values.device)])
        first += values.shape[0]
    tests = list(planes(tested[: max(1, ENOUGH_TOKENS // n_places)]))
    energy = sum(
        float((part - mean).double().square().sum())
        for part in _parts(tested[: max(1, ENOUGH_TOKENS // n_places)], device)
    )
    own = squares / n_fitted
    variances = own.mean(dim=1, keepdim=True) if dct is None else _steadied(own, n_fitted, dct.shape[0])
    return CalibrationViews(torch.cat(kept), torch.cat(tests), energy, variances, mean.numel())


def _steadied(variances: Tensor, n_views: int, side: int) -> Tensor:
    """(K, N) variances of n views each, drawn towards the mean of their component's band of frequencies."""
    band = bands(side).to(variances.device)
    member = torch.nn.functional.one_hot(band, side).double()
    means = (variances @ member / member.sum(dim=0)) @ member.T
    return (n_views * variances + _PRIOR_VIEWS * means) / (n_views + _PRIOR_VIEWS)


def _fit_goal(choice: CodecChoice, views: CalibrationViews) -> KltFit:
    """The bits that come nearest to a goal, with tables from all views there are."""
    if choice.goal_bytes is not None:
        return fit_tables(_bits_for_bytes(choice.goal_bytes, views), views)
    assert choice.goal_db is not None
    few = views.some(_TOKENS_FOR_TRIES)
    goal = 10 ** (-choice.goal_db / 10)
    aim = goal
    best, best_miss = torch.zeros_like(views.variances, dtype=torch.int64), math.inf
    for _ in range(_TRIES):
        bits = allocate(views.variances, price_for_error(views.padded_variances, aim * views.mean_variance))
        fit = fit_tables(bits, few, rounds=1)
        miss = abs(fit.snr_db - choice.goal_db)
        if miss < best_miss:
            best, best_miss = bits, miss
        if miss < _CLOSE_DB:
            break
        aim *= goal / fit.relative_error
    return fit_tables(best, views)


def _bits_for_bytes(goal_bytes: int, views: CalibrationViews) -> Tensor:
    """The most bits whose codes hold at most so many bytes."""
    most = 8 * goal_bytes / (views.n_channels * views.n_places)
    for step in range(_BYTE_STEPS):
        price = price_for_rate(views.padded_variances, most * (1 - step / _BYTE_STEPS))
        bits = allocate(views.variances, price)
        if code_bytes_of(bits[bits[:, 0] > 0], views.n_places) <= goal_bytes:
            return bits
    return torch.zeros_like(views.variances, dtype=torch.int64)


def _saved_bits(plain: KltFit, with_dct: KltFit, views: CalibrationViews) -> float:
    """Bits a value that the DCT saves at equal error; what is left of a difference in error counts 6.02 dB a bit."""
    n_values = views.n_channels * views.n_places
    share = float((plain.bits > 0).double().mean()) * views.variances.shape[0] / views.n_channels
    difference = 8 * (plain.patch_bytes - with_dct.patch_bytes) / n_values
    return difference + share * (with_dct.snr_db - plain.snr_db) / (20 * math.log10(2))


def _check_goal(choice: CodecChoice, fit: KltFit, views: CalibrationViews) -> None:
    """Refuse a goal that was missed, with the nearest that can be had.

    Raises:
        ConfigError: as said.
    """
    if not bool((fit.bits > 0).any()):
        least = _least(views)
        raise ConfigError(
            f"codec {choice.name}: too little for a single component; the smallest are klt:{least.snr_db:.1f}dB and "
            f"klt:{least.patch_bytes / 1000:g}KB"
        )
    if choice.goal_bytes is None and abs(fit.snr_db - (choice.goal_db or 0)) <= TOLERANCE_DB:
        return
    most = fit_tables(torch.full_like(fit.bits, MAX_BITS), views)
    largest = f"klt:{_down(most.patch_bytes / 1000, 3)}KB ({most.snr_db:.1f} dB)"
    if choice.goal_bytes is not None:
        if choice.goal_bytes > most.patch_bytes:
            raise ConfigError(
                f"codec {choice.name}: more than {MAX_BITS} bits a value; the largest is {largest}, and float16 is "
                "good for 74 dB"
            )
        return
    assert choice.goal_db is not None
    if choice.goal_db > most.snr_db:
        raise ConfigError(
            f"codec {choice.name}: cannot be reached; {MAX_BITS} bits a value give {most.snr_db:.1f} dB on views that "
            "they were not fitted to (more calibration images may give more); ask for "
            f"klt:{_down(max(most.snr_db, 0.1), 1)}dB, or for float16 (74 dB)"
        )
    raise ConfigError(
        f"codec {choice.name}: no choice of bits comes within {TOLERANCE_DB} dB; the nearest is klt:{fit.snr_db:.1f}dB"
    )


def _least(views: CalibrationViews) -> KltFit:
    """One component with one bit."""
    bits = torch.zeros_like(views.variances, dtype=torch.int64)
    bits[0] = 1
    return fit_tables(bits, views)


def _report(fit: KltFit, views: CalibrationViews, n_views: int, n_tokens: int, saves: float) -> CalibrationReport:
    rate = 8 * fit.patch_bytes / (views.n_channels * views.n_places)
    error = fit.relative_error * views.mean_variance
    return CalibrationReport(
        n_views=n_views,
        n_tokens=n_tokens,
        snr_db=fit.snr_db,
        bits_per_value=rate,
        gap_bits=rate - gaussian_rate(views.padded_variances, error),
        n_kept=int((fit.bits[:, 0] > 0).sum()),
        width=views.n_channels,
        dct=views.variances.shape[1] > 1,
        dct_saves_bits=saves,
        transform_bound_excess_bits=expected_excess_bits(n_tokens, views.n_channels),
    )


def _parts(patches: Tensor, device: str | torch.device) -> Iterator[Tensor]:
    """Float32 on the device, a few views at a time."""
    for part in torch.split(patches, max(1, _TOKENS_AT_ONCE // patches.shape[1])):
        yield part.to(device, torch.float32)


def _down(number: float, digits: int) -> str:
    """A number rounded down, written without needless digits."""
    scale = 10**digits
    return f"{math.floor(number * scale) / scale:g}"
