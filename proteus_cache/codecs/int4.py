"""`int4`: a mean, a scale and 16 levels for every channel, one gain for every token.

Codes of one view of T tokens of width D, `2 T + T ceil(D / 2)` bytes:

    T x float16            gain of each token, little-endian; below 0 where a value overflowed
    T x ceil(D/2) x uint8  levels q, 0 to 15, of channels 2 j (low four bits) and 2 j + 1 (high) in byte j, row by row;
                           where D is odd the last high bits are 0

    x'[t, c] = mean[c] + |gain[t]| * levels[c, q[t, c]]

A token's gain is the root mean square of its channels in units of their scales. The levels are those of a Lloyd-Max
quantiser of (x - mean) / (scale * gain), fitted on calibration views, times scale, times the factor that makes the
slope of decoded on original 1. Beyond 1.25 times what calibration showed of its channel a value overflows: then its
token takes that power of two as gain that leaves the least error. This coarsens or clips this token and no other, and
the sign counts it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proteus_cache.codecs.calibration import N_NUMBERS, CalibrationReport
from proteus_cache.codecs.codec import FittedCodec, read_as
from proteus_cache.codecs.lloyd import Histograms, nearest_levels, thresholds_of, unbiased_scale
from proteus_cache.codecs.parameters import check_shapes, check_tensors, load_parameters
from proteus_cache.codecs.waterfill import gaussian_rate
from proteus_cache.errors import FormatError

_BITS = 4
_LEVELS = 1 << _BITS
MARGIN = 1.25
"""Of the range that calibration showed, beyond which a value overflows."""
_AT_ONCE = 1 << 14
"""Tokens."""
_SMALLEST_GAIN = 2.0**-14
"""Of a normal float16."""
_TENSORS = ("mean", "levels", "inverse_scale", "thresholds", "low", "high", "calibration")
_DTYPES = dict.fromkeys(_TENSORS[:-1], torch.float32) | {"calibration": torch.float64}
_COARSE_GAINS = tuple(2.0**octave for octave in range(-4, 16))
_LARGEST_GAIN = 60_000.0
"""Of a token whose values do not overflow; float16 ends at 65,504."""


class Int4Codec(FittedCodec):
    """Four bits a value, sixteen more a token.

    Args:
        shape: of one view's tokens, (T, D) or (D,).
        parameters: `mean`, `inverse_scale`, `low`, `high` (D,), `levels` (D, 16) and `thresholds` (D, 15) float32,
            `calibration` as `CalibrationReport.to_tensor` gives.

    Raises:
        FormatError: the parameters are not those of such tokens.
    """

    mean: Tensor
    levels: Tensor
    inverse_scale: Tensor
    thresholds: Tensor
    low: Tensor
    high: Tensor
    pairs: Tensor
    pair_rows: Tensor
    channels: Tensor
    _bounds: Tensor

    def __init__(self, shape: tuple[int, ...], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.name = "int4"
        self.shape = shape
        self.n_tokens = math.prod(shape[:-1])
        self.width = width = shape[-1]
        self.row_bytes = -(-width // 2)
        self.code_bytes = self.n_tokens * (2 + self.row_bytes)
        _check(parameters, width)
        for name in _TENSORS[:-1]:
            self.register_buffer(name, parameters[name].to(torch.float32).contiguous())
        self._calibration = parameters["calibration"]
        self.calibration = CalibrationReport.from_tensor(self._calibration)
        self.register_buffer("channels", torch.arange(width, dtype=torch.int32), persistent=False)
        self.register_buffer("pairs", _pair_table(self.levels), persistent=False)
        self.register_buffer("pair_rows", torch.arange(self.row_bytes, dtype=torch.int32) * 256, persistent=False)
        open_end = torch.full((width, 1), torch.inf)
        self.register_buffer("_bounds", torch.cat((self.thresholds, open_end), dim=1), persistent=False)

    @classmethod
    def from_blob(cls, blob: bytes, shape: tuple[int, ...]) -> Int4Codec:
        """The codec that `parameters_blob` described.

        Raises:
            FormatError: other tensors, or of another width.
        """
        return cls(shape, load_parameters("int4", blob, _DTYPES))

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, *shape) float32 to (B, code_bytes) uint8; non-finite tokens give meaningless codes."""
        batch = tokens.shape[0]
        scaled = (tokens.reshape(batch, self.n_tokens, self.width).float() - self.mean) * self.inverse_scale
        gain = self._gains_for(scaled)
        size = gain.abs().float().unsqueeze(-1).clamp_min(_SMALLEST_GAIN)
        levels = nearest_levels(scaled.div_(size), self.channels, self._bounds, _BITS)
        if self.width % 2:
            levels = torch.nn.functional.pad(levels, (0, 1))
        packed = levels[..., 0::2] | (levels[..., 1::2] << _BITS)
        return torch.cat((gain.view(torch.uint8).reshape(batch, -1), packed.reshape(batch, -1)), dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, code_bytes) uint8 to (B, *shape) float32.

        Raises:
            FormatError: the codes were cut short.
        """
        self.check_codes(codes)
        batch = codes.shape[0]
        gain = self._gain_of(codes).abs().float()
        packed = codes[:, 2 * self.n_tokens :].reshape(batch, self.n_tokens, self.row_bytes)
        # One look-up gives both channels of a byte, as the two halves of a complex number.
        both = torch.index_select(self.pairs, 0, torch.add(self.pair_rows, packed).reshape(-1))
        values = torch.view_as_real(both).reshape(batch, self.n_tokens, 2 * self.row_bytes)[..., : self.width]
        return torch.addcmul(self.mean, values, gain.unsqueeze(-1)).reshape(batch, *self.shape)

    def widened(self, codes: Tensor) -> Tensor:
        """(B,) int64: tokens of each view in which a value overflowed."""
        self.check_codes(codes)
        return (self._gain_of(codes) < 0).sum(dim=1)

    def parameters_of(self) -> dict[str, Tensor]:
        """What the codec was built from."""
        return {name: getattr(self, name) for name in _TENSORS[:-1]} | {"calibration": self._calibration}

    def _gains_for(self, scaled: Tensor) -> Tensor:
        """(B, T, D) channels in units of their scale to (B, T) float16 gains; below 0 where a value overflowed."""
        size = scaled.square().mean(dim=-1).sqrt_()
        overflows = torch.maximum(scaled / self.high, scaled / self.low).amax(dim=-1) > size
        gains = size.clamp(_SMALLEST_GAIN, _LARGEST_GAIN).to(torch.float16)
        where = (overflows | (size > _LARGEST_GAIN)).nonzero(as_tuple=True)
        if where[0].numel():
            gains[where] = -self._coarse_gains_for(scaled[where])
        return gains

    def _coarse_gains_for(self, scaled: Tensor) -> Tensor:
        """(n, D) channels of tokens to (n,) float16: the powers of two that leave the least error."""
        found = []
        for gain in _COARSE_GAINS:
            levels = nearest_levels(scaled / gain, self.channels, self._bounds, _BITS).long()
            decoded = torch.gather(self.levels.T, 0, levels) * gain
            found.append((decoded - scaled / self.inverse_scale).square().sum(dim=-1))
        gains = torch.tensor(_COARSE_GAINS, dtype=torch.float16, device=scaled.device)
        return gains[torch.stack(found).argmin(dim=0)]

    def _gain_of(self, codes: Tensor) -> Tensor:
        """(B, T) float16."""
        return read_as(codes[:, : 2 * self.n_tokens], torch.float16)


def _pair_table(levels: Tensor) -> Tensor:
    """(D, 16) levels to (ceil(D/2) * 256,) complex64: what the two channels of a byte decode to."""
    width = levels.shape[0]
    if width % 2:
        levels = torch.cat((levels, torch.zeros(1, _LEVELS)))
    byte = torch.arange(256)
    both = torch.stack((levels[0::2][:, byte % _LEVELS], levels[1::2][:, byte // _LEVELS]), dim=-1)
    return torch.view_as_complex(both.reshape(-1, 2).contiguous())


def _check(parameters: dict[str, Tensor], width: int) -> None:
    check_tensors("int4", parameters, _DTYPES)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_TENSORS, (width,))
    shapes |= {"levels": (width, _LEVELS), "thresholds": (width, _LEVELS - 1), "calibration": (N_NUMBERS,)}
    check_shapes("int4", parameters, shapes)
    is_usable = (parameters["low"] < 0) & (parameters["high"] > 0) & (parameters["inverse_scale"] > 0)
    if not bool(is_usable.all()):
        raise FormatError("codec int4: the range of a channel does not hold its mean, or a scale is not above 0")


def fit_int4(tokens: Tensor, device: str | torch.device = "cpu") -> Int4Codec:
    """A codec for tokens like these.

    Args:
        tokens: (n, *shape) float of calibration views; every eighth view only tests the tables.
        device: where to compute.
    """
    shape = tuple(tokens.shape[1:])
    width = shape[-1]
    is_test = torch.arange(tokens.shape[0]) % 8 == 7
    fitted = tokens[~is_test].reshape(-1, width)
    tested = (tokens[is_test] if bool(is_test.any()) else tokens).reshape(-1, width)
    mean, scale = _moments(fitted, device)

    def scaled(rows: Tensor) -> Tensor:
        return (rows.to(device, torch.float32) - mean) / scale

    channels = torch.arange(width, dtype=torch.int32, device=device)
    histograms = Histograms(width, device)
    for rows in torch.split(fitted, _AT_ONCE):
        values = scaled(rows)
        histograms.add(values / _root_mean_square(values), channels.long())
    levels = histograms.levels(_BITS, channels.long()).float()
    thresholds = thresholds_of(levels)
    bounds = torch.cat((thresholds, torch.full((width, 1), torch.inf, device=device)), dim=1)
    products = torch.zeros(width, dtype=torch.float64, device=device)
    squares = torch.zeros_like(products)
    for rows in torch.split(fitted, _AT_ONCE):
        values = scaled(rows)
        size = _root_mean_square(values).to(torch.float16).float()
        cells = nearest_levels(values / size, channels, bounds, _BITS).long()
        decoded = torch.gather(levels.T, 0, cells) * size
        products += (values.double() * decoded).sum(dim=0)
        squares += values.double().square().sum(dim=0)
    stretched = levels * (unbiased_scale(products, squares).float() * scale).unsqueeze(1)
    parameters = {
        "mean": mean,
        "levels": stretched,
        "inverse_scale": 1 / scale,
        "thresholds": thresholds,
        "low": histograms.low * MARGIN,
        "high": histograms.high * MARGIN,
    }
    parameters = {name: value.cpu() for name, value in parameters.items()}
    n_tokens = fitted.shape[0]
    draft = Int4Codec(shape, parameters | {"calibration": torch.zeros(N_NUMBERS, dtype=torch.float64)})
    report = _test(draft, tested.reshape(-1, *shape), tokens.shape[0], n_tokens)
    return Int4Codec(shape, parameters | {"calibration": report.to_tensor()})


def _moments(rows: Tensor, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(D,) mean and standard deviation; a channel that hardly varies gets a thousandth of the mean deviation."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=device)
    for part in torch.split(rows, _AT_ONCE):
        total += part.to(device, torch.float64).sum(dim=0)
    mean = total / rows.shape[0]
    squares = torch.zeros_like(mean)
    for part in torch.split(rows, _AT_ONCE):
        squares += (part.to(device, torch.float64) - mean).square().sum(dim=0)
    scale = (squares / rows.shape[0]).sqrt()
    return mean.float(), scale.clamp_min(max(float(scale.mean()) * 1e-3, 1e-12)).float()


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(_SMALLEST_GAIN)


def _test(codec: Int4Codec, views: Tensor, n_views: int, n_tokens: int) -> CalibrationReport:
    """What the codec does to views that it was not fitted to."""
    width = codec.width
    error, squares = 0.0, torch.zeros(width, dtype=torch.float64)
    n_rows = 0
    for part in torch.split(views, max(1, _AT_ONCE // codec.n_tokens)):
        part = part.float()
        decoded = codec.decode(codec.encode(part))
        error += float((decoded - part).double().square().sum())
        squares += (part - codec.mean).double().reshape(-1, width).square().sum(dim=0)
        n_rows += part.numel() // width
    variances = squares / n_rows
    bits = 8 * codec.code_bytes / (codec.n_tokens * width)
    mean_error = error / (n_rows * width)
    return CalibrationReport(
        n_views=n_views,
        n_tokens=n_tokens,
        snr_db=10 * math.log10(max(float(variances.mean()), 1e-300) / max(mean_error, 1e-300)),
        bits_per_value=bits,
        gap_bits=bits - gaussian_rate(variances, mean_error),
        n_kept=width,
        width=width,
        dct=False,
        dct_saves_bits=0.0,
        transform_bound_excess_bits=0.0,
    )
