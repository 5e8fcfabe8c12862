"""Where things are in a cache folder. Names only; nothing here touches a disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROBE = "probe"
_VIEW = re.compile(r"v[0-9]{3,5}\Z")
_RECEIPT = re.compile(r"s([0-9]{5,7})\.json\Z")


def view_name(index: int) -> str:
    """View index 0 to "v000"."""
    return f"v{index:03d}"


def view_index(view: str) -> int | None:
    """ "v000" to 0; None for the probe."""
    return None if view == PROBE else int(view[1:])


def is_view(name: str) -> bool:
    """Whether `name` is that of a view index or of the probe."""
    return name == PROBE or _VIEW.match(name) is not None


def shard_stem(shard: int) -> str:
    """Shard 12 to "s00012"."""
    return f"s{shard:05d}"


def unit_number(view: str, shard: int, n_shards: int) -> int:
    """A number for every unit of a store that does not depend on which are there.

    Args:
        view: view index, or the probe.
        shard: of the unit.
        n_shards: of every view index.
    """
    return shard if view == PROBE else int(view[1:]) * n_shards + shard


def unit_of_name(name: str) -> tuple[str, int] | None:
    """ "v000/s00012" to ("v000", 12); None for anything that is not the name of a unit."""
    view, _, stem = name.partition("/")
    shard = shard_of_receipt(f"{stem}.json")
    return (view, shard) if is_view(view) and shard is not None else None


def shard_of_receipt(name: str) -> int | None:
    """ "s00012.json" to 12; None for any other name."""
    match = _RECEIPT.match(name)
    return int(match.group(1)) if match and name == f"{shard_stem(int(match.group(1)))}.json" else None


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The paths of one cache."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def codec(self) -> Path:
        return self.root / "codec"

    @property
    def images(self) -> Path:
        return self.root / "images.parquet"

    def parameters(self, sha256: str) -> Path:
        return self.codec / f"{sha256}.safetensors"

    def receipt(self, view: str, shard: int) -> Path:
        return self.root / "receipts" / view / f"{shard_stem(shard)}.json"

    def resolve(self, relative: str) -> Path:
        return self.root / relative


def views_tar(view: str, shard: int) -> str:
    """Relative path of a unit's views."""
    return f"views/{view}/{shard_stem(shard)}.tar"


def array_folder(view: str, target: str) -> str:
    """Relative path of the Zarr array of one target of one view index."""
    return f"targets.zarr/{view}/{target}"


def zarr_shard(view: str, target: str, shard: int, n_dimensions: int) -> str:
    """Relative path of the Zarr shard file of one unit and target (default chunk keys, separator "/")."""
    return str(PurePosixPath(array_folder(view, target), "c", str(shard), *["0"] * (n_dimensions - 1)))
