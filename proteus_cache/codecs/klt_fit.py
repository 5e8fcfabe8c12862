"""Fitting `klt`: moments, transform, bits, tables, and whether the DCT pays; all on calibration views.

Every eighth view takes no part in the fit: what it shows of the error decides how many bits a goal in dB needs and
whether the DCT is on, and is what the plan reports. Moments come from all other views, tables from as many of them as
hold 100,000 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from proteus_cache.codecs.waterfill import MAX_BITS, allocate, gaussian_rate, price_for_error
from proteus_cache.errors import ConfigError

DCT_MUST_SAVE = 0.05
"""Bits a value."""
TOLERANCE_DB = 0.3
_CLOSE_DB = 0.03
_TRIES = 6
_TOKENS_AT_ONCE = 1 << 14
_TOKENS_FOR_TRIES = 1 << 14
_TEST_TOKENS = 1 << 15
_HALVINGS = 60
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
    views = _Tokens.of(tokens, device)
    mean, vectors = _transform(views)
    if vectors.shape[1] == 0:
        raise ConfigError(f"codec {choice.name}: the patches of all calibration views are the same; nothing to fit")
    dcts = [None] if views.side < 2 else [None, dct_matrix(views.side).to(device)]
    fits = []
    for dct in dcts:
        planes = _in_components(views, mean, vectors, dct)
        fits.append((_fit_goal(choice, planes), planes.without_planes()))
        del planes
    saves = _saved_bits(fits[0][0], fits[-1][0], fits[0][1]) if len(fits) > 1 else 0.0
    chosen = _choose(choice, [fit for fit, _ in fits], saves, views.n_places)
    if chosen is None:
        again = [_in_components(views, mean, vectors, dct) for dct in dcts]
        raise _refusal(choice, [(fit, planes) for (fit, _), planes in zip(fits, again, strict=True)])
    fit, about = fits[chosen]
    report = _report(fit, about, tokens.shape[0], len(views.fitted) * views.n_places, saves)
    is_kept = fit.bits[:, 0] > 0
    parameters = fit.tables | {
        "mean": mean,
        "vectors": vectors[:, is_kept],
        "scale": about.variances[is_kept].sqrt().float(),
        "bits": fit.bits[is_kept].to(torch.uint8),
        "gains": gain_table(),
        "calibration": report.to_tensor(),
    }
    shape = (tokens.shape[1], tokens.shape[2])
    return KltCodec(choice.name, shape, {key: value.cpu() for key, value in parameters.items()})


@dataclass(frozen=True)
class _Tokens:
    """Calibration views, read a few at a time and never copied as a whole."""

    tokens: Tensor
    """(n, T, D), where they lie."""
    n_lead: int
    side: int
    """Of the grid of patches; 0 where they make no square."""
    fitted: Tensor
    """(n,) numbers of the views that are fitted to."""
    tested: Tensor
    """Numbers of those that are not."""
    device: str | torch.device

    @classmethod
    def of(cls, tokens: Tensor, device: str | torch.device) -> _Tokens:
        """With every eighth view left out of the fit."""
        numbers = torch.arange(tokens.shape[0])
        is_test = numbers % 8 == 7
        if not bool(is_test.any()):
            is_test[-1] = True
        fitted = numbers[~is_test] if tokens.shape[0] > 1 else numbers
        return cls(tokens, *grid_of(tokens.shape[1]), fitted, numbers[is_test], device)

    @property
    def n_places(self) -> int:
        """Patches of a view."""
        return self.tokens.shape[1] - self.n_lead

    @property
    def width(self) -> int:
        """Channels."""
        return self.tokens.shape[2]

    def parts(self, numbers: Tensor) -> Iterator[Tensor]:
        """(n, N, D) float32 patches on the device, a few views at a time."""
        for some in torch.split(numbers, max(1, _TOKENS_AT_ONCE // self.n_places)):
            yield self.tokens[some][:, self.n_lead :].to(self.device, torch.float32)


def _transform(views: _Tokens) -> tuple[Tensor, Tensor]:
    """(D,) mean and (D, K) eigenvectors of the covariance, largest variance first, null directions left out."""
    width = views.width
    near = next(views.parts(views.fitted)).reshape(-1, width).mean(dim=0)  # so that a large mean costs no digits
    total = torch.zeros(width, dtype=torch.float64, device=views.device)
    products = torch.zeros((width, width), dtype=torch.float64, device=views.device)
    for part in views.parts(views.fitted):
        rows = part.reshape(-1, width) - near
        total += rows.double().sum(dim=0)
        products += rows.T @ rows
    n = len(views.fitted) * views.n_places
    covariance = products / n - torch.outer(total / n, total / n)
    variances, vectors = torch.linalg.eigh(covariance)
    is_used = variances > max(float(variances[-1]) * _NULL, 1e-20)
    used = vectors[:, is_used].flip(1).float()
    mean = near + (total / n).float()
    if used.shape[1] == 0:
        return mean, used
    # A sign that does not depend on the solver: the largest entry of every vector is positive.
    largest = used.gather(0, used.abs().argmax(dim=0, keepdim=True))
    return mean, (used * largest.sign()).contiguous()


def _in_components(views: _Tokens, mean: Tensor, vectors: Tensor, dct: Tensor | None) -> CalibrationViews:
    """Views in components, and the variances of all fitted ones."""
    n_fitted, n_places = len(views.fitted), views.n_places

    def planes(part: Tensor) -> Tensor:
        values = torch.matmul(vectors.T, (part - mean).transpose(1, 2))
        return values if dct is None else to_frequencies(values, dct)

    n_kept = min(n_fitted, -(-ENOUGH_TOKENS // n_places))
    kept = torch.empty((n_kept, vectors.shape[1], n_places), device=views.device)
    is_chosen = torch.zeros(n_fitted, dtype=torch.bool)
    is_chosen[torch.linspace(0, n_fitted - 1, n_kept).round().long()] = True
    squares = torch.zeros(kept.shape[1:], dtype=torch.float64, device=views.device)
    first, place = 0, 0
    for part in views.parts(views.fitted):
        values = planes(part)
        squares += values.double().square().sum(dim=0)
        chosen = values[is_chosen[first : first + len(values)].to(values.device)]
        kept[place : place + len(chosen)] = chosen
        first, place = first + len(values), place + len(chosen)
    tested, energy = [], 0.0
    for part in views.parts(views.tested[: max(1, _TEST_TOKENS // n_places)]):
        tested.append(planes(part))
        energy += float((part - mean).double().square().sum())
    own = squares / n_fitted
    variances = own.mean(dim=1, keepdim=True) if dct is None else _steadied(own, n_fitted, dct.shape[0])
    return CalibrationViews(kept[:place], torch.cat(tested), energy, variances, views.width, n_places)


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
    """The most bits whose codes take at most so many bytes."""

    def fits(bits: Tensor) -> bool:
        return code_bytes_of(bits[bits[:, 0] > 0], views.n_places) <= goal_bytes

    return allocate(views.variances, _price(views, fits)[1])


def _price(views: CalibrationViews, holds: Callable[[Tensor], bool]) -> tuple[float, float]:
    """Neighbouring prices of a bit: at the second, and above it, something holds of the bits that `allocate` gives."""
    high = float(views.variances.sum(dim=1).max()) + 1e-300
    low = high * 1e-16
    for _ in range(_HALVINGS):
        price = (low * high) ** 0.5
        if holds(allocate(views.variances, price)):
            high = price
        else:
            low = price
    return low, high


def _saved_bits(plain: KltFit, with_dct: KltFit, views: CalibrationViews) -> float:
    """Bits a value that the DCT saves at equal error; what is left of a difference in error counts 6.02 dB a bit."""
    n_values = views.n_channels * views.n_places
    share = float((plain.bits > 0).double().mean()) * views.variances.shape[0] / views.n_channels
    difference = 8 * (plain.patch_bytes - with_dct.patch_bytes) / n_values
    return difference + share * (with_dct.snr_db - plain.snr_db) / (20 * math.log10(2))


def _meets(choice: CodecChoice, fit: KltFit, n_places: int) -> bool:
    if not bool((fit.bits > 0).any()):
        return False
    if choice.goal_bytes is not None:
        # A budget that all bits do not use up asks for something that there is not.
        most = code_bytes_of(torch.full_like(fit.bits, MAX_BITS), n_places)
        return fit.patch_bytes <= choice.goal_bytes <= most
    assert choice.goal_db is not None
    return abs(fit.snr_db - choice.goal_db) <= TOLERANCE_DB


def _choose(choice: CodecChoice, fits: list[KltFit], saves: float, n_places: int) -> int | None:
    """Without (0) or with (1) the DCT: the one that meets the goal, of both the better one; None when neither does."""
    meeting = [number for number, fit in enumerate(fits) if _meets(choice, fit, n_places)]
    if len(meeting) < 2:
        return meeting[0] if meeting else None
    return 1 if saves > DCT_MUST_SAVE else 0


def _refusal(choice: CodecChoice, fits: list[tuple[KltFit, CalibrationViews]]) -> ConfigError:
    """What to say of a goal that was missed: the nearest that can be had."""
    least = min((_least(views) for _, views in fits), key=lambda fit: fit.patch_bytes)
    if (choice.goal_bytes is not None and choice.goal_bytes < least.patch_bytes) or (
        choice.goal_db is not None and choice.goal_db < least.snr_db
    ):
        return ConfigError(
            f"codec {choice.name}: too little for a single component; the smallest are klt:{least.snr_db:.2f}dB and "
            f"klt:{least.patch_bytes / 1000:g}KB"
        )
    most = max((_most(views) for _, views in fits), key=lambda fit: fit.snr_db)
    if choice.goal_bytes is not None:
        return ConfigError(
            f"codec {choice.name}: more than {MAX_BITS} bits a value; the largest is "
            f"klt:{_down(most.patch_bytes / 1000, 3)}KB ({most.snr_db:.1f} dB), and float16 is good for 74 dB"
        )
    assert choice.goal_db is not None
    if choice.goal_db > most.snr_db:
        return ConfigError(
            f"codec {choice.name}: cannot be reached; {MAX_BITS} bits a value give {most.snr_db:.1f} dB on views that "
            "they were not fitted to (more calibration images may give more); ask for "
            f"klt:{_down(max(most.snr_db - 0.1, 0.1), 1)}dB, or for float16 (74 dB)"
        )
    goal_db = choice.goal_db
    nearest = min((fit for fit, _ in fits if fit.tables), key=lambda fit: abs(fit.snr_db - goal_db), default=least)
    return ConfigError(
        f"codec {choice.name}: no choice of bits comes within {TOLERANCE_DB} dB; the nearest is "
        f"klt:{nearest.snr_db:.2f}dB"
    )


def _most(views: CalibrationViews) -> KltFit:
    """All components with all bits."""
    return fit_tables(torch.full(views.variances.shape, MAX_BITS, device=views.variances.device), views)


def _least(views: CalibrationViews) -> KltFit:
    """What `allocate` gives at the highest price at which it still keeps anything."""
    return fit_tables(allocate(views.variances, _price(views, lambda bits: not bool((bits > 0).any()))[0]), views)


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


def _down(number: float, digits: int) -> str:
    """A number rounded down, written without needless digits."""
    scale = 10**digits
    return f"{math.floor(number * scale) / scale:g}"
