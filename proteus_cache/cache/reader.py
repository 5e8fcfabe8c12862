"""Reading a cache: its manifest, receipts, image list, codes and views. Everything read is checked."""

from __future__ import annotations

import hashlib
import io
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from proteus_cache import storage, stores, tar
from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.image_list import parse_images
from proteus_cache.cache.layout import (
    PROBE,
    CacheLayout,
    is_view,
    shard_of_receipt,
    shard_stem,
    views_tar,
    zarr_shard,
)
from proteus_cache.cache.manifest import Manifest, TargetRecord
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.writer import rows_of_view
from proteus_cache.documents import MAX_DOCUMENT_BYTES, check_seal, digest_of
from proteus_cache.errors import ChecksumError, DamageError, FormatError, StorageError, UsageError
from proteus_cache.views.encode import most_view_bytes

_MAX_BLOB_BYTES = 1 << 30
_MAX_LIST_BYTES = 4 << 30
_MAX_SAMPLE_JSON_BYTES = 1 << 20
_SHARDS_HELD = 2


@dataclass(frozen=True, slots=True)
class CacheSample:
    """One stored view with its decoded targets."""

    key: str
    label: int | None
    view_index: int
    view: NDArray[np.uint8]
    """(H, W, 3) uint8 RGB."""
    targets: dict[str, NDArray[np.float32]]
    """`cls` (D,), all others (T, D)."""


def is_cache(path: Path) -> bool:
    """Whether `path` holds a cache's manifest."""
    return path.is_dir() and storage.size_of(path / "manifest.json") is not None


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading.

    Raises:
        UsageError: there is no cache at `path`; says what is there.
        DamageError: its manifest is damaged, one of its folders is a link, or there is metadata of Zarr v2 beside its
            arrays.
    """
    layout = CacheLayout(Path(path))
    if not is_cache(layout.root):
        raise UsageError(stores.wrong_folder(layout.root, "cache"))
    data = storage.read_bytes(layout.manifest, MAX_DOCUMENT_BYTES)
    manifest = Manifest.parse(data, str(layout.manifest))
    _refuse_foreign_folders(layout, manifest)
    return Cache(layout, manifest, digest_of(data))


def _refuse_foreign_folders(layout: CacheLayout, manifest: Manifest) -> None:
    """Links in the place of folders, and metadata of Zarr v2."""
    arrays = layout.root / "targets.zarr"
    beside = [layout.root / "views", layout.root / "receipts"]
    stores.refuse_links([layout.temporary, layout.codec, arrays, *beside])
    stores.refuse_links(folder / view for folder in beside for view in filter(is_view, storage.list_folder(folder)))
    above = storage.list_folder(arrays)
    names = {arrays: above}
    for view in filter(is_view, above):
        folders = [arrays / view, *(arrays / view / target.name for target in manifest.targets)]
        stores.refuse_links(folders)
        for folder in folders:
            with suppress(StorageError):  # not a folder: verify finds it
                names[folder] = storage.list_folder(folder)
    for folder, found in names.items():
        for name in zarr_arrays.OLD_METADATA:
            if name in found:
                raise FormatError(
                    f"{folder / name}: metadata of Zarr v2, by which a general reader can be made to run code; no "
                    "cache holds it: remove that file"
                )


class Cache:
    """An opened cache. `len()` counts stored views (by view index, then row); the probe never counts."""

    def __init__(self, layout: CacheLayout, manifest: Manifest, manifest_digest: str) -> None:
        self.layout = layout
        self.manifest = manifest
        self.manifest_digest = manifest_digest
        self.disbelieved: dict[tuple[str, int], str | None] = {}
        """Units that are known to be wrong and are being redone: (view index, shard) to the SHA-256 of the bytes of the
        receipt, None without any. `receipt` has none of them."""
        self._codes = lru_cache(maxsize=_SHARDS_HELD * len(manifest.targets))(self._read_codes)
        self._members = lru_cache(maxsize=_SHARDS_HELD)(self._list_members)

    @property
    def path(self) -> Path:
        """The cache's folder."""
        return self.layout.root

    @cached_property
    def image_table(self) -> pa.Table:
        """Columns key, path, label (null without), probe (bool); row i is array row i.

        Raises:
            ChecksumError: `images.parquet` is not the frozen list.
        """
        if storage.size_of(self.layout.images) is None:
            raise FormatError(
                f"{self.layout.images}: missing, or no plain file; run `{stores.repair_command(self.layout.root)}`"
            )
        data = storage.read_bytes(self.layout.images, _MAX_LIST_BYTES)
        if hashlib.sha256(data).hexdigest() != self.manifest.images.sha256:
            raise ChecksumError(
                f"{self.layout.images}: damaged; it is not the image list of this cache; "
                f"run `{stores.repair_command(self.layout.root)}`"
            )
        return parse_images(data, self.manifest, str(self.layout.images))

    @cached_property
    def _probe_rows(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.image_table["probe"].to_numpy()).astype(np.int64)

    def views(self) -> list[str]:
        """View indices with at least one receipt, ascending; the probe last."""
        folder = self.layout.root / "receipts"
        names = [name for name in storage.list_folder(folder) if is_view(name) and self.units(name)]
        return sorted(names, key=lambda name: (name == PROBE, name))

    def units(self, view: str) -> list[int]:
        """Shards of one view index that have a receipt; a file that is named like one of no shard is none."""
        folder = self.layout.root / "receipts" / view
        names = storage.list_folder(folder) if storage.size_of(folder) is None else []  # a file there: verify says so
        _, n_shards = rows_of_view(self.manifest, view)
        return sorted(shard for shard in map(shard_of_receipt, names) if shard is not None and shard < n_shards)

    def is_complete(self, view: str) -> bool:
        """Whether every unit of a view index has a receipt."""
        return len(self.units(view)) == rows_of_view(self.manifest, view)[1]

    def complete_views(self) -> list[str]:
        """View indices (and the probe) of which every unit is committed."""
        return [view for view in self.views() if self.is_complete(view)]

    def receipt(self, view: str, shard: int) -> Receipt | None:
        """The receipt of a unit, or None when it is not committed.

        Raises:
            DamageError: the receipt is damaged, or belongs to another cache or unit.
        """
        path = self.layout.receipt(view, shard)
        if (view, shard) in self.disbelieved or storage.size_of(path) is None:
            return None
        try:
            return self._parsed(path, view, shard)
        except DamageError as error:
            raise type(error)(f"{error}; run `{stores.repair_command(self.layout.root)}`") from error

    def _parsed(self, path: Path, view: str, shard: int) -> Receipt:
        """The receipt in a file, if it is that of this unit."""
        receipt = Receipt.parse(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))
        if receipt.manifest != self.manifest_digest:
            raise FormatError(f"{path}: belongs to another cache (its manifest digest is {receipt.manifest[:12]})")
        rows = self.rows(view, shard)
        if (receipt.view, receipt.shard, receipt.first_row, receipt.end_row) != (
            view,
            shard,
            rows.start,
            rows.stop,
        ):
            raise FormatError(f"{path}: is the receipt of another unit ({receipt.view}/{receipt.shard})")
        self._check_columns(receipt, str(path))
        return receipt

    def _check_columns(self, receipt: Receipt, what: str) -> None:
        samples = receipt.samples
        held = [*samples.rows, *(entry.row for entry in receipt.quarantined)]
        if sorted(held) != list(range(receipt.first_row, receipt.end_row)):
            raise FormatError(f"{what}: its rows are not those of the unit")
        if set(samples.crc32c) != {target.name for target in self.manifest.targets}:
            raise FormatError(f"{what}: its targets are not those of the cache")
        if set(receipt.files) != set(self.unit_files(receipt.view, receipt.shard)):
            raise FormatError(f"{what}: its files are not those of the unit")

    def unit_files(self, view: str, shard: int) -> list[str]:
        """Relative paths of all files of a unit but its receipt."""
        arrays = [
            zarr_shard(view, target.name, shard, 1 + len(target.codec.array_shape)) for target in self.manifest.targets
        ]
        return [views_tar(view, shard), *arrays]

    def rows(self, view: str, shard: int) -> range:
        """Array rows of a unit."""
        n_rows, n_shards = rows_of_view(self.manifest, view)
        if not 0 <= shard < n_shards:
            raise FormatError(f"{self.layout.root}: there is no unit {view}/{shard}")
        size = self.manifest.shard_size
        return range(shard * size, min((shard + 1) * size, n_rows))

    def image_row(self, view: str, row: int) -> int:
        """Row in `image_table` of an array row; they differ for the probe only."""
        return int(self._probe_rows[row]) if view == PROBE else row

    def target(self, name: str) -> TargetRecord:
        """The record of one target.

        Raises:
            UsageError: the cache has no such target.
        """
        for target in self.manifest.targets:
            if target.name == name:
                return target
        held = ", ".join(target.name for target in self.manifest.targets)
        raise UsageError(f"{self.layout.root}: holds no target {name}, only {held}")

    def parameters_blob(self, target: TargetRecord) -> bytes | None:
        """Fitted parameters of a target's codec, digest checked."""
        if target.codec.parameters is None:
            return None
        path = self.layout.parameters(target.codec.parameters)
        if storage.size_of(path) is None:
            raise FormatError(f"{path}: missing, or no plain file; run `{stores.repair_command(self.layout.root)}`")
        data = storage.read_bytes(path, _MAX_BLOB_BYTES)
        if hashlib.sha256(data).hexdigest() != target.codec.parameters:
            raise ChecksumError(f"{path}: damaged; run `{stores.repair_command(self.layout.root)}`")
        return data

    def tar_path(self, view: str, shard: int) -> Path:
        """The tar of a unit's views."""
        return self.layout.resolve(views_tar(view, shard))

    def read_file(self, receipt: Receipt, relative: str) -> bytes:
        """One file of a unit, size and SHA-256 checked against its receipt.

        Raises:
            ChecksumError: they differ.
        """
        path = self.layout.resolve(relative)
        record = receipt.files[relative]
        found = storage.size_of(path)
        if found != record.size:
            state = "missing" if found is None else f"{found:,} bytes long instead of {record.size:,}"
            raise ChecksumError(f"{path}: {state}; {_redo(self.layout, receipt)}")
        if record.size > self._most_bytes(receipt, relative):
            raise FormatError(f"{path}: {record.size:,} bytes are more than the views of this unit can have")
        data = storage.read_bytes(path, record.size)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise ChecksumError(f"{path}: damaged (SHA-256 differs from the receipt); {_redo(self.layout, receipt)}")
        return data

    def _most_bytes(self, receipt: Receipt, relative: str) -> int:
        """What a file of a unit can be long at most, whatever its receipt says."""
        if relative == views_tar(receipt.view, receipt.shard):
            view_bytes = most_view_bytes(self.manifest.views.size_px)
            a_sample = tar.member_bytes(view_bytes) + tar.member_bytes(_MAX_SAMPLE_JSON_BYTES)
            return len(receipt.samples.rows) * a_sample + len(tar.END)
        largest = max(target.codec.code_bytes for target in self.manifest.targets)
        rows = receipt.end_row - receipt.first_row
        return rows * (largest + largest // 128 + 1024) + 16 * self.manifest.shard_size + 4

    def read_codes(self, view: str, shard: int, target: str) -> NDArray[np.uint8]:
        """Codes of one target of one unit, all checksums checked: (rows, code_bytes) uint8; zero where quarantined.

        Raises:
            UsageError: the unit is not committed.
            DamageError: file, chunk or CRC differ from the receipt.
        """
        return self._codes(view, shard, target)

    def _read_codes(self, view: str, shard: int, target_name: str) -> NDArray[np.uint8]:
        receipt = self._committed(view, shard)
        target = self.target(target_name)
        relative = zarr_shard(view, target_name, shard, 1 + len(target.codec.array_shape))
        rows = self.rows(view, shard)
        data = self.read_file(receipt, relative)
        codes = zarr_arrays.read_shard(target, len(rows), self.manifest.shard_size, data, relative)
        samples = receipt.samples
        for row, key, crc in zip(samples.rows, samples.keys, samples.crc32c[target_name], strict=True):
            if google_crc32c.value(codes[row - rows.start]) != crc:
                raise ChecksumError(f"{relative}: codes of {key} are not those of the receipt")
        codes.flags.writeable = False
        return codes

    def _committed(self, view: str, shard: int) -> Receipt:
        receipt = self.receipt(view, shard)
        if receipt is None:
            raise self._not_extracted(view, shard)
        return receipt

    def _not_extracted(self, view: str, shard: int) -> UsageError:
        return UsageError(f"{self.layout.root}: unit {view}/{shard} is not extracted yet; run extract again")

    def read_views(self, view: str, shard: int) -> dict[str, tuple[bytes, bytes]]:
        """Key to (encoded view, sample JSON) of one unit, in row order.

        Raises:
            DamageError: the tar is damaged, or its members are not those of the receipt.
        """
        return self._members(view, shard)

    def _list_members(self, view: str, shard: int) -> dict[str, tuple[bytes, bytes]]:
        receipt = self._committed(view, shard)
        relative = views_tar(view, shard)
        data = self.read_file(receipt, relative)
        extension = "jpg" if self.manifest.views.view_format == "jpeg" else "png"
        parts: dict[str, dict[str, bytes]] = {}
        most = 2 * len(receipt.samples.keys)
        for member in tar.members(io.BytesIO(data), len(data), relative, most):
            if member.extension in parts.get(member.key, ()):
                raise FormatError(f"{relative}: holds {member.name} twice")
            parts.setdefault(member.key, {})[member.extension] = data[member.offset : member.offset + member.size]
        if list(parts) != receipt.samples.keys or any(set(part) != {extension, "json"} for part in parts.values()):
            raise FormatError(f"{relative}: its members are not those of the receipt")
        return {key: (part[extension], part["json"]) for key, part in parts.items()}

    def view_id(self, view: str) -> str:
        """Identity of one view index: SHA-256 over the manifest's digest and those of its receipts, in shard order.

        Raises:
            UsageError: a unit of it is not committed.
        """
        digests = []
        for shard in range(rows_of_view(self.manifest, view)[1]):
            path = self.layout.receipt(view, shard)
            if storage.size_of(path) is None:
                raise self._not_extracted(view, shard)
            digests.append(check_seal(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path)))
        return hashlib.sha256("".join(f"{d}\n" for d in [self.manifest_digest, *digests]).encode()).hexdigest()

    def cache_id(self) -> str:
        """Identity of all complete view indices: SHA-256 over their view ids; the probe's is not among them."""
        return combine_view_ids([self.view_id(view) for view in self.complete_views() if view != PROBE])

    @cached_property
    def _stored(self) -> list[tuple[str, int, int]]:
        """(view, shard, views stored before) of each committed unit, then the total."""
        stored, total = [], 0
        for view in self.views():
            if view == PROBE:
                continue
            for shard in self.units(view):
                stored.append((view, shard, total))
                total += len(self._committed(view, shard).samples.rows)
        return [*stored, ("", 0, total)]

    def __len__(self) -> int:
        return self._stored[-1][2]

    def __getitem__(self, index: int) -> CacheSample:
        """Stored view `index`, decoded; negative indices count from the end."""
        from bisect import bisect_right

        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.layout.root}: sample {index} of {len(self)}")
        starts = [entry[2] for entry in self._stored[:-1]]
        view, shard, before = self._stored[bisect_right(starts, index) - 1]
        return self._sample(view, shard, index - before)

    def _sample(self, view: str, shard: int, position: int) -> CacheSample:
        import torch

        from proteus_cache.codecs import load_codec
        from proteus_cache.views.encode import decode_view

        samples = self._committed(view, shard).samples
        row, key = samples.rows[position], samples.keys[position]
        local = row - self.rows(view, shard).start
        targets: dict[str, NDArray[np.float32]] = {}
        for target in self.manifest.targets:
            codec = load_codec(target.codec, tuple(target.shape), self.parameters_blob(target))
            codes = torch.from_numpy(self.read_codes(view, shard, target.name)[local].copy())
            targets[target.name] = codec.decode(codes.unsqueeze(0))[0].numpy()
        label: Any = self.image_table["label"][self.image_row(view, row)].as_py()
        pixels = decode_view(self.read_views(view, shard)[key][0], self.manifest.views.size_px)
        return CacheSample(key, label, int(re.sub(r"\D", "", view)), pixels, targets)


def combine_view_ids(view_ids: list[str]) -> str:
    """SHA-256 over view ids, one a line."""
    return hashlib.sha256("".join(f"{view_id}\n" for view_id in view_ids).encode()).hexdigest()


def _redo(layout: CacheLayout, receipt: Receipt) -> str:
    unit = f"{receipt.view}/{shard_stem(receipt.shard)}"
    return f"run `{stores.repair_command(layout.root)}`, which redoes unit {unit} and what else is damaged"
