"""One unit of the cache becomes one tar of the pack, and a note of what was written.

The tar is written under a temporary name, synced and renamed; then the note. A tar without a note does not
exist, so a killed pack loses at most the units that were under way. A note is kept by a later run when it was
made from the same receipt by the same recoding, and the tar still has its digest.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from proteus_cache import storage
from proteus_cache.cache.layout import shard_stem
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.documents import MAX_DOCUMENT_BYTES, Document, canonical, digest_of, parse_sealed
from proteus_cache.errors import ChecksumError, DamageError, FormatError, UsageError
from proteus_cache.pack.document import PackTar, PackTarget
from proteus_cache.pack.index import RECORD, Records, crc32c
from proteus_cache.pack.recode import Recoding
from proteus_cache.pack.samples import tar_name
from proteus_cache.pack.writer import PackedSample, make_records, tar_buffers

logger = logging.getLogger(__name__)


class PackedUnit(Document):
    """The note of one finished tar, in `tmp/` until the pack is finished."""

    format: Literal["proteus-cache/packed-unit"] = "proteus-cache/packed-unit"
    version: Literal[1] = 1
    source: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the receipt, targets and codecs that it was made from."""
    tar: PackTar
    records: str
    """Index records, hexadecimal."""
    widened: dict[str, int] = Field(default_factory=dict)
    """Target name to the steps of codes that an overflow widened in encoding again; without those that have none."""

    def index_records(self) -> Records:
        """The records as an array."""
        return np.frombuffer(bytes.fromhex(self.records), dtype=RECORD)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitJob:
    """What it takes to pack one unit."""

    cache: Path
    out: Path
    view: str
    shard: int
    receipt: str
    """Digest of the unit's receipt."""
    source: str
    """Digest of all that the tar depends on."""
    keys: list[str]
    """Keys of the unit's images by array row, from the image list."""
    image_rows: list[int]
    labels: list[int | None]

    @property
    def note_path(self) -> Path:
        """Where the note is."""
        return self.out / "tmp" / f"{self.view}-{shard_stem(self.shard)}.json"

    @property
    def tar_path(self) -> Path:
        """Where the tar is."""
        return self.out / tar_name(self.view, self.shard)


def source_digest(receipt: str, targets: Sequence[PackTarget]) -> str:
    """Identity of what a tar is made from: a unit's receipt, and the targets with their codecs."""
    described = [target.model_dump(mode="json") for target in targets]
    return hashlib.sha256(canonical({"receipt": receipt, "targets": described})).hexdigest()


def read_note(job: UnitJob, prove: bool = True) -> PackedUnit | None:
    """The note of a tar that is there and was made from the same things; None when it has to be packed.

    `prove` reads the whole tar and compares its SHA-256; without it the size must do.
    """
    if storage.size_of(job.note_path) is None:
        return None
    try:
        note = PackedUnit.parse(storage.read_bytes(job.note_path, MAX_DOCUMENT_BYTES), str(job.note_path))
    except DamageError as error:
        logger.warning("packing again unit=%s/%s reason=%s", job.view, job.shard, error)
        return None
    is_whole = storage.size_of(job.tar_path) == note.tar.size and note.source == job.source
    if is_whole and prove:
        is_whole = storage.sha256_of(job.tar_path) == (note.tar.size, note.tar.sha256)
    return note if is_whole else None


def pack_unit(job: UnitJob, recodings: Sequence[Recoding]) -> PackedUnit:
    """Write the tar of one unit and its note.

    Every file of the unit is read with its digest and every code with its CRC checked against the receipt, and the
    codes that are written once more; samples are matched by key, label and digest, never by position.

    Raises:
        DamageError: the cache's unit is damaged.
        UsageError: the unit changed since the pack was planned.
    """
    samples, widened, extension = unit_samples(job, recodings)
    records = make_records(samples, job.shard)
    temporary = job.out / "tmp"
    written = storage.write_whole(job.tar_path, lambda: tar_buffers(samples, extension), temporary)
    tar = PackTar(size=written.size, sha256=written.sha256, receipt=job.receipt, n_samples=len(samples))
    note = PackedUnit(source=job.source, tar=tar, records=records.tobytes().hex(), widened=widened)
    storage.write_whole(job.note_path, note.sealed, temporary)
    logger.info("packed unit=%s/%s views=%d bytes=%d", job.view, shard_stem(job.shard), len(samples), written.size)
    return note


def unit_samples(job: UnitJob, recodings: Sequence[Recoding]) -> tuple[list[PackedSample], dict[str, int], str]:
    """The samples of one unit, checked as `pack_unit` says; the widened steps of each target; the views' extension.

    Raises:
        DamageError, UsageError: as `pack_unit`.
    """
    cache = open_cache(job.cache)
    receipt = _planned_receipt(cache, job)
    samples, widened = _samples(cache, receipt, job, recodings)
    if [sample.key for sample in samples] != receipt.samples.keys:
        raise FormatError(
            f"{job.tar_path}: would not hold the samples of its receipt; nothing was written, report this"
        )
    return samples, widened, "jpg" if cache.manifest.views.view_format == "jpeg" else "png"


def move_unit(job: UnitJob, tar: PackTar) -> None:
    """Read the packed tar back from disk, and if it is whole remove the cache's copy: the receipt first.

    Raises:
        ChecksumError: the tar is not what was written; nothing is removed.
    """
    if storage.sha256_of(job.tar_path, from_disk=True) != (tar.size, tar.sha256):
        raise ChecksumError(
            f"{job.tar_path}: does not read back as written; the cache's copy is kept, look at the disk"
        )
    for path in (job.tar_path, job.note_path):
        if storage.size_of(path) is not None:  # whoever wrote it may have been cut off before its name was synced
            storage.sync_folder(path.parent)
    cache = open_cache(job.cache)
    receipt = cache.layout.receipt(job.view, job.shard)
    if storage.size_of(receipt) is not None:
        if digest_of(storage.read_bytes(receipt, MAX_DOCUMENT_BYTES)) != job.receipt:
            raise UsageError(f"{receipt}: is newer than the pack; it is kept, pack the cache to a new folder")
        storage.remove(receipt)
    elif receipt.parent.is_dir():
        storage.sync_folder(receipt.parent)  # whoever removed it may have been cut off before that
    for relative in cache.unit_files(job.view, job.shard):
        path = cache.layout.resolve(relative)
        if storage.size_of(path) is not None:
            storage.remove(path)
    logger.info("moved unit=%s/%s", job.view, shard_stem(job.shard))


def _planned_receipt(cache: Cache, job: UnitJob) -> Receipt:
    receipt = cache.receipt(job.view, job.shard)
    path = cache.layout.receipt(job.view, job.shard)
    if receipt is None or digest_of(storage.read_bytes(path, MAX_DOCUMENT_BYTES)) != job.receipt:
        raise UsageError(f"{path}: changed since this pack was planned; run the same pack again")
    return receipt


def _samples(
    cache: Cache, receipt: Receipt, job: UnitJob, recodings: Sequence[Recoding]
) -> tuple[list[PackedSample], dict[str, int]]:
    """The samples of a unit, and the widened steps of each target that has any."""
    stored = receipt.samples
    local = [row - receipt.first_row for row in stored.rows]
    by_target: list[list[NDArray[np.uint8]]] = []
    checksums: list[list[int]] = []
    widened: dict[str, int] = {}
    for recoding in recodings:
        codes = cache.read_codes(job.view, job.shard, recoding.target.name)
        recoded = recoding.apply([codes[row] for row in local], stored.keys)
        by_target.append(recoded.codes)
        is_carried = recoding.encoder is None
        checksums.append(stored.crc32c[recoding.target.name] if is_carried else list(map(crc32c, recoded.codes)))
        if recoded.n_widened:
            widened[recoding.target.name] = recoded.n_widened
    views = cache.read_views(job.view, job.shard)
    samples = []
    for place, (row, key, digest) in enumerate(zip(local, stored.keys, stored.view_digests, strict=True)):
        view, json = views[key]
        _check_sample(json, f"{job.view}/{key}.json", job, row, key, digest)
        codes_of_sample = [codes[place] for codes in by_target]
        carried = [of_target[place] for of_target in checksums]
        samples.append(PackedSample(key, job.image_rows[row], job.labels[row], view, json, codes_of_sample, carried))
    return samples, widened


def _check_sample(json: bytes, what: str, job: UnitJob, row: int, key: str, digest: str) -> None:
    """The sample's document, the receipt and the image list speak of the same view."""
    document = parse_sealed(json, what)
    stated = [document.get(field) for field in ("key", "view", "view_digest", "label")]
    if stated != [key, job.view, digest, job.labels[row]] or key != job.keys[row]:
        raise FormatError(f"{what}: does not belong to this receipt and image list; verify the cache with --read-data")
