"""`manifest.json`: what made a cache. Immutable; its digest is the identity that receipts carry."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from proteus_cache.codecs.record import CodecRecord
from proteus_cache.documents import Column, Document, Notes, Sha256, Text
from proteus_cache.views.spec import MAX_SIZE_PX

MAX_IMAGES = (1 << 32) - 2
"""An index record has 32 bits for an image's row."""
MAX_SHARD_SIZE = 1 << 20
MAX_TARGETS = 256
"""Of a cache or pack; a teacher of 64 blocks can have 130."""
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

    name: Text
    implementation: Text
    architecture: dict[Text, Any]  # arguments of the implementation's constructor, JSON values
    weights_source: Text
    weights_sha256: Sha256
    licence: Text
    size_px: int = Field(ge=1, le=MAX_SIZE_PX)
    patch_px: int = Field(ge=1, le=MAX_SIZE_PX)
    width: int = Field(ge=1, le=65_536)
    depth: int = Field(ge=1, le=1000)
    n_register_tokens: int = Field(ge=0, le=1000)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    precision: Literal["fp32", "fp16", "bf16"]


class ImagesRecord(Document):
    """The frozen image list, `images.parquet`."""

    n_images: int = Field(ge=1, le=MAX_IMAGES)
    sha256: Sha256
    classes: Column[Text] | None
    """Class names by label, or None for images without labels."""
    n_probe: int = Field(ge=0, le=MAX_IMAGES)
    held_out: Column[int]
    """Shards that training never draws from."""


class ViewsRecord(Document):
    """How an image becomes a view."""

    augment: Literal["deit", "none"]
    size_px: int = Field(ge=1, le=MAX_SIZE_PX)
    view_format: Literal["jpeg", "png"]
    jpeg_quality: int | None
    jpeg_subsampling: Text | None
    seed: int = Field(ge=0)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    decoder: Text
    """Library whose decoding of the stored bytes the teacher saw."""


class TargetRecord(Document):
    """One target: its shape for one view and its codec."""

    name: str = Field(pattern=r"^(cls|patch|block\.[0-9]{1,3}(\.raw)?)$")
    shape: TokenShape
    codec: CodecRecord


_Projections = Annotated[
    list[Annotated[list[float], Field(min_length=32, max_length=32)]], Field(min_length=4, max_length=4)
]


class CanaryRecord(Document):
    """What teacher and decoder gave for fixed input when the cache was planned; every extracting process compares."""

    projections: dict[str, _Projections]
    """Target to the 32 sums with signs of what the teacher said of each of the four canary images."""
    rms: dict[str, float]
    """Target to the root mean square of its values over the planning views."""
    decoded: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]
    """Built-in JPEG to the digest of the pixels that it decoded to."""


class Manifest(Document):
    """All that decides what a cache holds, but for how many view indices are extracted so far."""

    format: Literal["proteus-cache/cache"] = "proteus-cache/cache"
    version: Literal[1] = 1
    teacher: TeacherRecord
    images: ImagesRecord
    views: ViewsRecord
    targets: Column[TargetRecord] = Field(min_length=1, max_length=MAX_TARGETS)
    shard_size: int = Field(ge=1, le=MAX_SHARD_SIZE)
    libraries: Notes
    licences: Notes
    canary: CanaryRecord | None = None
    """None in caches that were planned before there were canaries."""

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
