"""A cache and its pack for tests of verify, repair and recompute, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import storage
from proteus_cache.documents import seal
from proteus_cache.extract.config import ExtractConfig
from tests.makers import make_config

UNITS = ["v000/s00000", "v000/s00001", "v000/s00002", "v001/s00000", "v001/s00001", "v001/s00002", "probe/s00000"]
"""Of the cache: 10 images in shards of 4, two view indices, three probe images."""


@dataclass(frozen=True, slots=True)
class Stores:
    """A PROTEUS_HOME with one cache and one pack, and what made them."""

    home: Path
    config: ExtractConfig

    @property
    def cache(self) -> Path:
        return self.home / "caches" / "vit"

    @property
    def pack(self) -> Path:
        return self.home / "packs" / "whole"

    def settings(self) -> ExtractConfig:
        """As for the extract that made the cache."""
        return self.config

    def copy_to(self, home: Path) -> Stores:
        """The same stores, to be damaged."""
        shutil.copytree(self.home, home)
        return Stores(home, replace(self.config, out=home / "caches" / "vit"))


def make_settings(folder: Path, **changes: Any) -> ExtractConfig:  # fields of the config
    """The extraction of the cache."""
    home = folder / "home"
    return make_config(folder, out=home / "caches" / "vit", home=home, probe_images=3, **changes)


def tree(root: Path) -> dict[str, str]:
    """Relative path to the SHA-256 of every file, but those in `tmp/`."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.relative_to(root).parts[0] != "tmp")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit, at a share of the file's length."""
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 4
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    """Leave the first two thirds."""
    data = path.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    """Add junk."""
    path.write_bytes(path.read_bytes() + b"junk")


def zero_page(path: Path) -> None:
    """Zeros in place of a block, as a lost write leaves it."""
    data = path.read_bytes()
    start = len(data) // 3
    path.write_bytes(data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :])


def copy_bytes(source: Path, target: Path) -> None:
    """Put one file in the place of another."""
    target.write_bytes(source.read_bytes())


def swap(first: Path, second: Path) -> None:
    """Exchange two files."""
    one, two = first.read_bytes(), second.read_bytes()
    assert one != two, "two equal files are no damage"
    first.write_bytes(two)
    second.write_bytes(one)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed document and seal it again, so that its digest is right."""
    document = json.loads(path.read_bytes())
    del document["digest"]
    change(document)
    path.write_bytes(seal(document))


def reseal(root: Path, unit: str) -> None:
    """Make a receipt say that the files of its unit are what they are now, but for the CRCs of codes."""

    def take(receipt: dict[str, Any]) -> None:
        for relative, record in receipt["files"].items():
            data = (root / relative).read_bytes()
            record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit(root / "receipts" / f"{unit}.json", take)


def refuse(monkeypatch: pytest.MonkeyPatch, operation: str, number: int, on: Callable[[Path], bool]) -> None:
    """One operation of the disk fails for the paths that `on` names."""

    class Refusing(storage.Disk):
        def __getattribute__(self, name: str) -> Any:  # one of the operations, of several types
            real = super().__getattribute__(name)
            if name != operation:
                return real

            def refused(path: Path, *rest: Any) -> Any:
                if on(path):
                    raise OSError(number, os.strerror(number), str(path))
                return real(path, *rest)

            return refused

    monkeypatch.setattr(storage, "disk", Refusing())
