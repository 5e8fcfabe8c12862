"""Damage to stores: every byte of a store by what it is, bits to flip, and changes that are undone afterwards.

A `Region` is a run of bytes of one kind: "index record", "padding", "receipt". The regions of a store cover all bytes
of all its files, so that a share of flips for every kind leaves nothing out. Damage of whole files (cut, swapped,
copied, lost) is a mapping of relative path to the new bytes, or None for a file that is gone; `changed` makes it and
takes it back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from proteus_cache import tar
from proteus_cache.cache.reader import open_cache
from proteus_cache.pack.index import RECORD_BYTES
from tests.reliability.invariants import files_below

Changes: TypeAlias = Mapping[str, bytes | None]
"""Relative path to what stands there now; None: nothing."""

CACHE_KINDS = (
    "manifest",
    "image list",
    "codec parameters",
    "receipt",
    "group metadata",
    "array metadata",
    "uint8 chunk",
    "uint8 chunk index",
    "float chunk",
    "float chunk index",
    "tar header",
    "view",
    "document",
    "padding",
    "tar end",
)
PACK_KINDS = (
    "pack.json",
    "codec parameters",
    "index header",
    "index record",
    "tar header",
    "codes",
    "view",
    "document",
    "padding",
    "tar end",
)
PACK_KINDS_TRAINED_ON = ("pack.json", "codec parameters", "index header", "index record", "codes", "view")
"""What training reads of a pack; the rest it steps over."""
RUN_KINDS = ("checkpoint state", "checkpoint tensors", "final weights")


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes `start` to `end` - 1 of a file."""

    kind: str
    path: str
    """Relative to the store."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of a file."""

    path: str
    byte: int
    bit: int


def regions_of_cache(root: Path) -> list[Region]:
    """All bytes of a finished cache."""
    manifest = open_cache(root).manifest
    is_packed = {target.name: target.codec.array_dtype == "uint8" for target in manifest.targets}
    found: list[Region] = []
    for path in files_below(root):
        size = (root / path).stat().st_size
        parts = path.split("/")
        if path == "manifest.json":
            found.append(Region("manifest", path, 0, size))
        elif path == "images.parquet":
            found.append(Region("image list", path, 0, size))
        elif parts[0] == "codec":
            found.append(Region("codec parameters", path, 0, size))
        elif parts[0] == "receipts":
            found.append(Region("receipt", path, 0, size))
        elif parts[0] == "views":
            found += _regions_of_tar(root, path)
        elif parts[-1] == "zarr.json":
            found.append(Region("array metadata" if len(parts) == 4 else "group metadata", path, 0, size))
        else:
            kind = "uint8 chunk" if is_packed[parts[2]] else "float chunk"
            index = size - 16 * manifest.shard_size - 4
            found += [Region(kind, path, 0, index), Region(f"{kind} index", path, index, size)]
    return found


def regions_of_pack(root: Path) -> list[Region]:
    """All bytes of a finished pack."""
    found: list[Region] = []
    for path in files_below(root):
        size = (root / path).stat().st_size
        if path == "pack.json":
            found.append(Region("pack.json", path, 0, size))
        elif path.startswith("codec/"):
            found.append(Region("codec parameters", path, 0, size))
        elif path.endswith(".idx"):
            found.append(Region("index header", path, 0, RECORD_BYTES))
            found.append(Region("index record", path, RECORD_BYTES, size))
        else:
            found += _regions_of_tar(root, path)
    return found


def regions_of_run(root: Path) -> list[Region]:
    """All bytes of a run's checkpoints and final weights; its logs are for people and have no digests."""
    found = []
    for path in files_below(root):
        kind = {"json": "checkpoint state", "safetensors": "checkpoint tensors"}.get(path.rpartition(".")[2])
        if kind is not None and not path.startswith("checkpoints/"):
            kind = "final weights" if kind == "checkpoint tensors" or path == "finished.json" else None
        if kind is not None:
            found.append(Region(kind, path, 0, (root / path).stat().st_size))
    return found


def _regions_of_tar(root: Path, path: str) -> Iterator[Region]:
    names = {"json": "document", "codes": "codes", "jpg": "view", "png": "view"}
    size = (root / path).stat().st_size
    end = 0
    with open(root / path, "rb") as file:
        for member in tar.members(file, size, path, 1 << 20):
            yield Region("tar header", path, end, member.offset)
            yield Region(names[member.extension], path, member.offset, member.offset + member.size)
            if member.end > member.offset + member.size:
                yield Region("padding", path, member.offset + member.size, member.end)
            end = member.end
    yield Region("tar end", path, end, size)


def uncovered(root: Path, regions: Iterable[Region]) -> list[str]:
    """Files of which some byte is in no region, or in two."""
    ends: dict[str, int] = dict.fromkeys(files_below(root), 0)
    for region in sorted(regions, key=lambda region: (region.path, region.start)):
        if ends[region.path] == region.start:
            ends[region.path] = region.end
    return [path for path, end in ends.items() if end != (root / path).stat().st_size]


def flips_of(regions: Iterable[Region], kind: str, n: int, seed: int) -> list[Flip]:
    """`n` different bits, drawn from all bits of a kind alike."""
    mine = [region for region in regions if region.kind == kind]
    n_bits = 8 * sum(region.end - region.start for region in mine)
    flips = []
    for place in random.Random(f"{seed} {kind}").sample(range(n_bits), n):
        byte, bit = divmod(place, 8)
        for region in mine:
            if byte < region.end - region.start:
                flips.append(Flip(region.path, region.start + byte, bit))
                break
            byte -= region.end - region.start
    return flips


@contextmanager
def flipped(root: Path, flip: Flip) -> Iterator[None]:
    """One bit is another one, until the end of the block."""
    flip_bit(root, flip)
    try:
        yield
    finally:
        flip_bit(root, flip)


def flip_bit(root: Path, flip: Flip) -> None:
    """Turn a bit over, where it stands; twice is nothing."""
    descriptor = os.open(root / flip.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        (value,) = os.pread(descriptor, 1, flip.byte)
        os.pwrite(descriptor, bytes([value ^ (1 << flip.bit)]), flip.byte)
    finally:
        os.close(descriptor)


@contextmanager
def changed(root: Path, changes: Changes) -> Iterator[None]:
    """Some files hold other bytes or are gone, until the end of the block."""
    before = {path: content(root / path) for path in changes}
    _put(root, changes)
    try:
        yield
    finally:
        _put(root, before)


def _put(root: Path, changes: Changes) -> None:
    for path, data in changes.items():
        if data is not None:
            (root / path).write_bytes(data)
        elif (root / path).exists():
            (root / path).unlink()


def content(path: Path) -> bytes | None:
    """The bytes of a file; None where there is none."""
    return path.read_bytes() if path.exists() else None


def swapped(root: Path, one: str, other: str) -> Changes:
    """Two files under each other's name."""
    return {one: (root / other).read_bytes(), other: (root / one).read_bytes()}


def swapped_inside(data: bytes, one: int, other: int, size: int) -> bytes:
    """`size` bytes at `one` and at `other` in each other's place."""
    new = bytearray(data)
    new[one : one + size], new[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(new)


def zeroed(data: bytes, start: int, size: int) -> bytes:
    """Bytes from `start` on that are zero now."""
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]
