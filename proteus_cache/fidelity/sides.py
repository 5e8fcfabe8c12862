"""A cache or a pack, read alike: which views it holds under which keys, and the codes and pixels of any of them.

Entries carry key and view digest, so that two stores are matched by what they hold, never by position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from proteus_cache import stores
from proteus_cache.cache.layout import PROBE
from proteus_cache.cache.manifest import TargetRecord, TeacherRecord, ViewsRecord
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import DamageError, FormatError, UsageError
from proteus_cache.pack.document import PackTarget
from proteus_cache.pack.index import NO_LABEL, REMEDY
from proteus_cache.pack.order import records_of_tars
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.samples import Part
from proteus_cache.views.encode import decode_view, digest_pixels

if TYPE_CHECKING:
    from proteus_cache.codecs import Codec

Target: TypeAlias = TargetRecord | PackTarget


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored view of one side."""

    key: str
    digest: str
    """Of the view's pixels, 16 hex digits."""
    label: int | None
    view: str
    shard: int
    number: int
    """Array row in a cache, record number in a pack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a side says of itself."""

    kind: stores.Kind
    path: Path
    identity: str
    """Digest of the manifest or of pack.json."""
    teacher: TeacherRecord
    views: ViewsRecord
    """How images became views."""
    targets: Mapping[str, Target]
    held_out: tuple[int, ...]
    """Shards that training never draws from."""
    view_names: tuple[str, ...]
    """View indices that are there, ascending, without the probe."""


class Side(ABC):
    """An opened cache or pack."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._shards: dict[str, list[int]] = {}
        self._by_key: dict[tuple[str, int], dict[str, Entry]] = {}

    @property
    def name(self) -> str:
        """Kind and path, for people."""
        return f"{self.facts.kind} {self.facts.path}"

    @abstractmethod
    def codes(self, entries: Sequence[Entry], target: str) -> NDArray[np.uint8]:
        """(n, code_bytes) uint8 of one target, checksums checked."""

    @abstractmethod
    def blob(self, target: str) -> bytes | None:
        """Fitted parameters of a target's codec; None for a codec without."""

    @abstractmethod
    def _pixels(self, entries: Sequence[Entry]) -> NDArray[np.uint8]: ...

    @abstractmethod
    def _list_shards(self, view: str) -> list[int]: ...

    @abstractmethod
    def _list_entries(self, view: str, shard: int) -> list[Entry]: ...

    @abstractmethod
    def _shards_of_key(self, key: str, there: Sequence[int]) -> Sequence[int]:
        """Those shards of `there` that can hold a key."""

    def shards(self, view: str) -> list[int]:
        """Shards of a view index that are there."""
        if view not in self._shards:
            self._shards[view] = self._list_shards(view)
        return self._shards[view]

    def entries(self, view: str, shard: int) -> list[Entry]:
        """The stored views of a shard, in its order."""
        return list(self._entries_by_key(view, shard).values())

    def find(self, entry: Entry) -> Entry | None:
        """The view of the same key and view index as one of another side; None when there is none."""
        there = self.shards(entry.view)
        if entry.shard in there and entry.key in (likely := self._entries_by_key(entry.view, entry.shard)):
            return likely[entry.key]  # stores of one image list have the same shards
        for shard in self._shards_of_key(entry.key, there):
            found = self._entries_by_key(entry.view, shard).get(entry.key)
            if found is not None:
                return found
        return None

    def pixels(self, entries: Sequence[Entry]) -> NDArray[np.uint8]:
        """(n, H, W, 3) uint8, decoded here.

        Raises:
            DamageError: they are not the pixels that the teacher saw.
        """
        pixels = self._pixels(entries)
        for entry, view in zip(entries, pixels, strict=True):
            if digest_pixels(view) != entry.digest:
                raise DamageError(
                    f"{self.facts.path}: the view {entry.view} of {entry.key} does not decode to the pixels that the "
                    f"teacher saw; it was made with {self.facts.views.decoder}"
                )
        return pixels

    def codec(self, target: str) -> Codec:
        """The codec of one target, on the CPU."""
        from proteus_cache.codecs import load_codec

        record = self.facts.targets[target]
        return load_codec(record.codec, tuple(record.shape), self.blob(target))

    def _entries_by_key(self, view: str, shard: int) -> dict[str, Entry]:
        if (view, shard) not in self._by_key:
            self._by_key[view, shard] = {entry.key: entry for entry in self._list_entries(view, shard)}
        return self._by_key[view, shard]


def open_side(path: Path) -> Side:
    """Open a cache or pack.

    Raises:
        UsageError: `path` is neither.
        DamageError: its document is damaged.
    """
    kind = stores.kind_of(path)
    if kind == "cache":
        return CacheSide(open_cache(path))
    if kind == "pack":
        return PackSide(open_pack(path), path)
    raise UsageError(stores.wrong_folder(path, "pack", "cache"))


class CacheSide(Side):
    """A cache."""

    def __init__(self, cache: Cache) -> None:
        manifest = cache.manifest
        super().__init__(
            Facts(
                kind="cache",
                path=cache.path,
                identity=cache.manifest_digest,
                teacher=manifest.teacher,
                views=manifest.views,
                targets={target.name: target for target in manifest.targets},
                held_out=tuple(sorted(manifest.images.held_out)),
                view_names=tuple(view for view in cache.views() if view != PROBE),
            )
        )
        self._cache = cache

    def codes(self, entries: Sequence[Entry], target: str) -> NDArray[np.uint8]:
        parts = []
        for view, shard, group in _by_shard(entries):
            first = self._cache.rows(view, shard).start
            parts.append(self._cache.read_codes(view, shard, target)[[entry.number - first for entry in group]])
        return np.concatenate(parts)

    def blob(self, target: str) -> bytes | None:
        return self._cache.parameters_blob(self._cache.target(target))

    def _pixels(self, entries: Sequence[Entry]) -> NDArray[np.uint8]:
        side_px = self.facts.views.size_px
        return np.stack(
            [
                decode_view(self._cache.read_views(view, shard)[entry.key][0], side_px)
                for view, shard, group in _by_shard(entries)
                for entry in group
            ]
        )

    def _list_shards(self, view: str) -> list[int]:
        return self._cache.units(view)

    def _list_entries(self, view: str, shard: int) -> list[Entry]:
        receipt = self._cache.receipt(view, shard)
        if receipt is None:
            return []
        samples = receipt.samples
        labels = self._cache.image_table["label"].take(pa.array(samples.rows)).to_pylist()
        columns = zip(samples.keys, samples.view_digests, labels, samples.rows, strict=True)
        return [Entry(key, digest, label, view, shard, row) for key, digest, label, row in columns]

    def _shards_of_key(self, key: str, there: Sequence[int]) -> Sequence[int]:
        row = pc.index(self._cache.image_table["key"], key).as_py()
        return [shard for shard in there if row >= 0 and shard == row // self._cache.manifest.shard_size]


class PackSide(Side):
    """A pack."""

    def __init__(self, pack: Pack, path: Path) -> None:
        document = pack.document
        super().__init__(
            Facts(
                kind="pack",
                path=path,
                identity=pack.digest,
                teacher=document.teacher,
                views=document.views,
                targets={target.name: target for target in document.targets},
                held_out=tuple(sorted(document.held_out)),
                view_names=tuple(pack.views),
            )
        )
        self._pack = pack
        self._reader = pack.sample_reader()

    def codes(self, entries: Sequence[Entry], target: str) -> NDArray[np.uint8]:
        codes = np.empty((len(entries), self._pack.code_bytes), dtype=np.uint8)
        done = 0
        for view, numbers in _by_view(entries):
            size = int(self._reader.view_sizes(view, numbers).sum())
            self._reader.read_raw(view, numbers, codes[done : done + len(numbers)], np.empty(size, dtype=np.uint8))
            done += len(numbers)
        record = next(each for each in self._pack.targets if each.name == target)
        return codes[:, record.offset : record.offset + record.codec.code_bytes]

    def blob(self, target: str) -> bytes | None:
        return self._pack.codecs[target].parameters_blob()

    def codec(self, target: str) -> Codec:
        return self._pack.codecs[target]

    def _pixels(self, entries: Sequence[Entry]) -> NDArray[np.uint8]:
        side_px = self._pack.side_px
        codes = np.empty((len(entries), self._pack.code_bytes), dtype=np.uint8)
        pixels = np.empty((len(entries), side_px, side_px, 3), dtype=np.uint8)
        done = 0
        for view, numbers in _by_view(entries):
            self._reader.read(Part(view, numbers, np.arange(done, done + len(numbers))), codes, pixels)
            done += len(numbers)
        return pixels

    def _list_shards(self, view: str) -> list[int]:
        self._pack.check_index(view)
        return list(range(len(self._pack.counts(view))))

    def _list_entries(self, view: str, shard: int) -> list[Entry]:
        numbers = records_of_tars(self._pack.counts(view), np.array([shard], dtype=np.int64))
        labels = self._reader.index(view).read(numbers)["label"].tolist()
        found = []
        for number, label in zip(numbers.tolist(), labels, strict=True):
            what = f"{self._pack.path}/{view}: the document of record {number}"
            document = parse_sealed(self._reader.read_json(view, number), what)
            key, digest = document.get("key"), document.get("view_digest")
            if not (isinstance(key, str) and isinstance(digest, str) and document.get("view") == view):
                raise FormatError(f"{what} belongs to another sample; {REMEDY}")
            found.append(Entry(key, digest, None if label == NO_LABEL else label, view, shard, number))
        return found

    def _shards_of_key(self, key: str, there: Sequence[int]) -> Sequence[int]:
        return there


def _by_shard(entries: Sequence[Entry]) -> Iterator[tuple[str, int, list[Entry]]]:
    for (view, shard), group in groupby(entries, key=lambda entry: (entry.view, entry.shard)):
        yield view, shard, list(group)


def _by_view(entries: Sequence[Entry]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    for view, group in groupby(entries, key=lambda entry: entry.view):
        yield view, np.array([entry.number for entry in group], dtype=np.int64)
