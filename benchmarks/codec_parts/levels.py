"""Two choices behind klt, on the principal components of real tokens.

Which levels: Lloyd-Max, stretched to slope 1, or evenly spaced ones with subtractive dither. And what it costs to keep
every frequency of a component or none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from proteus_cache.codecs.dct import dct_matrix, to_frequencies
from proteus_cache.codecs.klt import grid_of
from proteus_cache.codecs.lloyd import Histograms, nearest_levels, thresholds_of, unbiased_scale
from proteus_cache.codecs.waterfill import MAX_BITS, UNBIASED_ERROR, allocate, price_for_rate

_LOAD = 4.0
"""Standard deviations that a dithered quantiser covers."""
_LOADS = torch.linspace(1.0, 6.0, 41)
_RATES = (1, 2, 3, 4)
_AT_ONCE = 128


def measure(tokens: Tensor) -> dict[str, Any]:
    """Both, of (n, T, D) tokens; two thirds are fitted to."""
    n_lead, side = grid_of(tokens.shape[1])
    patches = tokens[:, n_lead:]
    fitted, tested = patches[: 2 * len(patches) // 3], patches[2 * len(patches) // 3 :]
    return {
        "levels": levels_against_dither(fitted, tested),
        "left_out": all_or_nothing(fitted) if side > 1 else [],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Lloyd-Max against dither, and what dropping single frequencies would do."""
    lines = [
        "| bits | Lloyd-Max, stretched: dB (slopes) | dither, load 4 sigma | dither, best load |",
        "| ---: | --- | --- | --- |",
    ]
    for row in result["levels"]:
        cells = [f"{row[arm]['db']:.2f} ({row[arm]['low']:.4f} to {row[arm]['high']:.4f})" for arm in _ARMS]
        cells[2] += f", load {row['best']['load']:.1f}"
        lines.append(f"| {row['bits']} | " + " | ".join(cells) + " |")
    if result["left_out"]:
        lines += [
            "",
            "| bits/value, whole components | bits where the variance is | saved | bias, of all energy | dropped |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
    for row in result["left_out"]:
        lines.append(
            f"| {row['bits']:.3f} | {row['free_bits']:.3f} | {row['saved']:.3f} | {row['bias']:.2%} | "
            f"{row['share_dropped']:.1%} of the kept components' coefficients |"
        )
    return lines


_ARMS = ("lloyd", "dither", "best")
_FITTED_TOKENS, _TESTED_TOKENS = 40_000, 20_000


def levels_against_dither(fitted: Tensor, tested: Tensor) -> list[dict[str, Any]]:
    """Error over variance, mean over principal components, of three ways to spend b bits on each, in dB.

    Each token is divided by its root mean square first, as the codec's gains do. Lloyd-Max levels are those of the
    codec, stretched; dither is subtractive and uniform over a step, with 2 ** b steps over 4 standard deviations to
    each side, or over the load with the least error on what was fitted to.
    """
    rows = fitted.reshape(-1, fitted.shape[-1])
    mean = rows.mean(dim=0)
    centred = (rows - mean).double()
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    used = variances > variances[-1] * 1e-6
    deviation = variances[used].sqrt()
    turn = (vectors[:, used] / deviation).float()
    ours = _even((_spread(rows, _FITTED_TOKENS) - mean) @ turn)
    theirs = _even((_spread(tested.reshape(-1, tested.shape[-1]), _TESTED_TOKENS) - mean) @ turn)
    histograms = Histograms(ours.shape[1])
    tables = torch.arange(ours.shape[1])
    histograms.add(ours, tables)
    noise = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(0))
    table = []
    for bits in range(1, MAX_BITS + 1):
        some = ours[: _FITTED_TOKENS // 8]
        best = min(_LOADS.tolist(), key=lambda load: _error(some, _dithered(some, bits, load, noise[: len(some)])))
        table.append(
            {
                "bits": bits,
                "lloyd": _told_levels(theirs, _lloyd(histograms, ours, theirs, bits)),
                "dither": _told_levels(theirs, _dithered(theirs, bits, _LOAD, noise)),
                "best": _told_levels(theirs, _dithered(theirs, bits, best, noise)) | {"load": best},
            }
        )
    return table


def _spread(rows: Tensor, n: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).long()]


def _even(tokens: Tensor) -> Tensor:
    return tokens / tokens.square().mean(dim=1, keepdim=True).sqrt()


def _lloyd(histograms: Histograms, ours: Tensor, theirs: Tensor, bits: int) -> Tensor:
    tables = torch.arange(ours.shape[1])
    levels = histograms.levels(bits, tables).float()
    bounds = torch.nn.functional.pad(thresholds_of(levels), (0, 1), value=torch.inf)

    def restore(values: Tensor) -> Tensor:
        return levels[tables, nearest_levels(values, tables, bounds, bits).long()]

    stretch = unbiased_scale((ours * restore(ours)).double().sum(dim=0), ours.double().square().sum(dim=0))
    return restore(theirs) * stretch.float()


def _dithered(values: Tensor, bits: int, load: float, noise: Tensor) -> Tensor:
    """Subtractive dither: the same noise, uniform over a step, is added before rounding and taken off after."""
    half = 1 << (bits - 1)
    step = load / half
    shift = noise - 0.5
    cells = (values / step + shift).floor().clamp(-half, half - 1)
    return (cells + 0.5 - shift) * step


def _error(values: Tensor, restored: Tensor) -> float:
    return float((restored - values).double().square().mean())


def _told_levels(values: Tensor, restored: Tensor) -> dict[str, float]:
    x, y = values.double(), restored.double()
    slope = (x * y).sum(dim=0) / x.square().sum(dim=0)
    relative = (y - x).square().mean(dim=0) / x.square().mean(dim=0)
    return {"db": -10 * math.log10(float(relative.mean())), "low": float(slope.min()), "high": float(slope.max())}


def all_or_nothing(fitted: Tensor) -> list[dict[str, Any]]:
    """What the codec gives up by keeping every frequency of a component or none, were the coefficients Gaussian.

    Beside it: bits wherever the variance asks for them at the same error. The frequencies that this leaves out of kept
    components would reach the patch loss as zeros: their share of all energy is the bias.
    """
    rows = fitted.reshape(-1, fitted.shape[-1])
    mean = rows.mean(dim=0)
    centred = rows - mean
    vectors = torch.linalg.eigh((centred.T @ centred).double() / len(rows)).eigenvectors.flip(1).float()
    dct = dct_matrix(math.isqrt(fitted.shape[1]))
    variances = torch.zeros((fitted.shape[2], fitted.shape[1]), dtype=torch.float64)
    for part in torch.split(fitted, _AT_ONCE):
        planes = to_frequencies(torch.matmul(vectors.T, (part - mean).transpose(1, 2)), dct)
        variances += planes.double().square().sum(dim=0)
    variances /= len(fitted)
    table = []
    for asked in _RATES:
        whole = allocate(variances, price_for_rate(variances, asked))
        free = _at_error(variances, _expected(variances, whole))
        left_out = (free == 0) & (free > 0).any(dim=1, keepdim=True)
        bits, free_bits = float(whole.double().mean()), float(free.double().mean())
        table.append(
            {
                "bits": bits,
                "free_bits": free_bits,
                "saved": bits - free_bits,
                "bias": float(variances[left_out].sum() / variances.sum()),
                "share_dropped": float(left_out.sum() / ((free > 0).any(dim=1).sum() * free.shape[1])),
            }
        )
    return table


def _expected(variances: Tensor, bits: Tensor) -> float:
    return float((variances * torch.tensor(UNBIASED_ERROR, dtype=torch.float64)[bits]).mean())


def _at_error(variances: Tensor, error: float) -> Tensor:
    """Bits where the variance asks for them, none included, at the highest price that leaves no more than an error."""
    table = torch.tensor(UNBIASED_ERROR, dtype=torch.float64)
    number = torch.arange(MAX_BITS + 1, dtype=torch.float64)
    low, high = 1e-16 * float(variances.max()), float(variances.max())
    bits = torch.zeros_like(variances, dtype=torch.long)
    for _ in range(60):
        price = math.sqrt(low * high)
        bits = (variances.unsqueeze(-1) * table + price * number).argmin(dim=-1)
        low, high = (low, price) if _expected(variances, bits) > error else (price, high)
    return (variances.unsqueeze(-1) * table + low * number).argmin(dim=-1)
