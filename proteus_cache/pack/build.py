"""Packing: from the units of a cache to tars, indices and, last of all, `pack.json`.

Threads do the units: reading, hashing and writing leave the interpreter free. Everything unfinished is in
`PACK/tmp`, which the finishing run removes. Equal caches and equal choices give equal bytes.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from proteus_cache import storage, stores
from proteus_cache.cache.layout import PROBE, is_view, view_index
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import FileRecord
from proteus_cache.errors import FormatError, UsageError
from proteus_cache.memory import available_memory
from proteus_cache.pack.document import PackDocument, PackTar, PackView
from proteus_cache.pack.index import Records
from proteus_cache.pack.plan import PackPlan, plan_pack, plan_path
from proteus_cache.pack.recode import SecondStep
from proteus_cache.pack.unit import UnitJob, move_unit, pack_unit, read_note, source_digest
from proteus_cache.pack.verify import verify_pack
from proteus_cache.pack.writer import index_buffers
from proteus_cache.processes import usable_cores

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]
"""Called with (units done, units in all, bytes of the tars that this run made or moved)."""


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
    steps: list[SecondStep]
    """What encoding again added, by target; empty where nothing was, and for a pack that was there already."""
    widened: dict[str, int]
    """Target name to the steps of codes that an overflow widened then; without those that have none."""

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"path": str(self.path), "steps": [step.to_json() for step in self.steps]}

    def step_lines(self) -> list[str]:
        """What encoding again added, for people."""
        lines = [line for step in self.steps for line in step.lines()]
        if self.widened:
            counts = ", ".join(f"{count:,} of {name}" for name, count in self.widened.items())
            lines.append(f"widened   steps of codes, by values beyond what calibration showed: {counts}")
        return lines


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
    by_memory = available_memory() // max(1, 4 * unit_bytes + plan.recoding_bytes)
    return max(1, min(workers or usable_cores(), plan.n_units, int(by_memory)))


def run_pack(plan: PackPlan, *, workers: int = 1, progress: Progress | None = None) -> PackReport:
    """Carry out a plan; run again after a kill it goes on where it was.

    Raises:
        DamageError: a unit of the cache is damaged; finished tars are kept.
        SpaceError: the disk is full; finished tars are kept.
        UsageError: the cache changed since it was planned.
    """
    if plan.finished is not None:
        return _only_move(plan, plan.finished, progress)
    stores.refuse_links(plan.out / name for name in ("tmp", "codec", *plan.views))
    storage.make_folder(plan.out / "tmp", plan.out)
    _write(plan.out, plan_path(plan.out), [plan.document.sealed()])  # by which the next start knows what is here
    for view in plan.views:
        storage.make_folder(plan.out / view, plan.out)
    _write_parameters(plan)
    outcomes = _all_units(plan, workers, progress)
    document = _finish(plan, outcomes)
    kept = sum(outcome.kept for outcome in outcomes.values())
    widened: Counter[str] = Counter()
    for outcome in outcomes.values():
        widened.update(outcome.widened)
    return _report(
        plan, document, written=plan.n_units - kept, moved=plan.n_units if plan.move else 0, widened=dict(widened)
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    tar: PackTar
    widened: dict[str, int]
    kept: bool
    """Packed by an earlier run."""


def _units(plan: PackPlan) -> list[tuple[str, int]]:
    return [(view, shard) for view in plan.views for shard in range(len(plan.document.receipts[view]))]


def _job(plan: PackPlan, view: str, shard: int) -> UnitJob:
    cache = plan.cache
    image_rows = [cache.image_row(view, row) for row in cache.rows(view, shard)]
    part = cache.image_table.take(pa.array(image_rows, type=pa.int64()))
    receipt = plan.document.receipts[view][shard]
    return UnitJob(
        cache=cache.path,
        out=plan.out,
        view=view,
        shard=shard,
        receipt=receipt,
        source=source_digest(receipt, plan.document.targets),
        keys=part["key"].to_pylist(),
        image_rows=image_rows,
        labels=part["label"].to_pylist(),
    )


def _all_units(plan: PackPlan, workers: int, progress: Progress | None) -> dict[tuple[str, int], _Outcome]:
    """Pack all units, `workers` at a time; the first failure stops the rest."""
    outcomes: dict[tuple[str, int], _Outcome] = {}
    n_bytes = 0
    has_failed = threading.Event()

    def one_unit(view: str, shard: int) -> _Outcome | None:
        if has_failed.is_set():  # its thread is faster than whoever waits for the failure
            return None
        try:
            return _one_unit(plan, view, shard)
        except BaseException:
            has_failed.set()
            raise

    assert plan.cache.image_table.num_rows  # read before the threads ask for it
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as threads:
        running = {threads.submit(one_unit, view, shard): (view, shard) for view, shard in _units(plan)}
        try:
            for future in as_completed(running):
                outcome = future.result()
                if outcome is None:
                    continue
                outcomes[running[future]] = outcome
                n_bytes += 0 if outcome.kept else outcome.tar.size
                if progress is not None:
                    progress(len(outcomes), len(running), n_bytes)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return outcomes


def _one_unit(plan: PackPlan, view: str, shard: int) -> _Outcome:
    job = _job(plan, view, shard)
    note = read_note(job)
    kept = note is not None
    if note is None:
        if plan.cache.receipt(view, shard) is None:
            raise UsageError(
                f"{job.tar_path}: is missing or damaged, and its unit was moved out of {job.cache} before, so this "
                "pack cannot be finished; run the same extract again and pack to a new folder"
            )
        note = pack_unit(job, plan.recodings)
    if plan.move:
        move_unit(job, note.tar)
    return _Outcome(note.tar, note.widened, kept)


def _only_move(plan: PackPlan, pack: PackDocument, progress: Progress | None) -> PackReport:
    """The pack is there: check its sizes, and remove the cache's copies where asked to."""
    proven = _read_parameters_back(plan.out, pack)
    findings = [finding for finding in verify_pack(plan.out, read_data=False) if plan.out / finding.path not in proven]
    if findings:
        first = findings[0]
        raise FormatError(f"{plan.out / first.path}: {first.problem}; {first.remedy}")
    storage.sync_folder(plan.out)  # whoever wrote pack.json may have been cut off before that
    storage.discard(plan.out / "tmp")
    moved = n_bytes = 0
    for done, (view, shard) in enumerate(_units(plan) if plan.move else []):
        if _is_cached(plan.cache, view, shard):
            move_unit(_job(plan, view, shard), pack.packed[view].tars[shard])
            moved += 1
            n_bytes += pack.packed[view].tars[shard].size
        if progress is not None:
            progress(done + 1, plan.n_units, n_bytes)
    return _report(plan, pack, written=0, moved=moved)


def _read_parameters_back(out: Path, pack: PackDocument) -> set[Path]:
    """Have the disk give the codec parameters, as it must give every tar, before a cache's copy goes.

    Returns:
        Their files, which are right.

    Raises:
        StorageError: the disk does not give one.
    """
    proven = set()
    for target in pack.targets:
        if (digest := target.codec.parameters) is None:
            continue
        path = out / "codec" / f"{digest}.safetensors"
        if storage.size_of(path) is not None and storage.sha256_of(path, from_disk=True)[1] == digest:
            proven.add(path)
    return proven


def _is_cached(cache: Cache, view: str, shard: int) -> bool:
    """Whether the cache still holds anything of a unit; a killed move leaves files without their receipt."""
    paths = [cache.layout.receipt(view, shard), *map(cache.layout.resolve, cache.unit_files(view, shard))]
    return any(storage.size_of(path) is not None for path in paths)


def _finish(plan: PackPlan, outcomes: dict[tuple[str, int], _Outcome]) -> PackDocument:
    """Codec parameters, indices, and then pack.json."""
    _sweep(plan, set(_parameters(plan)))
    _write_parameters(plan)
    packed = {}
    for view, receipts in plan.document.receipts.items():
        packed[view] = _write_index(plan, view, [outcomes[view, shard].tar for shard in range(len(receipts))])
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
    _write(plan.out, plan.out / "pack.json", [document.sealed()])
    storage.discard(plan.out / "tmp")
    return document


def _write_index(plan: PackPlan, view: str, tars: list[PackTar]) -> PackView:
    def records() -> Iterator[Records]:
        for shard in range(len(tars)):
            note = read_note(_job(plan, view, shard), prove=False)
            if note is None or note.tar != tars[shard]:
                raise UsageError(f"{plan.out}: another run packs there at the same time; let one of them finish")
            yield note.index_records()

    n_samples = sum(tar.n_samples for tar in tars)
    written = storage.write_whole(
        plan.out / f"{view}.idx",
        lambda: index_buffers(view_index(view), n_samples, len(tars), plan.code_bytes, records()),
        plan.out / "tmp",
    )
    return PackView(index=FileRecord(size=written.size, sha256=written.sha256), n_samples=n_samples, tars=tars)


def _parameters(plan: PackPlan) -> dict[str, bytes]:
    """File name to the fitted parameters of a codec."""
    return {f"{r.target.codec.parameters}.safetensors": r.blob for r in plan.recodings if r.blob is not None}


def _write_parameters(plan: PackPlan) -> None:
    """Before any unit, so that a later start need not fit the codecs again."""
    for name, blob in _parameters(plan).items():
        path = plan.out / "codec" / name
        if storage.size_of(path) != len(blob) or storage.sha256_of(path)[1] != name.removesuffix(".safetensors"):
            storage.make_folder(path.parent, plan.out)
            _write(plan.out, path, [blob])


def _write(out: Path, path: Path, data: list[bytes]) -> None:
    """One small file of the pack: written beside, synced, renamed."""
    storage.write_whole(path, lambda: data, out / "tmp")


def _sweep(plan: PackPlan, blobs: set[str]) -> None:
    """Remove tars, indices and parameters that an earlier, abandoned plan left behind."""
    planned = set(plan.views)
    for name in storage.list_folder(plan.out):
        if is_view(name) and name not in planned:
            storage.remove_tree(plan.out / name)
        elif name.endswith(".idx") and name.removesuffix(".idx") not in planned:
            storage.remove(plan.out / name)
    for name in storage.list_folder(plan.out / "codec"):
        if name not in blobs:
            storage.remove(plan.out / "codec" / name)


def _report(
    plan: PackPlan, pack: PackDocument, *, written: int, moved: int, widened: dict[str, int] | None = None
) -> PackReport:
    entries = pack.packed.values()
    return PackReport(
        path=plan.out,
        cache_id=pack.cache.cache_id,
        views=pack.view_names,
        n_samples=sum(entry.n_samples for view, entry in pack.packed.items() if view != PROBE),
        bytes=sum(entry.index.size + sum(tar.size for tar in entry.tars) for entry in entries),
        units_written=written,
        units_kept=plan.n_units - written,
        units_moved=moved,
        steps=plan.document.steps,
        widened=widened or {},
    )
