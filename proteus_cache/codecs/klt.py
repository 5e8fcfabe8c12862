"""`klt`: principal components of the channels, a DCT over the patches where it pays, and bits where the variance is.

A view has n_lead tokens in front (none, or the CLS token of a block) and a square grid of N patches of width D. With
the calibration mean m and the K kept eigenvectors V (D, K) of the covariance of patches, C = (X - m) V holds the
components, (K, N) by component; with the DCT on, each row of C is replaced by its orthonormal 2-D DCT over the grid.
Coefficient (k, f) has a fixed number of bits b[k, f], 1 to 8, found by reverse water-filling; f is a frequency with the
DCT and a patch without it, and then all patches of a component have the same. Codes of one view:

    n_lead x D x float16   the tokens in front, little-endian
    N x 5 bits             number e of the gain of each f, packed as in `bits`; 24 and more: widened by an overflow
    for b = 8 .. 1         the levels of all coefficients with b bits, by component, then f, packed as in `bits`

    c'[k, f] = gains[e[f]] * scale[k, f] * levels[table of (k, b)][q]        x' = m + V c'

The gain of f is the root mean square of its kept coefficients in units of their scales, to a quarter of an octave. A
table belongs to a component and a number of bits, and holds Lloyd-Max levels that are stretched to slope 1. A value
beyond 1.25 times what calibration showed of its table, or a root mean square beyond the 24 fine gains, takes that of
eight coarse gains that leaves the least error: this widens the steps of this f in this view alone, and is counted.

Components that are not kept have no bits at any f: they decode to the mean, and losses do not look at them (`basis`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from proteus_cache.codecs.bits import pack, packed_bytes, unpack
from proteus_cache.codecs.calibration import N_NUMBERS, CalibrationReport
from proteus_cache.codecs.codec import Basis, FittedCodec, read_as
from proteus_cache.codecs.dct import dct_matrix, to_frequencies, to_places
from proteus_cache.codecs.lloyd import nearest_levels
from proteus_cache.codecs.parameters import check_shapes, check_tensors, load_parameters
from proteus_cache.codecs.waterfill import MAX_BITS
from proteus_cache.errors import FormatError

MARGIN = 1.25
"""Of the range that calibration showed, beyond which a value overflows."""
_GAIN_BITS = 5
_FINE = 24
_TRIED_GAINS = (-1, 0, 1)
"""Beside the one nearest to the root mean square, in quarters of an octave."""
_COARSE_OCTAVES = (0, 1, 2, 3, 5, 8, 13, 24)
_TENSORS = (
    "mean",
    "vectors",
    "scale",
    "bits",
    "levels",
    "thresholds",
    "stretch",
    "low",
    "high",
    "gains",
    "calibration",
)
_DTYPES = dict.fromkeys(_TENSORS, torch.float32) | {"bits": torch.uint8, "calibration": torch.float64}


def gain_table() -> Tensor:
    """(32,) float32 gains: 24 fine ones, 2^-3 to 2^2.75 by quarters of an octave, then 2^0 to 2^24 for overflows."""
    return torch.tensor([2.0 ** (step / 4 - 3) for step in range(_FINE)] + [2.0**octave for octave in _COARSE_OCTAVES])


def grid_of(n_tokens: int) -> tuple[int, int]:
    """Tokens in front and side of the grid: (1, 16) for 257 tokens; a side of 0 for tokens that make no square."""
    for n_lead in (0, 1):
        side = math.isqrt(max(0, n_tokens - n_lead))
        if side > 0 and side * side == n_tokens - n_lead:
            return n_lead, side
    return 0, 0


def code_bytes_of(bits: Tensor, n_places: int) -> int:
    """Bytes of a view's codes without the tokens in front.

    Args:
        bits: (K, N) or (K, 1) integers.
        n_places: N.
    """
    counts = torch.bincount(bits.reshape(-1).long(), minlength=MAX_BITS + 1) * (n_places // bits.shape[1])
    return packed_bytes(n_places, _GAIN_BITS) + sum(
        packed_bytes(int(counts[b]), b) for b in range(1, MAX_BITS + 1) if counts[b]
    )


def bits_of_tables(bits: Tensor) -> list[int]:
    """Bits of each table, in the order of the codes: most bits first, then by component.

    Args:
        bits: (K, N) or (K, 1) integers.
    """
    return [b for b in range(MAX_BITS, 0, -1) for _ in range(int((bits == b).any(dim=1).sum()))]


@dataclass(frozen=True)
class _Group:
    """Coefficients with the same number of bits."""

    bits: int
    start: int
    end: int
    """Places in the order of the codes."""
    first_byte: int
    end_byte: int
    first_table: int
    """Number of their first table."""


class KltCodec(FittedCodec):
    """Integer bits for each component, masked out where there are none.

    Args:
        name: with its goal, for example "klt:20dB".
        shape: of one view's tokens, (T, D).
        parameters: `mean` (D,), `vectors` (D, K), `scale` and `bits` (K, N) or (K, 1), `gains` (32,); `levels` and
            `thresholds` of all tables one after the other, in the order of the codes, 2 ** b and 2 ** b - 1 numbers
            each; `stretch` (what its levels were multiplied by to have slope 1), `low` and `high` of each table;
            `calibration` as `CalibrationReport.to_tensor` gives. `bits` are uint8, all others but the last float32.

    Raises:
        FormatError: the parameters do not fit together or are not those of such tokens.
    """

    mean: Tensor
    vectors: Tensor
    scale: Tensor
    bits: Tensor
    levels: Tensor
    thresholds: Tensor
    stretch: Tensor
    low: Tensor
    high: Tensor
    gains: Tensor
    table_of: Tensor
    """(K, N) int64: number of each coefficient's table."""
    _order: Tensor
    _inverse: Tensor
    _rows: Tensor
    _level_starts: Tensor
    _shrinkage: Tensor
    _inverse_low: Tensor
    _inverse_high: Tensor
    _dct: Tensor

    def __init__(self, name: str, shape: tuple[int, ...], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        if len(shape) != 2:
            raise FormatError(f"codec {name}: codes tokens of patches, not targets of shape {shape}")
        self.n_lead, self.side = grid_of(shape[0])
        self.n_places, self.width = shape[0] - self.n_lead, shape[1]
        _check(name, parameters, self.width, self.n_places, self.side)
        for key in _TENSORS[:-1]:
            dtype = torch.uint8 if key == "bits" else torch.float32
            self.register_buffer(key, parameters[key].to(dtype).contiguous())
        self._calibration = parameters["calibration"]
        self.calibration = CalibrationReport.from_tensor(self._calibration)
        self.has_dct = self.bits.shape[1] > 1
        self.n_kept = self.bits.shape[0]
        self.lead_bytes = 2 * self.n_lead * self.width
        self._lay_out()

    @classmethod
    def from_blob(cls, name: str, blob: bytes, shape: tuple[int, ...]) -> KltCodec:
        """The codec that `parameters_blob` described.

        Raises:
            FormatError: other tensors, or of other tokens.
        """
        return cls(name, shape, load_parameters(name, blob, _DTYPES))

    @property
    def basis(self) -> Basis:
        """The kept components."""
        return Basis(self.mean, self.vectors, self.n_lead)

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, T, D) float32 to (B, code_bytes) uint8; non-finite tokens give meaningless codes."""
        tokens = tokens.float()
        with torch.autocast(tokens.device.type, enabled=False):
            coefficients = self.coefficients(tokens[:, self.n_lead :])
        lead = tokens[:, : self.n_lead].to(torch.float16).contiguous().view(torch.uint8)
        return torch.cat((lead.reshape(tokens.shape[0], -1), self.quantise(coefficients)), dim=1)

    def coefficients(self, patches: Tensor) -> Tensor:
        """(B, N, D) float32 to (B, K, N): components, over frequencies where the DCT is on."""
        planes = torch.matmul(self.vectors.T, (patches - self.mean).transpose(1, 2))
        return to_frequencies(planes, self._dct) if self.has_dct else planes

    def quantise(self, coefficients: Tensor) -> Tensor:
        """(B, K, N) float32 to (B, code_bytes - lead_bytes) uint8: gains and levels."""
        scaled = coefficients / self.scale
        numbers = self.gains_for(scaled)
        levels = self._levels_for(scaled, self.gains[numbers])
        parts = [pack(part, group.bits) for group, part in zip(self._groups, levels, strict=True)]
        return torch.cat((pack(numbers.to(torch.uint8), _GAIN_BITS), *parts), dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, code_bytes) uint8 to (B, T, D) float32; what was left out decodes to the mean.

        Raises:
            FormatError: the codes were cut short.
        """
        lead, components = self.components(codes)
        with torch.autocast(codes.device.type, enabled=False):
            patches = torch.addmm(self.mean, components.reshape(-1, self.n_kept), self.vectors.T)
        return torch.cat((lead, patches.reshape(codes.shape[0], self.n_places, self.width)), dim=1)

    def components(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, code_bytes) uint8 to (B, n_lead, D) tokens in front and (B, N, K) components of the patches, float32.

        Raises:
            FormatError: the codes were cut short.
        """
        self.check_codes(codes)
        lead = read_as(codes[:, : self.lead_bytes], torch.float16).float()
        planes = self.dequantise(codes[:, self.lead_bytes :])
        if self.has_dct:
            with torch.autocast(codes.device.type, enabled=False):
                planes = to_places(planes, self._dct)
        return lead.reshape(codes.shape[0], self.n_lead, self.width), planes.transpose(1, 2)

    def dequantise(self, codes: Tensor) -> Tensor:
        """The inverse of `quantise`: (B, code_bytes - lead_bytes) uint8 to (B, K, N) float32 coefficients."""
        gain = self.gains[self.gain_numbers(codes).long()]
        return self._restore(self.integers(codes)).mul_(self.scale).mul_(gain.unsqueeze(1))

    def gain_numbers(self, codes: Tensor) -> Tensor:
        """(B, N) uint8, of codes without the tokens in front."""
        return unpack(codes[:, : packed_bytes(self.n_places, _GAIN_BITS)], self.n_places, _GAIN_BITS)

    def integers(self, codes: Tensor) -> list[Tensor]:
        """Levels by group, 8 bits first: (B, n) uint8 each, the same on every device.

        Args:
            codes: (B, code_bytes - lead_bytes) uint8.
        """
        return [unpack(codes[:, g.first_byte : g.end_byte], g.end - g.start, g.bits) for g in self._groups]

    def widened(self, codes: Tensor) -> Tensor:
        """(B,) int64: gains of each view that an overflow raised, of `n_places`."""
        self.check_codes(codes)
        return (self.gain_numbers(codes[:, self.lead_bytes :]) >= _FINE).sum(dim=1)

    def parameters_of(self) -> dict[str, Tensor]:
        """What the codec was built from."""
        return {name: getattr(self, name) for name in _TENSORS[:-1]} | {"calibration": self._calibration}

    def gains_for(self, scaled: Tensor) -> Tensor:
        """(B, K, N) coefficients in units of their scales to (B, N) int64 numbers of gains.

        The root mean square gives a gain; the next smaller and larger ones are tried too, and the least error decides:
        that of the levels before they were stretched, or the choice would undo the stretching.
        """
        fine = self.gains[:_FINE]
        size = scaled.square().mean(dim=1).sqrt_()
        first = torch.bucketize(size, (fine[1:] * fine[:-1]).sqrt())
        in_range = torch.maximum(scaled * self._inverse_high, scaled * self._inverse_low).amax(dim=1)
        best, least = torch.zeros_like(first), torch.full_like(size, torch.inf)
        for step in _TRIED_GAINS:
            numbers = (first + step).clamp_(0, _FINE - 1)
            error = self._error_of(scaled, fine[numbers])
            error = torch.where((in_range <= fine[numbers]) & (size <= fine[-1]), error, torch.inf)
            best, least = torch.where(error < least, numbers, best), torch.minimum(error, least)
        overflows = least == torch.inf
        views = overflows.any(dim=1).nonzero().flatten()
        if views.numel():
            best[views] = torch.where(overflows[views], self._coarse_gains_for(scaled[views]), best[views])
        return best

    def _coarse_gains_for(self, scaled: Tensor) -> Tensor:
        """Numbers of the coarse gains with the least error."""
        errors = [
            self._error_of(scaled, gain.expand(scaled.shape[0], self.n_places)) for gain in self.gains[_FINE:].unbind()
        ]
        return torch.stack(errors).argmin(dim=0) + _FINE

    def _error_of(self, scaled: Tensor, gain: Tensor) -> Tensor:
        """(B, N) squared error of the coefficients under (B, N) gains."""
        restored = self._restore(self._levels_for(scaled, gain)).mul_(gain.unsqueeze(1)).mul_(self._shrinkage)
        return restored.sub_(scaled).mul_(self.scale).square_().sum(dim=1)

    def _levels_for(self, scaled: Tensor, gain: Tensor) -> list[Tensor]:
        """Levels by group, (B, n) uint8 each."""
        ordered = (scaled / gain.unsqueeze(1)).reshape(scaled.shape[0], -1)
        if not self._is_in_order:
            ordered = torch.index_select(ordered, 1, self._order)
        found = []
        for group in self._groups:
            span = slice(group.start, group.end)
            bounds = getattr(self, f"_bounds_{group.bits}")
            found.append(nearest_levels(ordered[:, span], self._rows[span], bounds, group.bits))
        return found

    def _restore(self, levels: list[Tensor]) -> Tensor:
        """Levels by group to (B, K, N) float32, in units of scale and gain."""
        batch = levels[0].shape[0]
        places = torch.empty((batch, self._order.numel()), dtype=torch.int32, device=levels[0].device)
        for group, part in zip(self._groups, levels, strict=True):
            span = slice(group.start, group.end)
            torch.add(self._level_starts[span], part, out=places[:, span])
        values = torch.index_select(self.levels, 0, places.reshape(-1)).reshape(batch, -1)
        if not self._is_in_order:
            values = torch.index_select(values, 1, self._inverse)
        return values.reshape(batch, self.n_kept, self.n_places)

    def _lay_out(self) -> None:
        """Which coefficient has which bits, table and place; all of it follows from `bits`."""
        bits = self.bits.expand(self.n_kept, self.n_places).reshape(-1).long()
        order = torch.argsort(bits, descending=True, stable=True)
        component = order // self.n_places
        pair = bits[order] * self.n_kept + component
        is_new = torch.ones_like(pair, dtype=torch.bool)
        is_new[1:] = pair[1:] != pair[:-1]
        tables = is_new.cumsum(0) - 1
        table_bits = bits[order][is_new]
        sizes = 1 << table_bits
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        self._groups: list[_Group] = []
        first, byte, threshold = 0, packed_bytes(self.n_places, _GAIN_BITS), 0
        for b in range(MAX_BITS, 0, -1):
            n, n_tables = int((bits == b).sum()), int((table_bits == b).sum())
            if n == 0:
                continue
            end_byte = byte + packed_bytes(n, b)
            first_table = int(tables[first])
            self._groups.append(_Group(b, first, first + n, byte, end_byte, first_table))
            end = threshold + n_tables * ((1 << b) - 1)
            bounds = self.thresholds[threshold:end].reshape(n_tables, -1)
            self._keep(f"_bounds_{b}", torch.nn.functional.pad(bounds, (0, 1), value=torch.inf))
            first, byte, threshold = first + n, end_byte, end
        self.code_bytes = self.lead_bytes + byte
        self._is_in_order = bool((order == torch.arange(order.numel())).all())
        self._keep("_order", order.to(torch.int32))
        self._keep("_inverse", torch.argsort(order).to(torch.int32))
        first_tables = torch.tensor([group.first_table for group in self._groups])
        sizes_of_groups = torch.tensor([group.end - group.start for group in self._groups])
        self._keep("_rows", (tables - first_tables.repeat_interleave(sizes_of_groups)).to(torch.int32))
        self._keep("_level_starts", starts[tables].to(torch.int32))
        by_place = tables[torch.argsort(order)].reshape(self.n_kept, self.n_places)
        self._keep("table_of", by_place)
        by_place = by_place[:, : self.bits.shape[1]]
        self._keep("_shrinkage", 1 / self.stretch[by_place])
        self._keep("_inverse_low", 1 / self.low[by_place])
        self._keep("_inverse_high", 1 / self.high[by_place])
        self._keep("_dct", dct_matrix(max(1, self.side)))

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.contiguous(), persistent=False)


def _check(name: str, parameters: dict[str, Tensor], width: int, n_places: int, side: int) -> None:
    """Refuse parameters that do not belong together.

    Raises:
        FormatError: names what is wrong.
    """
    check_tensors(name, parameters, _DTYPES)
    bits = parameters["bits"]
    if bits.dim() != 2 or not 0 < bits.shape[0] <= width:
        raise FormatError(f"codec {name}: bits are {tuple(bits.shape)} in the parameters")
    if bits.shape[1] not in (1, n_places) or (bits.shape[1] > 1 and side == 0):
        raise FormatError(f"codec {name}: bits for {bits.shape[1]} places, and a view has {n_places} patches")
    if not bool(((bits >= 1) & (bits <= MAX_BITS)).all()):
        raise FormatError(f"codec {name}: a kept coefficient has no bits, or more than {MAX_BITS}")
    n_kept, tables = bits.shape[0], bits_of_tables(bits)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("stretch", "low", "high"), (len(tables),))
    shapes |= {"mean": (width,), "vectors": (width, n_kept), "scale": tuple(bits.shape), "gains": (1 << _GAIN_BITS,)}
    shapes |= {"levels": (sum(1 << b for b in tables),), "thresholds": (sum((1 << b) - 1 for b in tables),)}
    check_shapes(name, parameters, shapes | {"calibration": (N_NUMBERS,)})
    gains = parameters["gains"]
    if not bool((gains[:_FINE].diff() > 0).all() and (gains[_FINE:].diff() > 0).all() and (gains > 0).all()):
        raise FormatError(f"codec {name}: the gains do not rise")
    if not bool((parameters["scale"] > 0).all() and (parameters["stretch"] > 0).all()):
        raise FormatError(f"codec {name}: a scale or a stretch is not above 0")
    if not bool((parameters["low"] < 0).all() and (parameters["high"] > 0).all()):
        raise FormatError(f"codec {name}: the range of a table does not hold its mean")
