"""The tables of `klt` for given bits: Lloyd-Max levels under the gains that the codec itself chooses, made unbiased."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proteus_cache.codecs.calibration import N_NUMBERS
from proteus_cache.codecs.klt import MARGIN, KltCodec, bits_of_tables, gain_table
from proteus_cache.codecs.lloyd import Histograms, thresholds_of, unbiased_scale
from proteus_cache.codecs.waterfill import MAX_BITS

_TOKENS_AT_ONCE = 1 << 14
_NO_LIMIT = 1e30


@dataclass(frozen=True)
class CalibrationViews:
    """Calibration views in components."""

    fitted: Tensor
    """(n, K, N) float32 that tables are fitted to."""
    tested: Tensor
    """(n, K, N) of the views that nothing was fitted to."""
    test_energy: float
    """Sum of squares of the tested views' patches about the mean, all channels."""
    variances: Tensor
    """(K, N) or (K, 1) float64."""
    n_channels: int
    n_places: int

    def some(self, n_tokens: int) -> CalibrationViews:
        """With fewer views for the tables."""
        n_views = min(self.fitted.shape[0], max(1, -(-n_tokens // self.n_places)))
        chosen = torch.linspace(0, self.fitted.shape[0] - 1, n_views).round().long().to(self.fitted.device)
        return replace(self, fitted=self.fitted[chosen])

    def without_planes(self) -> CalibrationViews:
        """What a report needs."""
        return replace(self, fitted=self.fitted[:0], tested=self.tested[:0])

    @property
    def mean_variance(self) -> float:
        """Over all channels and places; components that are not used add nothing."""
        return float(self.variances.mean(dim=1).sum()) / self.n_channels

    @property
    def padded_variances(self) -> Tensor:
        """(D, F): with zeros for the directions that are not used, so that means run over all channels."""
        missing = self.n_channels - self.variances.shape[0]
        return torch.nn.functional.pad(self.variances, (0, 0, 0, missing))


@dataclass(frozen=True)
class KltFit:
    """Bits with their tables, and what they do to the tested views."""

    bits: Tensor
    """(K, N) or (K, 1) int64, 0 where a component is dropped."""
    tables: dict[str, Tensor]
    patch_bytes: int
    relative_error: float

    @property
    def snr_db(self) -> float:
        """About the mean, on the tested views."""
        return -10 * math.log10(max(self.relative_error, 1e-30))


def fit_tables(bits: Tensor, views: CalibrationViews, rounds: int = 2) -> KltFit:
    """Tables for bits, unbiased on the fitted views, and the error on the tested ones.

    Each round fits levels to the components under the gains that a codec of the last round's levels chooses, the
    first under those of a Gaussian's. A codec of the last levels then says how far they have to be stretched.
    """
    is_kept = bits[:, 0] > 0
    kept, scale = bits[is_kept], views.variances[is_kept].sqrt().float()
    if kept.shape[0] == 0:
        return KltFit(bits, {}, 0, 1.0)
    fitted = views.fitted[:, is_kept]
    draft = _first_draft(kept, scale, fitted)
    for _ in range(rounds):
        draft = _with_levels_for(draft, fitted)
    products = torch.zeros(draft.table_of.shape, dtype=torch.float64, device=bits.device)
    squares = torch.zeros_like(products)
    for part, decoded in _decoded(draft, fitted):
        products += (part.double() * decoded).sum(dim=0)
        squares += part.double().square().sum(dim=0)
    draft = _stretched(draft, products, squares)
    error, energy = 0.0, 0.0
    for part, decoded in _decoded(draft, views.tested[:, is_kept]):
        error += float((decoded - part).double().square().sum())
        energy += float(part.double().square().sum())
    left = max(0.0, views.test_energy - energy) + error
    tables = {name: getattr(draft, name) for name in ("levels", "thresholds", "stretch", "low", "high")}
    return KltFit(bits, tables, draft.code_bytes, left / max(views.test_energy, 1e-300))


def _first_draft(bits: Tensor, scale: Tensor, planes: Tensor) -> KltCodec:
    """A codec of components (K channels, no transform) with the levels of a Gaussian and no limits."""
    n_kept, n_places = planes.shape[1:]
    tables = bits_of_tables(bits)
    gaussian = Histograms(1)
    levels = {b: gaussian.levels(b, torch.zeros(1, dtype=torch.long)).float() for b in set(tables)}
    parameters = {
        "mean": torch.zeros(n_kept),
        "vectors": torch.eye(n_kept),
        "scale": scale.cpu(),
        "bits": bits.to("cpu", torch.uint8),
        "levels": torch.cat([levels[b].reshape(-1) for b in tables]),
        "thresholds": torch.cat([thresholds_of(levels[b]).reshape(-1) for b in tables]),
        "stretch": torch.ones(len(tables)),
        "low": torch.full((len(tables),), -_NO_LIMIT),
        "high": torch.full((len(tables),), _NO_LIMIT),
        "gains": gain_table(),
        "calibration": torch.zeros(N_NUMBERS, dtype=torch.float64),
    }
    return KltCodec("klt", (n_places, n_kept), parameters).to(planes.device)


def _with_levels_for(draft: KltCodec, planes: Tensor) -> KltCodec:
    """The codec with Lloyd-Max levels for these components under the gains that it chooses itself."""
    histograms = Histograms(draft.low.numel(), planes.device)
    tables = draft.table_of.reshape(-1)
    for part in _split(planes):
        scaled = part / draft.scale
        gain = draft.gains[draft.gains_for(scaled)]
        histograms.add((scaled / gain.unsqueeze(1)).reshape(part.shape[0], -1), tables)
    levels, thresholds = [], []
    for b, rows in _groups_of(draft):
        found = histograms.levels(b, rows).float()
        levels.append(found.reshape(-1))
        thresholds.append(thresholds_of(found).reshape(-1))
    ranges = {"low": histograms.low * MARGIN, "high": histograms.high * MARGIN}
    return _changed(draft, {"levels": torch.cat(levels), "thresholds": torch.cat(thresholds)} | ranges)


def _stretched(draft: KltCodec, products: Tensor, squares: Tensor) -> KltCodec:
    """The codec with the levels of every table stretched to slope 1.

    Args:
        draft: that decoded.
        products: (K, N) sums of original times decoded.
        squares: (K, N) sums of squares of the originals.
    """
    tables = draft.table_of.reshape(-1)
    sums = torch.zeros((2, draft.low.numel()), dtype=torch.float64, device=products.device)
    sums[0].index_add_(0, tables, products.reshape(-1))
    sums[1].index_add_(0, tables, squares.reshape(-1))
    stretch = unbiased_scale(sums[0], sums[1]).float()
    sizes = torch.tensor([1 << b for b, rows in _groups_of(draft) for _ in rows], device=stretch.device)
    return _changed(draft, {"levels": draft.levels * stretch.repeat_interleave(sizes), "stretch": stretch})


def _groups_of(draft: KltCodec) -> list[tuple[int, Tensor]]:
    """Bits, and numbers of the tables with so many, in the order of the codes."""
    bits = torch.tensor(bits_of_tables(draft.bits), device=draft.bits.device)
    return [(b, (bits == b).nonzero().flatten()) for b in range(MAX_BITS, 0, -1) if bool((bits == b).any())]


def _changed(draft: KltCodec, tensors: dict[str, Tensor]) -> KltCodec:
    parameters = {name: value.cpu() for name, value in (draft.parameters_of() | tensors).items()}
    return KltCodec(draft.name, draft.shape, parameters).to(draft.mean.device)


def _decoded(draft: KltCodec, planes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(n, K, N) components, and what they decode to."""
    for part in _split(planes):
        yield part, draft.dequantise(draft.quantise(part))


def _split(planes: Tensor) -> tuple[Tensor, ...]:
    return torch.split(planes, max(1, _TOKENS_AT_ONCE // planes.shape[2]))
