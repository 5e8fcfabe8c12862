"""One extraction from start to end, in this process or in several."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from proteus_cache import storage
from proteus_cache.cache.layout import PROBE, unit_number, view_name
from proteus_cache.cache.reader import Cache
from proteus_cache.devices import gpu_name, use_device
from proteus_cache.extract.config import DEFAULT_VIEWS, ExtractConfig
from proteus_cache.extract.pipeline import Progress, extract_units, units_to_do
from proteus_cache.extract.planning import PlannedCache, measured_rate, reports_of, size_plan
from proteus_cache.extract.rendering import default_workers
from proteus_cache.plan.costs import FORWARD, teacher_shape
from proteus_cache.plan.extraction import ExtractPlan, typical_view_bytes
from proteus_cache.plan.rates import Rate, gpu_named
from proteus_cache.processes import Worker, usable_cores
from proteus_cache.teachers.outline import outline_teacher
from proteus_cache.teachers.teacher import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What one process did, and what is left."""

    units_committed: int
    units_left: int
    """Units that other processes still have to do, or 0."""
    seconds: float


def wanted_views(config: ExtractConfig, cache: Cache) -> list[str]:
    """View indices that this start should complete, and the probe where there is one.

    Without `--views` a cache keeps the number it has reached, at least four.
    """
    present = [view for view in cache.views() if view != PROBE]
    count = config.views or max(DEFAULT_VIEWS, len(present))
    probe = [PROBE] if cache.manifest.images.n_probe else []
    return [view_name(index) for index in range(count)] + probe


def describe_plan(config: ExtractConfig, planned: PlannedCache, processes: int) -> ExtractPlan:
    """What is about to be written, how large it is, and whether it fits."""
    cache = planned.cache
    manifest = cache.manifest
    views = wanted_views(config, cache)
    todo = units_to_do(cache, views)
    return size_plan(
        manifest,
        cache.path,
        n_views=len([view for view in views if view != PROBE]),
        units_todo=len(todo),
        views_todo=sum(len(cache.rows(*unit)) for unit in todo),
        view_bytes=planned.view_bytes or _stored_view_bytes(cache) or _typical_view_bytes(cache),
        reports=reports_of(planned.codecs),
        rate=_rate(config, planned),
        processes=processes,
        is_published=True,
    )


def _rate(config: ExtractConfig, planned: PlannedCache) -> Rate:
    """The teacher's rate: as measured by this start, else that of this kind of GPU where it is known."""
    if planned.views_per_s is not None:
        return measured_rate(planned.views_per_s)
    gpu = gpu_named(gpu_name(config.device))
    teacher = planned.teacher.identity
    if gpu is None or _precision(config, planned, use_device(config.device)) == "fp32":
        return Rate(views_per_s=None, source="not known")
    outline = outline_teacher(teacher.name, weights=config.weights, size_px=teacher.size_px)
    return gpu.rate(teacher.name, teacher_shape(outline), FORWARD)


def _typical_view_bytes(cache: Cache) -> float:
    return typical_view_bytes(cache.manifest.views.size_px, cache.manifest.views.view_format)


def _stored_view_bytes(cache: Cache) -> float | None:
    """Mean bytes of a stored view with its document, from the first unit there is."""
    for view in cache.views():
        for shard in cache.units(view)[:1]:
            receipt = cache.receipt(view, shard)
            if receipt is not None and receipt.samples.rows:
                return receipt.files[f"views/{view}/s{shard:05d}.tar"].size / len(receipt.samples.rows)
    return None


def extract(
    config: ExtractConfig, planned: PlannedCache, worker: Worker, progress: Callable[[Progress], None]
) -> ExtractResult:
    """Extract this worker's share of what is missing.

    Units are dealt by their number, so workers need not talk to each other; a unit that two of them do is
    committed once.

    Raises:
        ProteusCacheError: as `extract_units`; what was committed stays.
    """
    started = time.monotonic()
    cache = planned.cache
    views = wanted_views(config, cache)
    for view in cache.views():  # what is not done again must last: its writer may have been cut off before the sync
        storage.sync_folder(cache.layout.receipt(view, 0).parent)
    n_shards = cache.manifest.n_shards
    todo = [unit for unit in units_to_do(cache, views) if unit_number(*unit, n_shards) % worker.count == worker.index]
    committed = _extract_units(config, planned, todo, worker.count, progress)
    left = units_to_do(cache, views)
    if not left:
        empty_temporary(cache)
    return ExtractResult(
        units_committed=committed,
        units_left=len(left),
        seconds=time.monotonic() - started,
    )


def redo_units(
    config: ExtractConfig, planned: PlannedCache, units: list[tuple[str, int]], progress: Callable[[Progress], None]
) -> int:
    """Extract these units of a cache, and replace the receipts that its `disbelieved` names; returns how many.

    Raises:
        ProteusCacheError: as `extract_units`; a unit keeps what it has until its replacement is written.
    """
    return _extract_units(config, planned, units, 1, progress)


def _extract_units(
    config: ExtractConfig,
    planned: PlannedCache,
    units: list[tuple[str, int]],
    n_processes: int,
    progress: Callable[[Progress], None],
) -> int:
    device = use_device(config.device)
    return extract_units(
        planned,
        units,
        device=device,
        precision=_precision(config, planned, device),
        batch_size=config.batch_size or default_batch(device),
        workers=config.workers if config.workers is not None else default_workers(usable_cores(), n_processes),
        progress=progress,
    )


def default_batch(device: torch.device) -> int:
    """Views in one forward of the teacher where nobody asks for a number."""
    return 64 if device.type == "cuda" else 16


def _precision(config: ExtractConfig, planned: PlannedCache, device: torch.device) -> Precision:
    if config.precision is not None:
        return config.precision  # type: ignore[return-value]  # checked by ExtractConfig
    return planned.cache.manifest.teacher.precision if device.type == "cuda" else "fp32"


def empty_temporary(cache: Cache) -> None:
    """Remove what killed runs left unfinished in `tmp/`; for the run that ends with every unit committed."""
    folder = cache.layout.temporary
    for name in storage.list_folder(folder):
        storage.discard(folder / name)
        logger.info("removed unfinished file=%s", name)
