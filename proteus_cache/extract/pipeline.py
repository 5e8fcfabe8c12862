"""Units through the teacher: rendered batches in, committed units out.

Three stages run side by side with bounded queues between them: rendering in worker processes, the teacher and the
codecs on the device, and one thread that hashes, writes and commits. Codes go from the device into one of two
page-locked buffers, each as large as one unit; while one is written the other is filled, so that a process never
holds more than the views and codes of two units, and the batches that its workers render ahead.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from proteus_cache.cache.layout import PROBE, shard_stem
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import Moments, Quarantined
from proteus_cache.cache.writer import StoredView, Unit, commit_unit, publish_arrays
from proteus_cache.codecs.codec import Codec, largest_value
from proteus_cache.devices import or_explain
from proteus_cache.errors import CanaryError, ProteusCacheError, SpaceError
from proteus_cache.extract.canary import CANARY_EVERY, CanaryWatch, implausible
from proteus_cache.extract.memory import smaller_batch
from proteus_cache.extract.planning import PlannedCache
from proteus_cache.extract.quarantine import QuarantineLimit
from proteus_cache.extract.records import decoder_version
from proteus_cache.extract.rendering import Job, Rendered, render_jobs
from proteus_cache.extract.statistics import UnitStatistics
from proteus_cache.next_steps import command_line
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.views.encode import decode_view

logger = logging.getLogger(__name__)

_BUFFERS = 2
_REDONE_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Progress:
    """How far this process is."""

    views_done: int
    views_all: int
    bytes_written: int
    units_committed: int


@dataclass(slots=True)
class _OpenUnit:
    """A unit that is being filled."""

    view: str
    shard: int
    rows: range
    codes: dict[str, Tensor]
    """Target name to (unit rows, code_bytes) uint8 on the host."""
    statistics: dict[str, UnitStatistics]
    precision: Precision
    sources: dict[str, str]
    """Key to source digest, as earlier view indices have it; empty for a bad image."""
    views: list[StoredView] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    done: torch.cuda.Event | None = None


def units_to_do(cache: Cache, views: list[str]) -> list[tuple[str, int]]:
    """Units of these view indices without a receipt, in order."""
    todo = []
    for view in views:
        present = set(cache.units(view))
        todo += [(view, shard) for shard in range(_n_shards(cache, view)) if shard not in present]
    return todo


def _n_shards(cache: Cache, view: str) -> int:
    return cache.manifest.n_probe_shards if view == PROBE else cache.manifest.n_shards


def extract_units(
    planned: PlannedCache,
    units: list[tuple[str, int]],
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    workers: int,
    progress: Callable[[Progress], None],
) -> int:
    """Extract and commit units; returns how many were committed.

    Raises:
        ProteusCacheError: as the disk, the images or the teacher say; committed units stay.
    """
    if not units:
        return 0
    pipeline = _Pipeline(planned, units, device, precision, batch_size, progress)
    rendered = render_jobs(
        _jobs(planned.cache, units, batch_size),
        planned.image_root,
        planned.spec,
        workers=workers,
        batch_size=batch_size,
        pin=device.type == "cuda" and workers > 0,
    )
    with closing(rendered):  # ends its workers, however this ends
        return pipeline.run(rendered)


def _jobs(cache: Cache, units: list[tuple[str, int]], batch_size: int) -> Iterator[Job]:
    table = cache.image_table
    for view, shard in units:
        rows = list(cache.rows(view, shard))
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            images = table.take([cache.image_row(view, row) for row in part])
            yield Job(
                view=view,
                shard=shard,
                rows=part,
                keys=images["key"].to_pylist(),
                paths=images["path"].to_pylist(),
                labels=images["label"].to_pylist(),
                is_last=start + batch_size >= len(rows),
            )


class _Pipeline:
    """The device stage and the writing thread of one process."""

    def __init__(
        self,
        planned: PlannedCache,
        units: list[tuple[str, int]],
        device: torch.device,
        precision: Precision,
        batch_size: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.cache = planned.cache
        self.manifest = planned.cache.manifest
        self.image_root = planned.image_root
        self.teacher: Teacher = planned.teacher.to(device, precision)
        self.codecs: dict[str, Codec] = {name: codec.to(device) for name, codec in planned.codecs.items()}
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self.progress = progress
        self.names = [target.name for target in self.manifest.targets]
        self.made_with = _made_with(device)
        self.canary = CanaryWatch(self.cache, self.teacher, self.codecs, batch_size)
        self.unchecked: set[tuple[str, int]] = set()
        """Units that went through the teacher since the batch last gave what it should."""
        self.written: set[tuple[str, int]] = set()
        """Units that the writing thread committed."""
        self.zarr = {
            view: publish_arrays(self.cache.layout, self.manifest, view) for view in dict.fromkeys(v for v, _ in units)
        }
        self.quarantine = QuarantineLimit(self.cache)
        self.full_disk: SpaceError | None = None
        self.quarantine.look()
        self.views_all = sum(len(self.cache.rows(*unit)) for unit in units)
        self.views_done = self.bytes_written = self.committed = 0
        rows = max(len(self.cache.rows(*unit)) for unit in units)
        self.free_buffers = [self._new_buffers(rows) for _ in range(min(_BUFFERS, len(units)))]
        self.writing: list[tuple[_OpenUnit, dict[str, Tensor], Future[Unit | None]]] = []

    def _new_buffers(self, rows: int) -> dict[str, Tensor]:
        pin = self.device.type == "cuda"
        return {
            target.name: torch.zeros(rows, target.codec.code_bytes, dtype=torch.uint8, pin_memory=pin)
            for target in self.manifest.targets
        }

    def run(self, rendered: Iterator[Rendered]) -> int:
        """Take batches in order until there are none, then wait for the last commits."""
        writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        try:
            self._run(rendered, writer)
        except CanaryError as error:
            writer.shutdown(cancel_futures=True)
            raise CanaryError(f"{error}; {self._to_redo()}") from error
        except KeyboardInterrupt:
            writer.shutdown(wait=False, cancel_futures=True)  # the commit that is under way ends, none is begun
            raise
        except ProteusCacheError as error:
            writer.shutdown()
            self._close_canary(error)
            raise
        finally:
            writer.shutdown()
        return self.committed

    def _run(self, rendered: Iterator[Rendered], writer: ThreadPoolExecutor) -> None:
        unit: _OpenUnit | None = None
        buffers: dict[str, Tensor] = {}
        for batch in rendered:
            if unit is None:
                buffers = self._take_buffers(writer)
                unit = self._open(batch.job, buffers)
            self._fill(unit, batch)
            if batch.job.is_last:
                self._submit(unit, buffers, writer)
                unit = None
                if len(self.unchecked) >= CANARY_EVERY:
                    self._check_canary()
            self._reap(writer, wait=False)
            self.progress(Progress(self.views_done, self.views_all, self.bytes_written, self.committed))
        while self.writing:
            self._reap(writer, wait=True)
            self.progress(Progress(self.views_done, self.views_all, self.bytes_written, self.committed))
        if self.unchecked:
            self._check_canary()

    def _look_again(self, unit: Unit) -> None:
        """Look at one view of a committed unit; one that fails is in doubt, also when the canaries held after it.

        Raises:
            CanaryError: the cache holds something else than the teacher says.
        """
        try:
            self.canary.look_at(unit)
        except CanaryError:
            self.unchecked.add((unit.view, unit.shard))
            raise

    def _check_canary(self) -> None:
        """Run the canaries; what went through the teacher before is proved by them.

        Raises:
            CanaryError: they differ.
        """
        self.canary.repeat()
        logger.info("canary held units=%d", len(self.unchecked))
        self.unchecked.clear()

    def _close_canary(self, ended_by: ProteusCacheError) -> None:
        """The last canaries of a process that ends by another error.

        Raises:
            CanaryError: they differ; tells the other error, too.
        """
        try:
            if self.unchecked & self.written:
                self._check_canary()
        except CanaryError as error:
            raise CanaryError(f"{ended_by}; and then: {error}; {self._to_redo()}") from error
        except ProteusCacheError as error:
            logger.warning("the last canaries could not be run: %s", error)

    def _to_redo(self) -> str:
        """What to do about the units that this process committed since the canaries last held."""
        units = sorted(self.unchecked & self.written)
        if not units:
            return "this process committed no unit since the last good check; finished units are kept"
        named = [part for view, shard in units for part in ("--unit", f"{view}/{shard_stem(shard)}")]
        return (
            f"{len(units)} unit{'s' * (len(units) != 1)} that this process committed since the last good check must be "
            "redone on a machine that works, with the --images and --weights of this extract: "
            f"{command_line('repair', self.cache.path, *named)}"
        )

    def _take_buffers(self, writer: ThreadPoolExecutor) -> dict[str, Tensor]:
        while not self.free_buffers:
            self._reap(writer, wait=True)
        return self.free_buffers.pop()

    def _open(self, job: Job, buffers: dict[str, Tensor]) -> _OpenUnit:
        rows = self.cache.rows(job.view, job.shard)
        return _OpenUnit(
            view=job.view,
            shard=job.shard,
            rows=rows,
            codes={name: buffer[: len(rows)] for name, buffer in buffers.items()},
            statistics={name: UnitStatistics(self.device) for name in self.names},
            precision=self.precision,
            sources=self._known_sources(job.view, job.shard),
        )

    def _fill(self, unit: _OpenUnit, batch: Rendered) -> None:
        """Run the teacher over a batch and start the copy of its codes into the unit's buffer."""
        self._check_sources(unit, batch)
        self.quarantine.add(batch.quarantined)
        unit.quarantined += batch.quarantined
        unit.views += batch.views
        for image in batch.quarantined:
            for codes in unit.codes.values():
                codes[image.row - unit.rows.start].zero_()
        if batch.views:
            local = [view.row - unit.rows.start for view in batch.views]
            self._encode(unit, torch.as_tensor(batch.pixels), local)
        self.views_done += len(batch.job.rows)

    def _check_sources(self, unit: _OpenUnit, batch: Rendered) -> None:
        """An image must be the one that earlier views were made of, as far as these are committed.

        Raises:
            ProteusCacheError: it is another one.
        """
        paths = dict(zip(batch.job.keys, batch.job.paths, strict=True))
        changed = {
            view.key: f"its SHA-256 is {view.source_sha256[:12]} and was {known[:12]}"
            if known
            else "it was a bad image then"
            for view in batch.views
            if (known := unit.sources.get(view.key, view.source_sha256)) != view.source_sha256
        }
        changed |= {
            image.key: f"it is a bad image now: {image.reason}"
            for image in batch.quarantined
            if unit.sources.get(image.key)
        }
        for key, how in changed.items():
            raise ProteusCacheError(
                f"{self.image_root / paths[key]}: changed since its first view was made ({how}); put the old file "
                "back, or extract into another --out; finished units are kept"
            )

    def _known_sources(self, view: str, shard: int) -> dict[str, str]:
        """Key to source digest of the images of a unit, as far as an earlier view index has them committed.

        The digest of a bad image is empty.
        """
        rows = [self.cache.image_row(view, row) for row in self.cache.rows(view, shard)]
        unknown = {row // self.manifest.shard_size for row in rows}
        known: dict[str, str] = {}
        for earlier in self.cache.views():
            if earlier in (view, PROBE):
                continue
            for number in unknown & set(self.cache.units(earlier)):
                receipt = self.cache.receipt(earlier, number)
                if receipt is not None:
                    known |= dict(zip(receipt.samples.keys, receipt.samples.source_sha256, strict=True))
                    known |= {image.key: "" for image in receipt.quarantined}
                    unknown.discard(number)
        return known

    def _encode(self, unit: _OpenUnit, pixels: Tensor, local_rows: list[int]) -> None:
        or_explain(
            lambda: self._encode_at_once(unit, pixels.to(self.device, non_blocking=True), local_rows),
            len(pixels),
            lambda n: self._codes(pixels[:n]),
            smaller_batch(len(pixels)),
        )

    def _codes(self, pixels: Tensor) -> None:
        """What `_encode_at_once` computes, for its use of memory."""
        with torch.inference_mode():
            for name, tokens in self.teacher.targets(pixels, self.names).items():
                self.codecs[name].encode(tokens)

    def _encode_at_once(self, unit: _OpenUnit, pixels: Tensor, local_rows: list[int]) -> None:
        with torch.inference_mode():
            is_plain = (pixels == pixels[:, :1, :1]).flatten(1).all(dim=1)
            for name, tokens in self.teacher.targets(pixels, self.names).items():
                codes = self.codecs[name].encode(tokens)
                unit.statistics[name].add(tokens, self.codecs[name].widened(codes), is_plain)
                for start, end, first_row in _runs(local_rows):
                    into = unit.codes[name][first_row : first_row + end - start]
                    into.copy_(codes[start:end], non_blocking=True)

    def _submit(self, unit: _OpenUnit, buffers: dict[str, Tensor], writer: ThreadPoolExecutor) -> None:
        for statistics in unit.statistics.values():
            statistics.fetch()
        if self.device.type == "cuda":
            unit.done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            unit.done.record(torch.cuda.current_stream(self.device))
        self.unchecked.add((unit.view, unit.shard))
        self.writing.append((unit, buffers, writer.submit(self._commit, unit)))

    def _reap(self, writer: ThreadPoolExecutor, wait: bool) -> None:
        """Take finished commits off the list, raise what they raised, and redo in fp32 what was not finite."""
        while self.writing and (wait or self.writing[0][2].done()):
            unit, buffers, future = self.writing.pop(0)
            committed = future.result()
            if committed is None:
                self._redo(unit)
                self._submit(unit, buffers, writer)
            else:
                self._look_again(committed)
                self.committed += 1
                self.free_buffers.append(buffers)
                self.quarantine.look()
            wait = False

    def _commit(self, unit: _OpenUnit) -> Unit | None:
        """In the writing thread: wait for the codes, then write. None when they are not finite."""
        if unit.done is not None:
            unit.done.synchronize()
        moments = {name: statistics.moments() for name, statistics in unit.statistics.items()}
        if not self._are_usable(moments):
            return None
        self._check_plausible(unit, moments)
        ready = Unit(
            view=unit.view,
            shard=unit.shard,
            first_row=unit.rows.start,
            end_row=unit.rows.stop,
            views=unit.views,
            codes={name: np.asarray(codes.numpy()) for name, codes in unit.codes.items()},
            quarantined=unit.quarantined,
            moments=moments,
            widened={name: n for name, kept in unit.statistics.items() if (n := kept.n_widened())},
            precision=unit.precision,
            made_with=self.made_with,
        )
        if self.full_disk is not None:
            raise self.full_disk
        try:
            receipt = commit_unit(
                self.cache.layout,
                self.manifest,
                self.cache.manifest_digest,
                self.zarr[unit.view],
                ready,
                replaces=self.cache.disbelieved.get((unit.view, unit.shard)),
            )
        except SpaceError as error:
            self.full_disk = error  # it stays full for this process: no unit that waits is tried
            raise
        self.written.add((unit.view, unit.shard))
        self.bytes_written += sum(file.size for file in receipt.files.values())
        logger.info("committed unit=%s/%s views=%d", unit.view, shard_stem(unit.shard), len(unit.views))
        return ready

    def _are_usable(self, moments: dict[str, Moments]) -> bool:
        for target in self.manifest.targets:
            limit = largest_value(target.codec.name)
            values = moments[target.name]
            if not (values.absmax <= limit and math.isfinite(values.mean) and math.isfinite(values.mean_square)):
                return False
        return True

    def _check_plausible(self, unit: _OpenUnit, moments: dict[str, Moments]) -> None:
        """Refuse finite numbers that a working device does not give.

        Raises:
            CanaryError: the same for everything, or of another size than the teacher's.
        """
        has_several = len({view.digest for view in unit.views}) > 1
        for name, statistics in unit.statistics.items():
            n_constant, why = statistics.n_constant(), implausible(self.manifest, name, moments[name].mean_square)
            if n_constant:
                why = f"{n_constant} of its views have the same numbers in every token of target {name}"
            elif has_several and statistics.all_views_are_equal():
                why = f"all its views have the same numbers in target {name}"
            if why and unit.views:
                raise CanaryError(
                    f"{self.cache.path}: unit {unit.view}/{shard_stem(unit.shard)}: {why}; the teacher or the device "
                    f"{self.made_with['device']} does not work: it was not committed"
                )

    def _redo(self, unit: _OpenUnit) -> None:
        """Run a unit again in fp32, from the bytes of its views."""
        name = f"{unit.view}/{shard_stem(unit.shard)}"
        if unit.precision == "fp32":
            raise ProteusCacheError(
                f"unit {name}: the teacher's outputs are not finite (or beyond 65,504) in fp32 either; "
                "check the weights, or use --codec float32; finished units are kept"
            )
        logger.warning("unit=%s is not finite in precision=%s, redone in fp32", name, unit.precision)
        unit.precision = "fp32"
        unit.statistics = {target: UnitStatistics(self.device) for target in self.names}
        self.teacher.to(self.device, "fp32")
        side_px = self.manifest.views.size_px
        n_at_once = min(_REDONE_AT_ONCE, self.batch_size)
        for start in range(0, len(unit.views), n_at_once):
            part = unit.views[start : start + n_at_once]
            pixels = torch.stack([torch.from_numpy(decode_view(view.data, side_px).copy()) for view in part])
            self._encode(unit, pixels, [view.row - unit.rows.start for view in part])
        self.teacher.to(self.device, self.precision)


def _runs(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """(start, end, first row) of each run of consecutive rows."""
    start = 0
    for position in range(1, len(rows) + 1):
        if position == len(rows) or rows[position] != rows[position - 1] + 1:
            yield start, position, rows[start]
            start = position


def _made_with(device: torch.device) -> dict[str, str]:
    """What may change bits from one unit to the next; names of machines and people are not among it."""
    import timm

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "decoder": decoder_version(),
        "device": name,
    }
