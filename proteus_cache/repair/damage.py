"""Which parts of a cache are damaged, from what `verify` found."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from proteus_cache import storage
from proteus_cache.cache.layout import is_view, shard_of_receipt, shard_stem, unit_of_name
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import IMAGES, Finding
from proteus_cache.cache.writer import rows_of_view, wanted_metadata
from proteus_cache.errors import StorageError, UsageError
from proteus_cache.repair.report import NAMED

Unit = tuple[str, int]


@dataclass
class Damage:
    """Findings by what can be done about them."""

    image_list: list[Finding] = field(default_factory=list)
    parameters: list[Finding] = field(default_factory=list)
    """Blobs of fitted codecs."""
    metadata: list[Finding] = field(default_factory=list)
    """`zarr.json` files."""
    units: dict[Unit, list[Finding]] = field(default_factory=dict)
    foreign: list[Finding] = field(default_factory=list)
    """Files that belong to no unit."""

    @classmethod
    def of(cls, cache: Cache, findings: Iterable[Finding], forced: Iterable[Unit] = ()) -> Damage:
        """Sort findings.

        Args:
            cache: where they were found.
            findings: of `verify_cache`.
            forced: units to redo whatever was found.
        """
        damage = cls()
        blobs = {f"codec/{t.codec.parameters}.safetensors" for t in cache.manifest.targets if t.codec.parameters}
        for finding in findings:
            unit = unit_of_name(finding.unit) if finding.unit else unit_of_file(cache, finding.path)
            if unit is not None and finding.unit is None:
                finding = replace(finding, problem="there is no receipt of it: lost, or the unit was cut off")
            if finding.path == IMAGES:
                damage.image_list.append(finding)
            elif finding.path in blobs:
                damage.parameters.append(finding)
            elif _is_metadata(cache, finding.path):
                damage.metadata.append(finding)
            elif unit is not None:
                damage.units.setdefault(unit, []).append(finding)
            else:
                damage.foreign.append(finding)
        for unit in forced:
            name = f"{unit[0]}/{shard_stem(unit[1])}"
            damage.units.setdefault(unit, [Finding(f"receipts/{name}.json", name, NAMED, "")])
        damage.units = dict(sorted(damage.units.items()))
        return damage


def parse_units(cache: Cache, names: Iterable[str]) -> list[Unit]:
    """ "v000/s00003" to ("v000", 3), for units that the cache has or can have.

    Raises:
        UsageError: there is no such unit.
    """
    units = []
    for name in names:
        unit = unit_of_name(name)
        if unit is None or unit[1] >= rows_of_view(cache.manifest, unit[0])[1] or not _was_begun(cache, unit[0]):
            views = ", ".join(cache.views()) or "none"
            raise UsageError(
                f"--unit {name}: {cache.path} has no such unit; it has view indices {views} of "
                f"{cache.manifest.n_shards} shards (s00000 to {shard_stem(cache.manifest.n_shards - 1)})"
            )
        units.append(unit)
    return units


def unit_of_file(cache: Cache, path: str) -> Unit | None:
    """The unit that a file without a receipt belongs to, where that view index was begun; None for any other file."""
    match path.split("/"):
        case ["views", view, name] if is_view(view) and name.endswith(".tar"):
            shard = shard_of_receipt(name.removesuffix(".tar") + ".json")
        case ["targets.zarr", view, _, "c", number, *_] if is_view(view) and number.isascii() and number.isdecimal():
            shard = int(number)
        case _:
            return None
    if shard is None or shard >= rows_of_view(cache.manifest, view)[1] or not _was_begun(cache, view):
        return None
    return (view, shard) if path in cache.unit_files(view, shard) else None


def _was_begun(cache: Cache, view: str) -> bool:
    """Whether a unit of this view index was ever committed here: it has receipts, or all files of a unit.

    All receipts of a view index may be lost at once, and a single file may be anybody's.
    """
    if view in storage.list_folder(cache.path / "receipts"):
        return True
    _, n_shards = rows_of_view(cache.manifest, view)
    with suppress(StorageError):  # a file in the place of a folder
        for name in storage.list_folder(cache.path / "views" / view):
            shard = shard_of_receipt(f"{name.removesuffix('.tar')}.json")
            if shard is not None and shard < n_shards:
                files = map(cache.layout.resolve, cache.unit_files(view, shard))
                if all(storage.size_of(file) is not None for file in files):
                    return True
    return False


def _is_metadata(cache: Cache, path: str) -> bool:
    parts = path.split("/")
    if parts[0] != "targets.zarr" or parts[-1] != "zarr.json":
        return False
    view = parts[1] if len(parts) > 2 else "v000"
    return is_view(view) and path in wanted_metadata(cache.manifest, view)
