"""`pack.json`: what a pack is, where it comes from, and the size and digest of every file. Written last."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from proteus_cache.cache.layout import PROBE, is_view, view_name
from proteus_cache.cache.manifest import MAX_IMAGES, MAX_SHARD_SIZE, MAX_TARGETS, TeacherRecord, TokenShape, ViewsRecord
from proteus_cache.cache.receipt import FileRecord
from proteus_cache.codecs.record import CodecRecord
from proteus_cache.documents import Column, Document, Notes, Sha256, Text
from proteus_cache.tar import END, member_bytes


def _is_canonical(view: str) -> bool:
    return is_view(view) and (view == PROBE or view_name(int(view[1:])) == view)


class CacheIdentity(Document):
    """The cache that a pack was made from."""

    manifest: Sha256
    """Digest of its manifest."""
    cache_id: Sha256
    """Of all view indices that were complete when the pack was made."""
    view_ids: dict[Text, Sha256]
    """Of each packed view index, the probe among them."""


class PackTarget(Document):
    """One target in the codes of a sample."""

    name: str = Field(pattern=r"^(cls|patch|block\.[0-9]{1,3}(\.raw)?)$")
    shape: TokenShape
    codec: CodecRecord
    offset: int = Field(ge=0)
    """First byte in the codes of a sample; `codec.code_bytes` follow."""


class PackTar(Document):
    """One tar: its size, digest, and number of samples."""

    size: int = Field(ge=1024)
    sha256: Sha256
    receipt: Sha256
    """Digest of the receipt of the cache's unit that it was made from."""
    n_samples: int = Field(ge=0, le=MAX_SHARD_SIZE)


class PackView(Document):
    """One view index, or the probe."""

    index: FileRecord
    n_samples: int = Field(ge=0, le=MAX_IMAGES)
    tars: Column[PackTar] = Field(min_length=1)
    """By shard, from 0."""

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if self.n_samples != sum(tar.n_samples for tar in self.tars):
            raise ValueError("n_samples is not the sum over the tars")
        if self.index.size != 64 * (1 + self.n_samples):
            raise ValueError("the index is not as long as its samples ask for")
        return self


class PackDocument(Document):
    """The whole description of a pack."""

    format: Literal["proteus-cache/pack"] = "proteus-cache/pack"
    version: Literal[1] = 1
    cache: CacheIdentity
    teacher: TeacherRecord
    views: ViewsRecord
    targets: Column[PackTarget] = Field(min_length=1, max_length=MAX_TARGETS)
    """In the order of their codes."""
    code_bytes: int = Field(ge=1, lt=1 << 30)
    """Of one sample, all targets."""
    shard_size: int = Field(ge=1, le=MAX_SHARD_SIZE)
    n_images: int = Field(ge=1, le=MAX_IMAGES)
    classes: Column[Text] | None
    held_out: Column[int]
    """Tars that training never draws from."""
    packed: dict[str, PackView] = Field(min_length=1)
    """View index ("v000", ..., "probe") to its files."""
    licences: Notes

    @property
    def view_names(self) -> list[str]:
        """Packed view indices, ascending, the probe last."""
        return sorted(self.packed, key=lambda view: (view == PROBE, len(view), view))

    @model_validator(mode="after")
    def _layout_agrees(self) -> Self:
        offset = 0
        for target in self.targets:
            if target.offset != offset:
                raise ValueError(f"the codes of target {target.name} do not follow those before")
            offset += target.codec.code_bytes
        if offset != self.code_bytes:
            raise ValueError("code_bytes is not the sum over the targets")
        if len({target.name for target in self.targets}) != len(self.targets):
            raise ValueError("a target occurs twice")
        return self

    @model_validator(mode="after")
    def _views_agree(self) -> Self:
        if not all(map(_is_canonical, self.packed)) or set(self.packed) != set(self.cache.view_ids):
            raise ValueError("the packed views are not views, or not those of the identity")
        n_tars = -(-self.n_images // self.shard_size)
        for view, entry in self.packed.items():
            if view != PROBE and len(entry.tars) != n_tars:
                raise ValueError(f"{view} has {len(entry.tars)} tars instead of {n_tars}")
            if any(tar.n_samples > self.shard_size for tar in entry.tars):
                raise ValueError(f"a tar of {view} has more samples than a shard")
            if any(tar.size < len(END) + tar.n_samples * member_bytes(self.code_bytes) for tar in entry.tars):
                raise ValueError(f"a tar of {view} is shorter than the codes that it should hold")
        if any(not 0 <= tar < n_tars for tar in self.held_out):
            raise ValueError("a held-out tar does not exist")
        return self
