"""Repair of a pack: damaged tars are packed again from the cache, indices from the tars, parameters from the cache.

A file takes its place only with the very SHA-256 that `pack.json` states for it; else everything stays as it was, and
the report says which files to copy from elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from proteus_cache import storage, tar
from proteus_cache.cache.layout import PROBE, shard_stem, unit_of_name, view_index
from proteus_cache.cache.reader import Cache, is_cache, open_cache
from proteus_cache.cache.verify import Finding
from proteus_cache.documents import MAX_DOCUMENT_BYTES, check_seal, parse_sealed
from proteus_cache.errors import FormatError, ProteusCacheError, UsageError
from proteus_cache.pack.document import PackTarget
from proteus_cache.pack.reader import open_pack
from proteus_cache.pack.recode import Recoding, plan_recodings, recodings_of_pack
from proteus_cache.pack.samples import tar_name
from proteus_cache.pack.unit import UnitJob, source_digest, unit_samples
from proteus_cache.pack.verify import verify_pack
from proteus_cache.pack.writer import PackedSample, index_buffers, make_records, tar_buffers
from proteus_cache.repair.plan_files import find_parameters
from proteus_cache.repair.report import NAMED, STOPPED, Action, RepairReport, State, in_repair, stops_writing

logger = logging.getLogger(__name__)

Phase = Callable[[str, str], Callable[..., None]]
_COPY = "copy this file from another copy of the pack"
_ROUNDS = 2


class _NotTheSameError(ProteusCacheError):
    """What was made again is not what pack.json states."""


def repair_pack(
    path: Path,
    *,
    cache: Path | None,
    home: Path,
    read_data: bool = True,
    units: Sequence[str] = (),
    dry_run: bool = False,
    phase: Phase = lambda label, unit: lambda *counts: None,
) -> RepairReport:
    """Mend a pack.

    Args:
        path: of the pack.
        cache: that it was made from; None looks for it below `home`.
        home: PROTEUS_HOME.
        read_data: find damage by reading everything; otherwise by structure, names and sizes.
        units: to be packed again even if they look whole, such as "v000/s00003".
        dry_run: say what would be done.
        phase: for progress.

    Raises:
        UsageError: no pack, no such unit, or `cache` is not the one that the pack was made from.
        DamageError: pack.json is damaged, so nothing else can be judged.
    """
    return _PackRepair(path, cache, home, read_data, dry_run, phase).run(units)


class _PackRepair:
    def __init__(
        self, path: Path, cache: Path | None, home: Path, read_data: bool, dry_run: bool, phase: Phase
    ) -> None:
        self.pack = open_pack(path)
        self.path = path
        self.home = home
        self.read_data = read_data
        self.dry_run = dry_run
        self.phase = phase
        self.actions: list[Action] = []
        self.made: set[tuple[str, int]] = set()
        self.parameters: dict[str, bytes] = {}
        """Those that were lost, by their SHA-256."""
        self.error: str | None = None
        self.needs: tuple[str, ...] = ()
        self.cache: Cache | None = self._open(cache) if cache is not None else self._find_cache()

    def run(self, units: Sequence[str]) -> RepairReport:
        forced = [self._parse(name) for name in units]
        findings = verify_pack(self.path, self.read_data, self.phase("verify", "units"))
        known = {finding.unit for finding in findings}
        for view, number in forced:
            name = f"{view}/{shard_stem(number)}"
            if name not in known:
                findings.append(Finding(tar_name(view, number), name, NAMED, ""))
        tried: set[str] = set()
        for _ in range(_ROUNDS):
            fresh = [finding for finding in findings if finding.path not in tried]
            if not fresh or self.error is not None:
                break
            tried |= {finding.path for finding in fresh}
            self._mend(fresh)
            if self.dry_run:
                return self._report([])
            findings = verify_pack(
                self.path, True, self.phase("verify again", "units"), chosen=lambda *unit: unit in self.made
            )
        self._settle(findings)
        if not findings:
            storage.discard(self.path / "tmp")
        return self._report(findings)

    def _report(self, left: list[Finding]) -> RepairReport:
        return RepairReport(
            path=self.path,
            kind="pack",
            is_dry_run=self.dry_run,
            actions=self.actions,
            left=left,
            error=self.error,
            needs=self.needs,
        )

    def _settle(self, left: list[Finding]) -> None:
        paths = {finding.path for finding in left}
        self.actions = [
            action.but("not done", "it was made again and is damaged still: look at the disk")
            if action.state == "done" and paths & set(action.paths)
            else action
            for action in self.actions
        ]

    def _open(self, path: Path) -> Cache:
        cache = open_cache(path)
        if cache.manifest_digest != self.pack.document.cache.manifest:
            raise UsageError(
                f"{path}: is not the cache that {self.path} was made from (manifest {cache.manifest_digest[:12]}, not "
                f"{self.pack.document.cache.manifest[:12]}); give that one with --cache"
            )
        return cache

    def _find_cache(self) -> Cache | None:
        """The cache below PROTEUS_HOME that has the pack's manifest."""
        folder = self.home / "caches"
        for name in storage.list_folder(folder):
            try:
                cache = open_cache(folder / name) if is_cache(folder / name) else None
            except ProteusCacheError:
                continue
            if cache is not None and cache.manifest_digest == self.pack.document.cache.manifest:
                return cache
        return None

    def _parse(self, name: str) -> tuple[str, int]:
        unit = unit_of_name(name)
        packed = self.pack.document.packed
        if unit is None or unit[0] not in packed or unit[1] >= len(packed[unit[0]].tars):
            raise UsageError(
                f"--unit {name}: {self.path} has no such unit; it has view indices "
                f"{', '.join(self.pack.document.view_names)}, named like {self.pack.document.view_names[0]}/s00000"
            )
        return unit

    def _mend(self, findings: list[Finding]) -> None:
        """Parameters first: tars that were encoded again need them. Indices last: they are read off the tars."""
        blobs = {f"codec/{t.codec.parameters}.safetensors": t for t in self.pack.targets if t.codec.parameters}
        indices = {f"{view}.idx": view for view in self.pack.document.packed}
        tars = []
        for finding in findings:
            unit = unit_of_name(finding.unit) if finding.unit else None
            if finding.path in blobs:
                self._try(finding, partial(self._parameters, finding.path, blobs[finding.path]))
            elif unit is not None:
                tars.append((finding, unit))
            elif finding.path not in indices:
                is_own = finding.path == "pack.json"
                leave = self._copy if is_own else "it is not the pack's, so repair leaves it; look at it, and remove it"
                self._note(finding, "not done", leave)
        update = self.phase("repair", "units")
        for done, (finding, (view, number)) in enumerate(tars, start=1):
            self._try(finding, partial(self._tar, view, number))
            update(done, len(tars))
        for finding in findings:
            if finding.path in indices:
                self._try(finding, partial(self._index, indices[finding.path]))

    def _try(self, finding: Finding, make: Callable[[], str]) -> None:
        if self.error is not None:
            return self._note(finding, "not done", f"{STOPPED}; it stays as it is")
        try:
            self._note(finding, "to do" if self.dry_run else "done", make())
        except ProteusCacheError as error:
            if stops_writing(error):
                self.error = in_repair(error)
                self._note(finding, "not done", f"{STOPPED}; it stays as it is")
            elif finding.problem == NAMED:
                self._note(finding, "not done", f"{in_repair(error)}; the tar that is there is whole, and stays")
            else:
                self._note(finding, "not done", f"{in_repair(error)}; {self._copy}")

    @cached_property
    def _copy(self) -> str:
        """What else there is to do for a file: a new pack only where the cache still has all that is packed."""
        held = self.cache.complete_views() if self.cache is not None else []
        return f"{_COPY}, or pack the cache to a new folder" if {*self.pack.document.packed} <= {*held} else _COPY

    def _note(self, finding: Finding, state: State, remedy: str) -> None:
        action = Action(unit=finding.unit, paths=(finding.path,), problem=finding.problem, remedy=remedy, state=state)
        self.actions.append(action)

    def _parameters(self, relative: str, target: PackTarget) -> str:
        sha256 = target.codec.parameters
        assert sha256 is not None, "only targets with parameters come here"
        data, how = None, "copy it from the cache"
        if self.cache is not None:
            held = {record.codec.parameters: record for record in self.cache.manifest.targets}.get(sha256)
            data = self.cache.parameters_blob(held) if held is not None else None
        if data is None:
            data, how = find_parameters(self.home, sha256), "copy it from another store: it has the recorded digest"
        if data is None and self.cache is not None:
            data, how = self._fitted(target), "fit it again to the cache's views: it has the recorded digest"
        if data is None:
            self.needs = ("--cache", "DIR")
            raise _NotTheSameError("its cache is not here (say where with --cache), and no other store has this file")
        self._write(relative, sha256, lambda: iter([data]))
        self.parameters[sha256] = data
        return how

    def _fitted(self, target: PackTarget) -> bytes:
        assert self.cache is not None, "asked for with a cache only"
        recodings = plan_recodings(self.cache, [target.name], target.codec.name, self.pack.document.view_names[0])
        blob = recodings[0].blob
        if blob is None or hashlib.sha256(blob).hexdigest() != target.codec.parameters:
            raise _NotTheSameError("fitting again gives other parameters (the cache has changed, or another library)")
        return blob

    def _tar(self, view: str, number: int) -> str:
        """Pack one tar again; the digest says whether the cache still has what it was made from."""
        packed = self.pack.document.packed[view].tars[number]
        cache, receipt = self._cache_with(view, number)
        job = _job(cache, self.path, view, number, receipt, self.pack.targets)
        samples, _, extension = unit_samples(job, self._recodings)
        relative = tar_name(view, number)
        try:
            self._write(relative, packed.sha256, lambda: tar_buffers(samples, extension))
        except _NotTheSameError as error:
            if receipt == packed.receipt:
                raise
            where = cache.layout.receipt(view, number)
            raise _NotTheSameError(
                f"{where}: is not the receipt that was packed; the unit was redone since, and gives another tar"
            ) from error
        self.made.add((view, number))
        return f"pack it again from {cache.path}: it has the recorded digest"

    def _cache_with(self, view: str, number: int) -> tuple[Cache, str]:
        """The cache, and the digest of its receipt of a unit.

        Raises:
            ProteusCacheError: it is not here, or no longer holds the unit.
        """
        if self.cache is None:
            self.needs = ("--cache", "DIR")
            raise _NotTheSameError(f"its cache is not below {self.home} (say where it is with --cache)")
        path = self.cache.layout.receipt(view, number)
        if storage.size_of(path) is None:
            raise _NotTheSameError(f"{path}: is not there, so the cache no longer holds this unit (`pack --move`?)")
        return self.cache, check_seal(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))

    @cached_property
    def _recodings(self) -> list[Recoding]:
        assert self.cache is not None, "asked for with a cache only"
        blobs = {
            target.name: self.parameters.get(target.codec.parameters or "") or self.pack.parameters_blob(target)
            for target in self.pack.targets
        }
        return recodings_of_pack(self.cache, self.pack.targets, blobs)

    def _index(self, view: str) -> str:
        """Read an index off its tars, which must be whole."""
        packed = self.pack.document.packed[view]
        if self.dry_run and any((view, number) in self.made for number in range(len(packed.tars))):
            return "read it off the tars, once these are packed again"
        records = [make_records(self._packed_samples(view, number), number) for number in range(len(packed.tars))]
        head = view_index(view), packed.n_samples, len(packed.tars), self.pack.code_bytes
        self._write(f"{view}.idx", packed.index.sha256, lambda: index_buffers(*head, records))
        return "read it off the tars: it has the recorded digest"

    def _packed_samples(self, view: str, number: int) -> list[PackedSample]:
        """The samples of a tar, for its index records."""
        path, packed = self.path / tar_name(view, number), self.pack.document.packed[view].tars[number]
        if storage.size_of(path) != packed.size or storage.sha256_of(path)[1] != packed.sha256:
            raise FormatError(f"{path}: is damaged or missing, and the index is read off the tars")
        found = []
        with storage.reported("read", path), open(path, "rb") as file:
            members = list(tar.members(file, packed.size, str(path), 3 * packed.n_samples))
            for place in range(0, len(members), 3):
                codes, encoded, json = (
                    os.pread(file.fileno(), member.size, member.offset) for member in members[place : place + 3]
                )
                document = parse_sealed(json, members[place + 2].name)
                label, key = document.get("label"), members[place].key
                found.append((key, label if isinstance(label, int) else None, codes, encoded, json))
        rows = self._rows(view, number, [sample[0] for sample in found])
        return [
            PackedSample(key, row, label, encoded, json, [np.frombuffer(codes, dtype=np.uint8)])
            for row, (key, label, codes, encoded, json) in zip(rows, found, strict=True)
        ]

    def _rows(self, view: str, number: int, keys: list[str]) -> list[int]:
        """Image rows of the samples of a tar: by the image list, else one after the other; the digest proves them."""
        if self.cache is not None and storage.size_of(self.cache.layout.images) is not None:
            rows = _image_rows(self.cache, view, number)
            by_key = dict(zip(self.cache.image_table["key"].take(pa.array(rows)).to_pylist(), rows, strict=True))
            return [by_key[key] for key in keys if key in by_key]
        first = number * self.pack.document.shard_size
        end = min(first + self.pack.document.shard_size, self.pack.document.n_images)
        if view == PROBE or len(keys) != end - first:
            raise _NotTheSameError("which images have no view stands in the cache's image list: give --cache")
        return list(range(first, end))

    def _write(self, relative: str, sha256: str, chunks: Callable[[], Iterator[bytes | NDArray[np.uint8]]]) -> None:
        """Write a file of the pack, if its bytes are the recorded ones; a dry run only compares them.

        Raises:
            ProteusCacheError: they are not; nothing was changed.
        """
        digest = hashlib.sha256()
        for chunk in chunks():
            digest.update(memoryview(chunk))  # type: ignore[arg-type]  # numpy types its buffer from 3.12 on
        if digest.hexdigest() != sha256:
            raise _NotTheSameError(f"{self.path / relative}: made again it is another file than pack.json states")
        if self.dry_run:
            return
        final = self.path / relative
        storage.make_folder(self.path / "tmp", self.path)
        storage.make_folder(final.parent, self.path)
        storage.write_whole(final, chunks, self.path / "tmp")
        logger.info("wrote file=%s", relative)


def _image_rows(cache: Cache, view: str, number: int) -> list[int]:
    return [cache.image_row(view, row) for row in cache.rows(view, number)]


def _job(cache: Cache, out: Path, view: str, shard: int, receipt: str, targets: Sequence[PackTarget]) -> UnitJob:
    rows = _image_rows(cache, view, shard)
    part = cache.image_table.take(pa.array(rows, type=pa.int64()))
    return UnitJob(
        cache=cache.path,
        out=out,
        view=view,
        shard=shard,
        receipt=receipt,
        source=source_digest(receipt, targets),
        keys=part["key"].to_pylist(),
        image_rows=rows,
        labels=part["label"].to_pylist(),
    )
