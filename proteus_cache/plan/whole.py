"""`proteus-cache plan`: a teacher, its cache and several students in bytes, files and hours, before anything is spent.

Sizes come from the codecs and the layout of a cache, times from the table of rates or from measurements. Nothing is
written but what measuring the disk takes for seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from proteus_cache import storage
from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.codecs.names import codec_for_target
from proteus_cache.devices import gpu_name
from proteus_cache.errors import UsageError
from proteus_cache.extract.calibration import first_views
from proteus_cache.extract.config import (
    DEFAULT_CODEC,
    DEFAULT_SHARD_SIZE,
    DEFAULT_TARGETS,
    DEFAULT_VIEWS,
    ExtractConfig,
)
from proteus_cache.extract.listing import held_out_shards, image_table, n_probe_images, n_trained_images
from proteus_cache.plan.codes import is_upper_limit, planned_codec
from proteus_cache.plan.config import IMAGENET_IMAGES, PlanConfig
from proteus_cache.plan.costs import FORWARD, STEP, student_shape, teacher_shape
from proteus_cache.plan.extraction import MARGIN, CacheSize, ExtractPlan, typical_view_bytes
from proteus_cache.plan.measure import CPU, Measured, Task, measure
from proteus_cache.plan.rates import DEFAULT_KIND, GPUS, Gpu, Rate, kind_of
from proteus_cache.plan.training import TrainingSize
from proteus_cache.students.registry import student_size
from proteus_cache.teachers.outline import TeacherOutline, outline_teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.views.spec import ViewSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What everything runs on."""

    title: str
    """For people: "A100"."""
    n_gpus: int
    why: str
    """Why this one is planned for."""
    gpu: Gpu | None
    """From the table; None where rates are measured."""
    measured: Measured | None

    @property
    def has_gpu(self) -> bool:
        """Whether it is one; else the CPU was measured."""
        return self.measured is None or self.measured.device != CPU

    def rate_of_teacher(self, outline: TeacherOutline) -> Rate:
        """The teacher's, on one GPU."""
        if self.measured is not None:
            return self.measured.teacher
        assert self.gpu is not None, "rates are measured or from the table"
        return self.gpu.rate(outline.name, teacher_shape(outline), FORWARD)

    def rate_of_student(self, student: str, outline: TeacherOutline) -> Rate:
        """A student's whole steps, on one GPU."""
        if self.measured is not None:
            return self.measured.students[student]
        assert self.gpu is not None, "rates are measured or from the table"
        return self.gpu.rate(student, student_shape(student, size_px=outline.size_px, patch_px=outline.patch_px), STEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPlan:
    """One student, trained from the cache and with a live teacher."""

    student: str
    size: TrainingSize
    rate: Rate
    """Of one GPU."""
    views_per_s: float | None
    """Of all GPUs, from the cache."""
    live_views_per_s: float | None
    """Of all GPUs, with the teacher's forward in every step."""

    @property
    def seconds(self) -> float | None:
        """Of the run from the cache."""
        return self._seconds(self.views_per_s)

    @property
    def live_seconds(self) -> float | None:
        """Of the run with a live teacher."""
        return self._seconds(self.live_views_per_s)

    def _seconds(self, views_per_s: float | None) -> float | None:
        return None if views_per_s is None or self.size.n_steps == 0 else self.size.seconds(views_per_s)

    def break_even(self, extraction_s: float | None) -> float | None:
        """Students like this one after which the extraction has paid for itself; None when it never does or is unknown.

        n runs take E + n C from the cache and n L with a live teacher, so n = E / (L - C).
        """
        cached_s, live_s = self.seconds, self.live_seconds
        if extraction_s is None or cached_s is None or live_s is None or live_s <= cached_s:
            return None
        return extraction_s / (live_s - cached_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholePlan:
    """Everything; report.py says it to people and machines."""

    config: PlanConfig
    outline: TeacherOutline
    hardware: Hardware
    cache: ExtractPlan
    views_are_typical: bool
    """Whether the size of views is that of ImageNet's instead of a sample of the user's."""
    teacher: Rate
    """Of one GPU."""
    extract_per_s: float | None
    """Views a second of the extraction."""
    slowest: str
    """What decides that."""
    students: tuple[StudentPlan, ...]
    missing_targets: tuple[str, ...]
    """That the default losses need and the cache would not hold: then no student is planned."""

    @property
    def extraction_s(self) -> float | None:
        """Seconds of the extraction."""
        return None if self.extract_per_s is None else self.cache.views_todo / self.extract_per_s

    @property
    def pack_bytes(self) -> float:
        """Of a pack with everything in it."""
        return self.cache.size.n_stored_views * self.cache.size.packed_bytes_per_view

    @property
    def pack_fits_beside_it(self) -> bool:
        """Whether there is room for cache and pack at the same time."""
        return (self.cache.bytes_todo + self.pack_bytes) * MARGIN <= self.cache.free.bytes


def make_plan(config: PlanConfig, say: Callable[[str], None]) -> WholePlan:
    """Find out all that a plan says.

    Args:
        config: what is planned.
        say: called with what is measured next.

    Raises:
        UsageError: an unknown teacher, student, target, codec or kind of GPU, or a size that patches do not tile.
        ProteusCacheError: the images cannot be read, or nothing can be measured.
    """
    extraction = config.extraction()
    outline = outline_teacher(config.teacher, weights=config.weights, size_px=config.size_px)
    names = config.targets or DEFAULT_TARGETS
    codec = config.codec or DEFAULT_CODEC
    targets = planned_targets(outline, names, codec)
    n_images, view_bytes, photographs = _images(config, extraction, outline)
    cache = _cache_plan(config, extraction, targets, n_images, view_bytes or typical_view_bytes(outline.size_px))
    needed = TrainConfig(student=config.asked_students[0], data=Path(), out=Path()).targets
    missing = tuple(name for name in needed if name not in names)
    students = () if missing else config.asked_students
    hardware = _hardware(config, outline, names, codec, photographs, students, say)
    teacher = hardware.rate_of_teacher(outline)
    per_s, slowest = _extraction_rate(hardware, teacher, cache.size)
    return WholePlan(
        config=config,
        outline=outline,
        hardware=hardware,
        cache=cache,
        views_are_typical=view_bytes is None,
        teacher=teacher,
        extract_per_s=per_s,
        slowest=slowest,
        students=tuple(_student(name, config, hardware, outline, teacher, cache.size) for name in students),
        missing_targets=missing,
    )


@dataclass(frozen=True, slots=True)
class PlannedTargets:
    """The targets of a cache that nobody has planned yet."""

    records: tuple[TargetRecord, ...]
    """As a manifest would hold them, but for the digests of their codecs' parameters."""
    at_most: frozenset[str]
    """Those whose codes may turn out smaller once their codec is fitted."""


def planned_targets(outline: TeacherOutline, names: Iterable[str], codec: str) -> PlannedTargets:
    """Targets of a teacher under a codec, fitted to nothing: only the size and layout of the codes are of use.

    Raises:
        UsageError: the teacher has no such target, no codec has this name, or none reaches its goal.
    """
    codecs = {name: codec_for_target(codec, name) for name in names}
    records = []
    for name, chosen in codecs.items():
        shape = outline.target_shape(name)
        records.append(TargetRecord(name=name, shape=list(shape), codec=planned_codec(chosen, shape)))
    return PlannedTargets(tuple(records), frozenset(name for name, chosen in codecs.items() if is_upper_limit(chosen)))


def _images(
    config: PlanConfig, extraction: ExtractConfig, outline: TeacherOutline
) -> tuple[int, float | None, tuple[Path, ...]]:
    """How many images there are, the mean size of a view of theirs, and some of their files."""
    if config.images is None:
        return config.n_images or IMAGENET_IMAGES, None, ()
    root = config.images if config.images.is_dir() else config.images.parent
    table, _ = image_table(extraction)
    spec = ViewSpec(
        augment="deit", size_px=outline.size_px, view_format="jpeg", seed=0, mean=outline.mean, std=outline.std
    )
    _, view_bytes = first_views(root, table, spec)
    sample = tuple(root / path for path in table["path"].slice(0, 256).to_pylist())
    return config.n_images or len(table), view_bytes, sample


def _cache_plan(
    config: PlanConfig,
    extraction: ExtractConfig,
    targets: PlannedTargets,
    n_images: int,
    view_bytes: float,
) -> ExtractPlan:
    """The cache as `extract` would find it to be made; its rate is of no use here."""
    size = CacheSize(
        n_images=n_images,
        n_views=extraction.views or DEFAULT_VIEWS,
        n_probe=n_probe_images(n_images, None),
        shard_size=DEFAULT_SHARD_SIZE,
        targets=targets.records,
        view_bytes=view_bytes,
        at_most=targets.at_most,
    )
    return ExtractPlan(
        out=config.out,
        teacher=config.teacher,
        weights=config.weights or "its own weights",
        size=size,
        n_held_out=len(held_out_shards(n_images, size.shard_size, 0)),
        units_todo=size.n_units,
        views_todo=size.n_stored_views,
        free=storage.free_space(config.out.absolute()),
        rate=Rate(views_per_s=None, source="not known"),
        processes=1,
        is_published=False,
    )


def _hardware(
    config: PlanConfig,
    outline: TeacherOutline,
    targets: tuple[str, ...],
    codec: str,
    photographs: tuple[Path, ...],
    students: tuple[str, ...],
    say: Callable[[str], None],
) -> Hardware:
    """What is planned for, measured if it should be."""
    if config.measure:
        return _measured_hardware(config, outline, targets, codec, photographs, students, say)
    here = gpu_name(None)
    found = None if here is None else kind_of(here)
    n_here = 0 if here is None else torch.cuda.device_count()
    kind = config.gpu_kind or found or DEFAULT_KIND
    if config.gpu_kind is not None:
        why = "as asked for"
    elif found is not None:
        why = "found here"
    elif here is not None:
        why = f"the {here} here is not in the table: --measure measures it"
    else:
        why = "no GPU found here"
    n_gpus = config.gpus or (n_here if config.gpu_kind in (None, found) else 0) or 1
    return Hardware(title=GPUS[kind].title, n_gpus=n_gpus, why=why, gpu=GPUS[kind], measured=None)


def _measured_hardware(
    config: PlanConfig,
    outline: TeacherOutline,
    targets: tuple[str, ...],
    codec: str,
    photographs: tuple[Path, ...],
    students: tuple[str, ...],
    say: Callable[[str], None],
) -> Hardware:
    """This machine."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and config.gpus not in (None, 1):
        raise UsageError(f"--gpus {config.gpus} with --measure: torch sees no GPU here to measure")
    n_gpus = config.gpus or (torch.cuda.device_count() if has_gpu else 1)
    task = Task(
        outline=outline,
        weights=config.weights,
        targets=targets,
        codec=codec,
        students=students,
        n_gpus=n_gpus,
        photographs=photographs,
        out=config.out.absolute(),
        home=config.home,
    )
    measured = measure(task, say)
    why = "measured here" if n_gpus == 1 else "one of them measured here"
    return Hardware(title=measured.device, n_gpus=n_gpus, why=why, gpu=None, measured=measured)


def _extraction_rate(hardware: Hardware, teacher: Rate, size: CacheSize) -> tuple[float | None, str]:
    """Views a second of the extraction, and the stage that decides them.

    The table knows nothing of cores and disks: there the teacher decides.
    """
    if teacher.views_per_s is None:
        return None, "teacher"
    stages = {"teacher": hardware.n_gpus * teacher.views_per_s}
    if hardware.measured is not None:
        stages["rendering"] = hardware.measured.renders_per_s
        stages["disk"] = hardware.measured.disk_bytes_per_s / size.bytes_per_view
    slowest = min(stages, key=lambda name: stages[name])
    return stages[slowest], slowest


def _student(
    student: str, config: PlanConfig, hardware: Hardware, outline: TeacherOutline, teacher: Rate, cache: CacheSize
) -> StudentPlan:
    batch_size = student_size(student).batch_size
    views_per_epoch = n_trained_images(cache.n_images, cache.shard_size, 0)
    rate = hardware.rate_of_student(student, outline)
    per_s = live_per_s = None
    if rate.views_per_s is not None:
        per_s = hardware.n_gpus * rate.views_per_s
    if rate.views_per_s is not None and teacher.views_per_s is not None:
        live_per_s = hardware.n_gpus / (1 / rate.views_per_s + 1 / teacher.views_per_s)
        if hardware.measured is not None:  # a live teacher needs fresh views, so they are rendered all the time
            live_per_s = min(live_per_s, hardware.measured.renders_per_s)
    return StudentPlan(
        student=student,
        size=TrainingSize(
            views_per_epoch=views_per_epoch,
            batch_size=batch_size,
            n_steps=config.epochs * (views_per_epoch // batch_size),
            bytes_per_view=cache.packed_bytes_per_view,
        ),
        rate=rate,
        views_per_s=per_s,
        live_views_per_s=live_per_s,
    )
