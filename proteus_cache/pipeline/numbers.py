"""What is known of the stages before anything runs, by the arithmetic of `proteus_cache/plan`.

Nothing is downloaded or written, and no image is opened: a folder that is there is listed, else `plan.n_images` says
how many there will be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proteus_cache.choices import unknown
from proteus_cache.demo.scenes import CLASSES
from proteus_cache.devices import gpu_name
from proteus_cache.errors import UsageError
from proteus_cache.extract.config import DEFAULT_CODEC, DEFAULT_SHARD_SIZE, DEFAULT_VIEWS
from proteus_cache.extract.listing import held_out_shards, n_probe_images, n_trained_images
from proteus_cache.images import list_images
from proteus_cache.pipeline.document import Draw, Extract, Pack, Pipeline, Train
from proteus_cache.pipeline.stages import Stage, cache_targets, n_views, pack_targets
from proteus_cache.plan.costs import FORWARD, STEP, STEP_WITHOUT_MASKS, student_shape, teacher_shape
from proteus_cache.plan.extraction import CacheSize, typical_view_bytes
from proteus_cache.plan.human import human_bytes, human_rate, human_time
from proteus_cache.plan.rates import GPUS, Gpu, Rate, gpu_named
from proteus_cache.plan.report import read_cores, render_cores
from proteus_cache.plan.training import TrainingSize
from proteus_cache.plan.whole import planned_targets
from proteus_cache.teachers.outline import TeacherOutline, outline_teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.masking import n_masked_patches


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What is known of one stage."""

    lines: list[str] = field(default_factory=list)
    """For people."""
    values: dict[str, Any] = field(default_factory=dict)
    """For machines."""
    seconds: float | None = None
    stored_bytes: float = 0.0
    """That it leaves on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """What is planned for."""

    n_gpus: int
    gpu: Gpu | None

    @property
    def title(self) -> str:
        assert self.gpu is not None
        return f"{self.n_gpus} x {self.gpu.title}"


class Reckoner:
    """Knows the numbers of every stage of one pipeline.

    Args:
        pipeline: as read.
        stages: of it.
        file: it was read from, for messages.
    """

    def __init__(self, pipeline: Pipeline, stages: list[Stage], file: Path) -> None:
        self._pipeline = pipeline
        self._stages = stages
        self._file = file
        kind = pipeline.plan.gpu_kind
        if kind is not None and kind not in GPUS:
            raise UsageError(f"{file}: plan.gpu_kind: {unknown('kind of GPU', kind, GPUS)}")
        gpu = GPUS[kind] if kind is not None else gpu_named(gpu_name(None))
        self._machine = _Machine(n_gpus=pipeline.plan.gpus, gpu=gpu)
        self._outlines: dict[str, TeacherOutline | None] = {}
        self._counts: dict[Path, int | None] = {}

    def of(self, stage: Stage) -> Numbers:
        """The numbers of a stage.

        Raises:
            UsageError: a target that the teacher has not, a size that its patches do not tile, or a mask that hides
                no patch.
        """
        try:
            return self._of(stage)
        except UsageError as error:
            place = f"{self._file}: {stage.kind}.{stage.name}"
            raise type(error)(f"{place}: {error}") from error

    def _of(self, stage: Stage) -> Numbers:
        if isinstance(stage.section, Draw):
            n_images = stage.section.per_class * len(CLASSES)
            return Numbers(lines=[f"images    {n_images:,}"], values={"n_images": n_images})
        if isinstance(stage.section, Extract):
            return self._of_cache(stage, stage.section)
        if isinstance(stage.section, Pack):
            return self._of_pack(stage.section)
        return self._of_run(stage, stage.section) if isinstance(stage.section, Train) else Numbers()

    def _of_cache(self, stage: Stage, section: Extract) -> Numbers:
        outline = self._outline(section)
        if outline is None:
            return _not_known(f"the sizes of the teacher stand in {section.weights}, which is not there")
        size = self._cache_size(section, outline)
        a_view = (
            f"a view    {size.most}{human_bytes(size.code_bytes + size.view_bytes)}: "
            f"{human_bytes(size.code_bytes)} codes ({size.target_text()}), "
            f"{human_bytes(size.view_bytes)} pixels (typical)"
        )
        values: dict[str, Any] = {"code_bytes": size.code_bytes, "view_bytes": size.view_bytes}
        if size.n_images == 0:
            return Numbers(lines=[a_view, *_NO_COUNT], values=values)
        probe = f" + a probe of {size.n_probe:,}" if size.n_probe else ""
        held_out = len(held_out_shards(size.n_images, size.shard_size, section.seed or 0))
        lines = [
            a_view,
            f"views     {size.n_images:,} images x {size.n_views}{probe}; "
            f"{held_out} of {size.n_shards:,} shards held out",
            f"cache     {size.most}{human_bytes(size.bytes)} in {size.n_files:,} files",
        ]
        seconds = None
        rate = self._rate_of_teacher(outline)
        if rate is not None and rate.views_per_s is not None:
            seconds = size.n_stored_views / (rate.views_per_s * self._machine.n_gpus)
            lines.append(self._time_line(seconds, "of teacher forward", rate))
            lines.append(_cores_line(render_cores(size.n_stored_views / seconds, outline.size_px), "to render"))
        return Numbers(
            lines=lines, values=size.to_json() | {"seconds": seconds}, seconds=seconds, stored_bytes=size.bytes
        )

    def _of_pack(self, section: Pack) -> Numbers:
        cache = self._pipeline.extract[section.cache]
        outline = self._outline(cache)
        if outline is None:
            return Numbers()
        size = self._pack_size(section, outline)
        each = size.packed_bytes_per_view
        a_view = (
            f"a view    {size.most}{human_bytes(each)}: {human_bytes(size.code_bytes)} codes ({size.target_text()})"
        )
        if size.n_images == 0:
            return Numbers(lines=[a_view], values={"bytes_per_view": each})
        stored = size.n_stored_views * each
        values = {"bytes_per_view": each, "bytes": stored, "n_stored_views": size.n_stored_views}
        lines = [a_view, f"pack      {size.most}{human_bytes(stored)}, {size.n_stored_views:,} views"]
        return Numbers(lines=lines, values=values, stored_bytes=0.0 if section.move else stored)

    def _of_run(self, stage: Stage, section: Train) -> Numbers:
        config = stage.training
        assert config is not None
        pack = None if section.pack is None else self._pipeline.pack[section.pack]
        outline = self._outline(self._pipeline.extract[pack.cache]) if pack is not None else _live_outline(config)
        if outline is None:
            return Numbers()
        if config.weight_patch > 0 and n_masked_patches(config.mask_ratio, outline.n_patches) == 0:
            raise UsageError(
                f"mask_ratio {config.mask_ratio:g} hides none of the {outline.n_patches} patches of a view; set a "
                "larger one, or weight_patch: 0"
            )
        n_images = self._trained_images(config, pack)
        if n_images is None:
            return Numbers(lines=[] if pack is not None else list(_NO_COUNT))
        n_drawn = n_images // config.repeats * config.repeats
        per_epoch = n_drawn // config.global_batch
        if per_epoch == 0:
            raise UsageError(
                f"an epoch of {n_images:,} images is smaller than a batch of {config.global_batch:,}; "
                "set a smaller batch_size"
            )
        each = 0.0 if pack is None else self._pack_size(pack, outline).packed_bytes_per_view
        size = TrainingSize(
            views_per_epoch=n_drawn,
            batch_size=config.global_batch,
            n_steps=config.n_steps(per_epoch),
            bytes_per_view=each,
        )
        return self._of_steps(config, outline, size)

    def _of_steps(self, config: TrainConfig, outline: TeacherOutline, size: TrainingSize) -> Numbers:
        lines = [
            f"steps     {size.n_steps:,} of {size.batch_size:,} views, {size.steps_per_epoch:,} in an epoch, "
            f"peak lr {config.peak_lr:g}"
        ]
        values: dict[str, Any] = {
            "steps": size.n_steps,
            "steps_per_epoch": size.steps_per_epoch,
            "batch_size": size.batch_size,
            "views": size.n_views,
        }
        if size.bytes_per_view:
            lines.append(
                f"reads     {human_bytes(size.bytes_per_step)} a step, {human_bytes(size.bytes_to_read)} in all"
            )
            values["bytes_to_read"] = size.bytes_to_read
        rate = self._rate_of_steps(config, outline)
        if rate is None or rate.views_per_s is None:
            return Numbers(lines=lines, values=values)
        per_s = self._machine.n_gpus * rate.views_per_s
        seconds = size.seconds(per_s)
        lines.append(self._time_line(seconds, "with the teacher in every step" if config.live else "", rate))
        if config.images is not None:
            lines.append(_cores_line(render_cores(per_s, outline.size_px), "to render"))
        else:
            lines.append(_cores_line(read_cores(per_s, outline.size_px), "to read and decode"))
        return Numbers(lines=lines, values=values | {"seconds": seconds}, seconds=seconds)

    def _time_line(self, seconds: float, what: str, rate: Rate) -> str:
        """Time and where the rate comes from."""
        assert rate.views_per_s is not None
        of = f" {what}" if what else ""
        all_per_s = human_rate(self._machine.n_gpus * rate.views_per_s)
        return f"time      {human_time(seconds)}{of} on {self._machine.title} ({all_per_s} views/s; {rate.source})"

    def _rate_of_teacher(self, outline: TeacherOutline) -> Rate | None:
        gpu = self._machine.gpu
        return None if gpu is None else gpu.rate(outline.name, teacher_shape(outline), FORWARD)

    def _rate_of_steps(self, config: TrainConfig, outline: TeacherOutline) -> Rate | None:
        gpu = self._machine.gpu
        if gpu is None:
            return None
        shape = student_shape(config.student, size_px=outline.size_px, patch_px=outline.patch_px)
        rate = gpu.rate(config.student, shape, STEP if config.weight_patch > 0 else STEP_WITHOUT_MASKS)
        teacher = self._rate_of_teacher(outline)
        if not config.live or teacher is None or rate.views_per_s is None or teacher.views_per_s is None:
            return rate
        both = 1 / (1 / rate.views_per_s + 1 / teacher.views_per_s)
        return Rate(views_per_s=both, source=f"student: {rate.source}; teacher: {teacher.source}")

    def _outline(self, section: Extract) -> TeacherOutline | None:
        """The teacher's sizes; None where only weights that are not there tell them."""
        key = f"{section.teacher} {section.weights} {section.size}"
        if key not in self._outlines:
            is_unknown = section.teacher == "vit" and not Path(section.weights or "").expanduser().is_file()
            self._outlines[key] = (
                None if is_unknown else outline_teacher(section.teacher, weights=section.weights, size_px=section.size)
            )
        return self._outlines[key]

    def _cache_size(self, section: Extract, outline: TeacherOutline) -> CacheSize:
        codec = section.codec or DEFAULT_CODEC
        return self._size(section, outline, cache_targets(section), codec, section.views or DEFAULT_VIEWS)

    def _pack_size(self, section: Pack, outline: TeacherOutline) -> CacheSize:
        cache = self._pipeline.extract[section.cache]
        codec = section.codec or cache.codec or DEFAULT_CODEC
        targets = pack_targets(section, self._pipeline)
        return self._size(cache, outline, targets, codec, n_views(section, self._pipeline))

    def _size(
        self, section: Extract, outline: TeacherOutline, targets: tuple[str, ...], codec: str, count: int
    ) -> CacheSize:
        n_images = self._images_of_cache(section) or 0
        planned = planned_targets(outline, targets, codec)
        return CacheSize(
            n_images=n_images,
            n_views=count,
            n_probe=n_probe_images(n_images, section.probe_images),
            shard_size=section.shard_size or DEFAULT_SHARD_SIZE,
            targets=planned.records,
            view_bytes=typical_view_bytes(outline.size_px, section.view_format or "jpeg"),
            at_most=planned.at_most,
        )

    def _images_of_cache(self, section: Extract) -> int | None:
        extraction = next(stage.extraction for stage in self._stages if stage.section is section)
        found = self._images_at(extraction.images if extraction is not None and section.images is not None else None)
        if section.limit is None or found is None:
            return found if found is not None else section.limit
        return min(section.limit, found)

    def _images_at(self, path: Path | None) -> int | None:
        """Images of a folder: those that will be drawn, those that are there, else what the plan says."""
        for stage in self._stages:
            if isinstance(stage.section, Draw) and stage.out == path:
                return stage.section.per_class * len(CLASSES)
        if path is None or not path.exists():
            return self._pipeline.plan.n_images
        if path not in self._counts:
            self._counts[path] = len(list_images(path).table)
        return self._counts[path]

    def _trained_images(self, config: TrainConfig, pack: Pack | None) -> int | None:
        """Images that an epoch draws from; fresh views hold out what a cache of the same images would."""
        cache = None if pack is None else self._pipeline.extract[pack.cache]
        n_images = self._images_at(config.images) if cache is None else self._images_of_cache(cache)
        if n_images is None:
            return None
        if cache is None:
            return n_trained_images(n_images, DEFAULT_SHARD_SIZE, config.seed)
        return n_trained_images(n_images, cache.shard_size or DEFAULT_SHARD_SIZE, cache.seed or 0)


_NO_COUNT = ("images    their number is not known here: set plan.n_images in the file",)


def _not_known(why: str) -> Numbers:
    return Numbers(lines=[f"plan      not known: {why}"])


def _live_outline(config: TrainConfig) -> TeacherOutline | None:
    """The teacher of a run that has it in every step."""
    if config.teacher is None or (
        config.teacher == "vit" and not Path(config.teacher_weights or "").expanduser().is_file()
    ):
        return None
    return outline_teacher(config.teacher, weights=config.teacher_weights, size_px=config.size_px)


def _cores_line(count: float, what: str) -> str:
    """Cores that keep up with that."""
    return f"cores     {max(1, round(count)):,} {what} as fast as that"


def summary_lines(numbers: list[Numbers], free_bytes: float) -> list[str]:
    """All stages together."""
    stored = sum(one.stored_bytes for one in numbers)
    times = [one.seconds for one in numbers if one.seconds is not None]
    lines = []
    if stored:
        lines.append(f"disk      {human_bytes(stored)} for caches and packs; {human_bytes(free_bytes)} are free here")
    if times:
        lines.append(f"time      {human_time(sum(times))} for the stages whose rates are known")
    return lines
