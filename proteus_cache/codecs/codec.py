"""The codec interface, and the one place that turns names and records into codecs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from proteus_cache.choices import unknown
from proteus_cache.codecs.names import CODEC_NAMES
from proteus_cache.codecs.names import codec_for_target as codec_for_target
from proteus_cache.codecs.record import CodecRecord
from proteus_cache.errors import ChecksumError, ConfigError, FormatError


class Codec(nn.Module, ABC):
    """Tokens of one target to fixed-size codes and back.

    Attributes:
        name: as asked for and recorded, for example "int8".
        shape: of one view's tokens: (D,) for `cls`, (T, D) for all others.
        code_bytes: bytes of one view's codes.
    """

    name: str
    shape: tuple[int, ...]
    code_bytes: int

    @abstractmethod
    def encode(self, tokens: Tensor) -> Tensor:
        """(B, *shape) float32 to (B, code_bytes) uint8, on the same device; nothing is clipped."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """(B, code_bytes) uint8 to (B, *shape) float32, on the same device."""

    @abstractmethod
    def parameters_blob(self) -> bytes | None:
        """Fitted parameters as safetensors bytes, equal for equal parameters; None without any."""

    @abstractmethod
    def record(self) -> CodecRecord:
        """What a manifest keeps of this codec."""


def largest_value(codec: str) -> float:
    """The largest magnitude that a teacher's outputs may have under a codec: float16 is part of all but `float32`."""
    return torch.finfo(torch.float32 if codec == "float32" else torch.float16).max


def fit_codec(codec: str, tokens: Tensor) -> Codec:
    """A codec for tokens like these.

    Args:
        codec: its name.
        tokens: (n, *shape) float32 of calibration views; codecs without parameters only take the shape.

    Raises:
        ConfigError: no codec has this name, or there are no tokens to fit one to.
    """
    from proteus_cache.codecs.dense import DenseCodec
    from proteus_cache.codecs.scalar import Int8Codec

    if codec in ("float32", "float16"):
        return DenseCodec(codec, tuple(tokens.shape[1:]))
    if codec != "int8":
        raise ConfigError(unknown("codec", codec, CODEC_NAMES))
    if tokens.shape[0] == 0:
        raise ConfigError("codec int8 is fitted to calibration views, and there are none")
    return Int8Codec.fit(tokens)


def load_codec(record: CodecRecord, shape: tuple[int, ...], blob: bytes | None) -> Codec:
    """The codec that a manifest or pack recorded.

    Args:
        record: from the store.
        shape: of one view's tokens.
        blob: the bytes of `codec/SHA256.safetensors` where the record names one.

    Raises:
        ChecksumError: the blob is not the recorded one.
        FormatError: record, shape and blob do not fit together.
    """
    from proteus_cache.codecs.dense import DenseCodec
    from proteus_cache.codecs.scalar import Int8Codec

    if (record.parameters is None) != (blob is None):
        raise FormatError(f"codec {record.name}: the record and the stored parameters do not belong together")
    if blob is not None and hashlib.sha256(blob).hexdigest() != record.parameters:
        raise ChecksumError(f"codec/{record.parameters}.safetensors: damaged; its digest is another one")
    codec: Codec
    if record.name == "int8":
        if blob is None:
            raise FormatError("codec int8: its parameters are not stored")
        codec = Int8Codec.from_blob(blob, shape)
    else:
        codec = DenseCodec(record.name, shape)
    if codec.record() != record:
        raise FormatError(f"codec {record.name}: the recorded layout is not that of tokens of shape {shape}")
    return codec


def relative_mse(tokens: Tensor, decoded: Tensor) -> float:
    """Squared error over the variance about the per-channel mean, both summed over everything; no unit."""
    dimensions = tuple(range(tokens.dim() - 1))
    centred = (tokens - tokens.mean(dim=dimensions)).double()
    return float((decoded - tokens).double().square().sum() / centred.square().sum().clamp_min(torch.finfo().tiny))
