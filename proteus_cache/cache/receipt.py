"""`receipts/VIEW/SHARD.json`: proof that one unit is finished, and the digests of all that belongs to it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from proteus_cache.documents import Column, Crc32c, Document, Notes, Sha256, Text

Key = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
"""Of a sample."""
ViewDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class FileRecord(Document):
    """Size in bytes and SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: Sha256


class Quarantined(Document):
    """One image that cannot become a view."""

    row: int = Field(ge=0)
    key: Text
    path: Text
    reason: Text


class Moments(Document):
    """Statistics of one target over one unit, before the codec."""

    mean: float
    mean_square: float
    absmax: float


class Samples(Document):
    """Columns over the stored views of a unit, in row order."""

    rows: Column[int]
    keys: Column[Key]
    view_digests: Column[ViewDigest]
    source_sha256: Column[Sha256]
    """Of the image files."""
    crc32c: dict[Text, Column[Crc32c]]
    """Target name to the CRC-32C of each view's codes."""

    @model_validator(mode="after")
    def _columns_agree(self) -> Self:
        texts = (self.keys, self.view_digests, self.source_sha256)
        lengths = {len(self.rows), *map(len, texts), *map(len, self.crc32c.values())}
        if len(lengths) != 1:
            raise ValueError("columns have different lengths")
        if any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError("rows do not ascend")
        return self


class Receipt(Document):
    """One finished unit."""

    format: Literal["proteus-cache/receipt"] = "proteus-cache/receipt"
    version: Literal[1] = 1
    manifest: Sha256
    """Digest of the cache's manifest."""
    view: str = Field(pattern=r"^(v[0-9]{3,5}|probe)$")
    shard: int = Field(ge=0)
    first_row: int = Field(ge=0)
    end_row: int = Field(ge=1)
    """Array rows of the unit: first_row to end_row - 1."""
    precision: Literal["fp32", "fp16", "bf16"]
    """Of the teacher's forward; fp32 where a unit had to be redone."""
    files: dict[Text, FileRecord]
    """Relative path to the record of every file of the unit."""
    zarr: dict[Text, Sha256]
    """Relative path to the SHA-256 of every zarr.json above the unit's arrays."""
    samples: Samples
    quarantined: Column[Quarantined]
    moments: dict[Text, Moments]
    widened: dict[Text, int] = Field(default_factory=dict)
    """Target name to the steps of codes that an overflow widened; without those that have none."""
    made_with: Notes
    """Versions and device that produced this unit."""
