"""What a store must remember of a codec to read its codes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proteus_cache.codecs.names import NAME_PATTERN
from proteus_cache.documents import Document

MAX_CODE_BYTES = 64 << 20


class CodecRecord(Document):
    """One codec of one target: enough to find its parameters and to lay out its Zarr array."""

    name: str = Field(pattern=NAME_PATTERN)
    """As asked for, for example "int8" or "klt:20dB"."""
    layout: int = Field(default=1, ge=1)
    """Version of the meaning of its codes; any change to decoded values raises it, and other ones are refused."""
    code_bytes: int = Field(gt=0, le=MAX_CODE_BYTES)
    """Bytes of one view's codes."""
    parameters: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the fitted parameters, stored as `codec/SHA256.safetensors`; None for codecs without any."""
    array_dtype: Literal["uint8", "float16", "float32"]
    array_shape: list[Annotated[int, Field(gt=0, le=MAX_CODE_BYTES)]] = Field(min_length=1, max_length=2)
    """Type and shape of one row of the Zarr array; its little-endian bytes are the codes."""
