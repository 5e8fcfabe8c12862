"""Packing: from the units of a cache to tars, indices and, last of all, `pack.json`.

Threads do the units: reading, hashing and writing leave the interpreter free. Everything unfinished is in
`PACK/tmp`, which the finishing run removes. Equal caches and equal choices give equal bytes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa

from proteus_cache import storage
from proteus_cache.cache.layout import is_view, view_index
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import FileRecord
from proteus_cache.errors import FormatError, UsageError
from proteus_cache.pack.document import PackDocument, PackTar, PackView
from proteus_cache.pack.plan import PackPlan, plan_pack, plan_path
from proteus_cache.pack.unit import PackedUnit, UnitJob, move_unit, pack_unit, read_note, source_digest
from proteus_cache.pack.writer import index_buffers
from proteus_cache.processes import usable_cores

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What a packing run did."""

    path: Path
    cache_id: str
    views: list[str]
    n_samples: int
    """Stored views, without the probe."""
    bytes: int
    """Of all tars and indices."""
    units_written: int
    units_kept: int
    """Packed by an earlier run."""
    units_moved: int
    """Removed from the cache by this run."""


def build_pack(
    cache: str | Path,
    out: str | Path,
    *,
    views: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    codec: str | None = None,
    move: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a cache: `plan_pack`, the space check, `run_pack`."""
    plan = plan_pack(cache, out, views=views, targets=targets, codec=codec, move=move)
    n_workers = workers_that_fit(plan, workers)
    plan.check(n_workers)
    return run_pack(plan, workers=n_workers, progress=progress)


def workers_that_fit(plan: PackPlan, workers: int | None) -> int:
    """Threads to pack with: as asked, or one a usable core; never more than memory or units allow.

    A unit is held about four times while it is read, checked, recoded and written.
    """
    unit_bytes = plan.bytes_all // max(1, plan.n_units)
    by_memory = psutil.virtual_memory().available // max(1, 4 * unit_bytes)
    return max(1, min(workers or usable_cores(), plan.n_units, int(by_memory)))


def run_pack(plan: PackPlan, *, workers: int = 1, progress: Progress | None = None) -> PackReport:
    """Carry out a plan; run again after a kill it goes on where it was.

    Raises:
        DamageError: a unit of the cache is damaged; finished tars are kept.
        SpaceError: the disk is full; finished tars are kept.
        UsageError: the cache changed since it was planned.
    """
    jobs = _jobs(plan)
    if plan.finished is not None:
        return _only_move(plan, plan.finished, jobs, progress)
    storage.make_folder(plan.out / "tmp")
    for view in plan.views:
        storage.make_folder(plan.out / view)
    _write(plan.out, plan_path(plan.out), plan.document.sealed())
    outcomes = _all_units(plan, jobs, workers, progress)
    document = _finish(plan, [outcome.note for outcome in outcomes])
    return _report(
        plan,
        document,
        written=sum(not outcome.kept for outcome in outcomes),
        moved=sum(outcome.moved for outcome in outcomes),
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    note: PackedUnit
    kept: bool
    moved: bool


def _jobs(plan: PackPlan) -> list[UnitJob]:
    """One job for each unit, by view index, then shard."""
    cache = plan.cache
    table = cache.image_table
    jobs = []
    for view, receipts in plan.document.receipts.items():
        for shard, receipt in enumerate(receipts):
            rows = cache.rows(view, shard)
            image_rows = [cache.image_row(view, row) for row in rows]
            part = table.take(pa.array(image_rows, type=pa.int64()))
            jobs.append(
                UnitJob(
                    cache=cache.path,
                    out=plan.out,
                    view=view,
                    shard=shard,
                    receipt=receipt,
                    source=source_digest(receipt, plan.recodings),
                    keys=part["key"].to_pylist(),
                    image_rows=image_rows,
                    labels=part["label"].to_pylist(),
                )
            )
    return jobs


def _all_units(
    plan: PackPlan, jobs: list[UnitJob], workers: int, progress: Progress | None
) -> list[_Outcome]:
    """Pack all units, `workers` at a time; the first failure stops the rest."""
    outcomes: dict[int, _Outcome] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as threads:
        running = {threads.submit(_one_unit, plan, job): number for number, job in enumerate(jobs)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcomes[running.pop(future)] = future.result()
                if progress is not None:
                    progress(len(outcomes), len(jobs))
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return [outcomes[number] for number in range(len(jobs))]


def _one_unit(plan: PackPlan, job: UnitJob) -> _Outcome:
    note = read_note(job)
    kept = note is not None
    if note is None:
        if job.shard not in plan.cache.units(job.view):
            raise UsageError(
                f"{job.tar_path}: is missing or damaged, and its unit was moved out of {job.cache} before; "
                "the pack cannot be finished: extract that view index again and pack it to a new folder"
            )
        note = pack_unit(job, plan.recodings)
    if plan.move:
        move_unit(job, note.tar)
    return _Outcome(note, kept, plan.move)


def _only_move(
    plan: PackPlan, pack: PackDocument, jobs: list[UnitJob], progress: Progress | None
) -> PackReport:
    """The pack is there: check its sizes, and remove the cache's copies where asked to."""
    from proteus_cache.pack.verify import verify_pack

    findings = verify_pack(plan.out, read_data=False)
    if findings:
        first = findings[0]
        raise FormatError(f"{plan.out / first.path}: {first.problem}; {first.remedy}")
    _remove_temporary(plan.out)
    moved = 0
    for done, job in enumerate(jobs if plan.move else []):
        receipt = plan.cache.receipt(job.view, job.shard)
        if receipt is not None:
            move_unit(job, pack.packed[job.view].tars[job.shard])
            moved += 1
        if progress is not None:
            progress(done + 1, len(jobs))
    return _report(plan, pack, written=0, moved=moved)


def _finish(plan: PackPlan, notes: list[PackedUnit]) -> PackDocument:
    """Codec parameters, indices, and then pack.json."""
    _sweep(plan)
    for recoding in plan.recodings:
        if recoding.blob is not None:
            storage.make_folder(plan.out / "codec")
            name = f"{recoding.target.codec.parameters}.safetensors"
            _write(plan.out, plan.out / "codec" / name, recoding.blob)
    packed: dict[str, PackView] = {}
    first = 0
    for view, receipts in plan.document.receipts.items():
        packed[view] = _write_index(plan, view, notes[first : first + len(receipts)])
        first += len(receipts)
    manifest = plan.cache.manifest
    document = PackDocument(
        cache=plan.document.cache,
        teacher=manifest.teacher,
        views=manifest.views,
        targets=plan.document.targets,
        code_bytes=plan.code_bytes,
        shard_size=manifest.shard_size,
        n_images=manifest.images.n_images,
        classes=manifest.images.classes,
        held_out=manifest.images.held_out,
        packed=packed,
        licences=manifest.licences,
    )
    _write(plan.out, plan.out / "pack.json", document.sealed())
    _remove_temporary(plan.out)
    return document


def _write_index(plan: PackPlan, view: str, notes: list[PackedUnit]) -> PackView:
    tars: list[PackTar] = [note.tar for note in notes]
    buffers = b"".join(
        index_buffers(view_index(view), plan.code_bytes, [note.index_records() for note in notes])
    )
    written = _write(plan.out, plan.out / f"{view}.idx", buffers)
    return PackView(
        index=FileRecord(size=written.size, sha256=written.sha256),
        n_samples=sum(tar.n_samples for tar in tars),
        tars=tars,
    )


def _write(out: Path, path: Path, data: bytes) -> storage.Written:
    """One small file of the pack: written beside, synced, renamed."""
    temp, written = storage.write_durable(out / "tmp", path.name, lambda: data)
    storage.publish(temp, path)
    return written


def _sweep(plan: PackPlan) -> None:
    """Remove tars and indices that an earlier, abandoned plan left behind."""
    for name in storage.list_folder(plan.out):
        path = plan.out / name
        if is_view(name) and name not in plan.document.receipts:
            shutil.rmtree(path)
        elif path.suffix == ".idx" and is_view(path.stem) and path.stem not in plan.document.receipts:
            storage.remove(path)


def _remove_temporary(out: Path) -> None:
    """Remove `tmp`; what cannot be removed does no harm."""
    shutil.rmtree(out / "tmp", ignore_errors=True)
    with suppress(OSError):
        os.sync()


def _report(plan: PackPlan, pack: PackDocument, *, written: int, moved: int) -> PackReport:
    entries = pack.packed.values()
    return PackReport(
        path=plan.out,
        cache_id=pack.cache.cache_id,
        views=list(pack.packed),
        n_samples=sum(entry.n_samples for view, entry in pack.packed.items() if view != "probe"),
        bytes=sum(entry.index.size + sum(tar.size for tar in entry.tars) for entry in entries),
        units_written=written,
        units_kept=plan.n_units - written,
        units_moved=moved,
    )
