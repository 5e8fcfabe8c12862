"""`float32` and `float16`: the tokens themselves, as little-endian bytes."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from proteus_cache.codecs.codec import Codec, read_as
from proteus_cache.codecs.record import CodecRecord

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class DenseCodec(Codec):
    """Lossless (`float32`), or rounded to half precision (`float16`).

    A value beyond the float16 range (65,504) cannot be stored as float16 and is not clipped: it becomes infinite,
    which extraction detects and refuses.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        if sys.byteorder != "little":
            raise RuntimeError("codes are little-endian; this machine is not")
        self.name = name
        self.shape = shape
        self.dtype = _DTYPES[name]
        self.code_bytes = math.prod(shape) * self.dtype.itemsize

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, *shape) float32 to (B, code_bytes) uint8."""
        return tokens.to(self.dtype).reshape(tokens.shape[0], -1).contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, code_bytes) uint8 to (B, *shape) float32."""
        return read_as(codes, self.dtype).to(torch.float32).reshape(codes.shape[0], *self.shape)

    def parameters_blob(self) -> None:
        """None: there are no parameters."""
        return None

    def record(self) -> CodecRecord:
        """What a manifest keeps of this codec."""
        return CodecRecord(
            name=self.name,
            code_bytes=self.code_bytes,
            parameters=None,
            array_dtype=self.name,  # type: ignore[arg-type]  # likewise
            array_shape=list(self.shape),
        )
