"""The codec interface, and the one place that turns names and records into codecs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor, nn

from proteus_cache.codecs.calibration import CalibrationReport, check_calibration
from proteus_cache.codecs.names import codec_for_target as codec_for_target
from proteus_cache.codecs.names import parse_codec
from proteus_cache.codecs.record import CodecRecord
from proteus_cache.errors import ChecksumError, FormatError


@dataclass(frozen=True, slots=True)
class Basis:
    """The directions in which a codec says anything of a token; losses look along these only."""

    mean: Tensor
    """(D,) float32: the token that has only zeros as components."""
    vectors: Tensor
    """(D, K) float32 with orthonormal columns; `(token - mean) @ vectors` are its components."""
    n_lead: int
    """Tokens in front (the CLS token of a block) that are stored whole, in all channels."""


class Codec(nn.Module, ABC):
    """Tokens of one target to fixed-size codes and back.

    Attributes:
        name: as asked for and recorded, for example "int8".
        shape: of one view's tokens: (D,) for `cls`, (T, D) for all others.
        code_bytes: bytes of one view's codes.
        calibration: what fitting it showed; None for a codec without a distribution to fit.
    """

    name: str
    shape: tuple[int, ...]
    code_bytes: int
    calibration: CalibrationReport | None = None

    @abstractmethod
    def encode(self, tokens: Tensor) -> Tensor:
        """(B, *shape) float32 to (B, code_bytes) uint8, on the same device; nothing is clipped."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """(B, code_bytes) uint8 to (B, *shape) float32, on the same device."""

    @property
    def basis(self) -> Basis | None:
        """Where losses have to look; None: at all channels, for nothing is left out."""
        return None

    def components(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What `decode` gives, without the way back from components to channels.

        Args:
            codes: (B, code_bytes) uint8.

        Returns:
            (B, n_lead, D) and (B, T - n_lead, K) float32, see `Basis`.

        Raises:
            TypeError: the codec has no basis.
        """
        raise TypeError(f"codec {self.name} has no basis")

    def widened(self, codes: Tensor) -> Tensor:
        """(B,) int64: steps of each view that an overflow widened, of `n_steps`; 0 where none can be."""
        return torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)

    def check_codes(self, codes: Tensor) -> None:
        """Refuse codes that are not (B, code_bytes) uint8.

        Raises:
            FormatError: they were cut short, or are those of another codec.
        """
        if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != self.code_bytes:
            raise FormatError(
                f"codec {self.name}: a view has {self.code_bytes} bytes of codes, and these are "
                f"{'x'.join(map(str, codes.shape))} of {codes.dtype}; they were cut short or belong to another codec"
            )

    @abstractmethod
    def parameters_blob(self) -> bytes | None:
        """Fitted parameters as safetensors bytes, equal for equal parameters; None without any."""

    @abstractmethod
    def record(self) -> CodecRecord:
        """What a manifest keeps of this codec."""


class FittedCodec(Codec):
    """A codec with parameters: they make up its blob, and its codes are plain bytes."""

    @abstractmethod
    def parameters_of(self) -> dict[str, Tensor]:
        """What the codec was built from, by name."""

    def parameters_blob(self) -> bytes:
        """Everything that was fitted, as safetensors."""
        return save({name: value.cpu() for name, value in self.parameters_of().items()})

    def record(self) -> CodecRecord:
        """What a manifest keeps of this codec."""
        return CodecRecord(
            name=self.name,
            code_bytes=self.code_bytes,
            parameters=hashlib.sha256(self.parameters_blob()).hexdigest(),
            array_dtype="uint8",
            array_shape=[self.code_bytes],
        )


def largest_value(codec: str) -> float:
    """The largest magnitude that a teacher's outputs may have under a codec: float16 is part of all but `float32`."""
    return torch.finfo(torch.float32 if codec == "float32" else torch.float16).max


def fit_codec(codec: str, tokens: Tensor, *, device: str | torch.device = "cpu") -> Codec:
    """A codec for tokens like these, on the CPU.

    Args:
        codec: its name, with its goal where it has one.
        tokens: (n, *shape) float32 or float16 of calibration views; codecs without parameters only take the shape.
        device: where to compute.

    Raises:
        ConfigError: no codec has this name, the tokens are too few, constant or not finite, or no codec of this kind
            reaches the goal; the message names the nearest that one can have.
    """
    from proteus_cache.codecs.dense import DenseCodec
    from proteus_cache.codecs.scalar import Int8Codec

    choice = parse_codec(codec)
    if choice.family in ("float32", "float16"):
        return DenseCodec(codec, tuple(tokens.shape[1:]))
    check_calibration(codec, tokens)
    if choice.family == "int8":
        return Int8Codec.fit(tokens)
    if choice.family == "int4":
        from proteus_cache.codecs.int4 import fit_int4

        return fit_int4(tokens, device)
    from proteus_cache.codecs.klt_fit import fit_klt

    return fit_klt(choice, tokens, device)


def load_codec(record: CodecRecord, shape: tuple[int, ...], blob: bytes | None) -> Codec:
    """The codec that a manifest or pack recorded.

    Args:
        record: from the store.
        shape: of one view's tokens.
        blob: the bytes of `codec/SHA256.safetensors` where the record names one.

    Raises:
        ChecksumError: the blob is not the recorded one.
        FormatError: record, shape and blob do not fit together, or another version wrote the codes.
    """
    from proteus_cache.codecs.dense import DenseCodec
    from proteus_cache.codecs.scalar import Int8Codec

    if record.layout != 1:
        raise FormatError(
            f"codec {record.name}: its codes have layout {record.layout}, and this version of proteus-cache reads "
            "layout 1; install a newer one"
        )
    if (record.parameters is None) != (blob is None):
        raise FormatError(f"codec {record.name}: the record and the stored parameters do not belong together")
    if blob is not None and hashlib.sha256(blob).hexdigest() != record.parameters:
        raise ChecksumError(f"codec/{record.parameters}.safetensors: damaged; its digest is another one")
    family = parse_codec(record.name).family
    codec: Codec
    if family in ("float32", "float16"):
        codec = DenseCodec(record.name, shape)
    elif blob is None:
        raise FormatError(f"codec {record.name}: its parameters are not stored")
    elif family == "int8":
        codec = Int8Codec.from_blob(blob, shape)
    elif family == "int4":
        from proteus_cache.codecs.int4 import Int4Codec

        codec = Int4Codec.from_blob(blob, shape)
    else:
        from proteus_cache.codecs.klt import KltCodec

        codec = KltCodec.from_blob(record.name, blob, shape)
    if codec.record() != record:
        raise FormatError(f"codec {record.name}: the recorded layout is not that of tokens of shape {shape}")
    return codec


def read_as(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, n) uint8 codes as (B, n / itemsize) numbers of another type.

    A row alone counts as contiguous wherever it begins, so one that begins at an odd byte has to be copied to be read.
    """
    size = dtype.itemsize
    batch, n_bytes = codes.shape
    is_aligned = codes.is_contiguous() and codes.storage_offset() % size == 0
    flat = (codes if is_aligned else codes.clone(memory_format=torch.contiguous_format)).reshape(-1)
    return flat.view(dtype).reshape(batch, n_bytes // size)


def relative_mse(tokens: Tensor, decoded: Tensor) -> float:
    """Squared error over the variance about the per-channel mean, both summed over everything; no unit."""
    dimensions = tuple(range(tokens.dim() - 1))
    centred = (tokens - tokens.mean(dim=dimensions)).double()
    return float((decoded - tokens).double().square().sum() / centred.square().sum().clamp_min(torch.finfo().tiny))
