"""`manifest.json`: what made a cache. Immutable; its digest is the identity that receipts carry."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from proteus_cache.codecs.record import CodecRecord
from proteus_cache.documents import Document

_SHA256 = r"^[0-9a-f]{64}$"
_MOST_VALUES = 1 << 24
"""In one view's tokens. The largest real ones (37 x 37 patches of width 1,536) are 2 million."""


def _refuse_giants(shape: list[int]) -> list[int]:
    if math.prod(shape) > _MOST_VALUES:
        raise ValueError(f"{' x '.join(map(str, shape))} are more than {_MOST_VALUES:,} values")
    return shape


TokenShape = Annotated[
    list[Annotated[int, Field(ge=1, le=65_536)]], Field(min_length=1, max_length=2), AfterValidator(_refuse_giants)
]
"""(D,) or (T, D) of one view's tokens, of a size that a reader can trust itself to hold."""


class TeacherRecord(Document):
    """The frozen model that made the targets."""

    name: str
    implementation: str
    architecture: dict[str, Any]  # arguments of the implementation's constructor, JSON values
    weights_source: str
    weights_sha256: str = Field(pattern=_SHA256)
    licence: str
    size_px: int = Field(ge=1)
    patch_px: int = Field(ge=1)
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    n_register_tokens: int = Field(ge=0)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    precision: Literal["fp32", "fp16", "bf16"]


class ImagesRecord(Document):
    """The frozen image list, `images.parquet`."""

    n_images: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256)
    classes: list[str] | None
    """Class names by label, or None for images without labels."""
    n_probe: int = Field(ge=0)
    held_out: list[int]
    """Shards that training never draws from."""


class ViewsRecord(Document):
    """How an image becomes a view."""

    augment: Literal["deit", "none"]
    size_px: int = Field(ge=1)
    view_format: Literal["jpeg", "png"]
    jpeg_quality: int | None
    jpeg_subsampling: str | None
    seed: int = Field(ge=0)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    decoder: str
    """Library whose decoding of the stored bytes the teacher saw."""


class TargetRecord(Document):
    """One target: its shape for one view and its codec."""

    name: str = Field(pattern=r"^(cls|patch|block\.\d{1,3}(\.raw)?)$")
    shape: TokenShape
    codec: CodecRecord


class Manifest(Document):
    """All that decides what a cache holds, but for how many view indices are extracted so far."""

    format: Literal["proteus-cache/cache"] = "proteus-cache/cache"
    version: Literal[1] = 1
    teacher: TeacherRecord
    images: ImagesRecord
    views: ViewsRecord
    targets: list[TargetRecord] = Field(min_length=1)
    shard_size: int = Field(ge=1)
    libraries: dict[str, str]
    licences: dict[str, str]

    @property
    def n_shards(self) -> int:
        """Shards of every view index."""
        return -(-self.images.n_images // self.shard_size)

    @property
    def n_probe_shards(self) -> int:
        """Shards of the probe."""
        return -(-self.images.n_probe // self.shard_size)

    @property
    def bytes_per_view(self) -> int:
        """Bytes of one view's codes."""
        return sum(target.codec.code_bytes for target in self.targets)
