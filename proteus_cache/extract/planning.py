"""Planning: everything that decides what a cache holds, found out once and published as `manifest.json`.

The image list, the teacher's weights, the precision and the codecs' parameters are settled here. Plan files wait
in `tmp/` under the name of their digest; the manifest is published by `link()`, and whoever loses that race reads the
winner's. Only then do the plan files that the manifest names move to their places, so that a cut at any moment
leaves either no cache or one that the next start completes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from proteus_cache import storage, stores
from proteus_cache.cache.layout import CacheLayout
from proteus_cache.cache.manifest import ImagesRecord, Manifest, TargetRecord
from proteus_cache.cache.reader import Cache, is_cache, open_cache
from proteus_cache.calibration_tokens import warn_of_few_views
from proteus_cache.codecs.calibration import CalibrationReport
from proteus_cache.codecs.codec import Codec, codec_for_target, fit_codec, load_codec
from proteus_cache.devices import use_device
from proteus_cache.errors import ConfigError, FormatError, ProteusCacheError, StorageError, UsageError
from proteus_cache.extract.calibration import Calibration, Photographs, calibrate
from proteus_cache.extract.compatibility import check_image_root, check_place, check_settings, check_weights
from proteus_cache.extract.config import (
    DEFAULT_CODEC,
    DEFAULT_SHARD_SIZE,
    DEFAULT_TARGETS,
    DEFAULT_VIEWS,
    ExtractConfig,
)
from proteus_cache.extract.listing import held_out_shards, image_table
from proteus_cache.extract.records import libraries, spec_of, teacher_record, views_record
from proteus_cache.extract.rendering import default_workers
from proteus_cache.plan.codes import is_upper_limit, planned_codec
from proteus_cache.plan.extraction import CacheSize, ExtractPlan, typical_view_bytes
from proteus_cache.plan.rates import Rate
from proteus_cache.processes import usable_cores
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.views.spec import ViewSpec

logger = logging.getLogger(__name__)

_PLAN_FILE = re.compile(r"plan-[0-9a-f]{64}\.(parquet|safetensors)")


@dataclass(frozen=True, slots=True)
class PlannedCache:
    """A cache that units can be extracted into."""

    cache: Cache
    teacher: Teacher
    spec: ViewSpec
    codecs: dict[str, Codec]
    image_root: Path
    is_new: bool
    view_bytes: float | None
    """Mean bytes of an encoded view, as measured; None when this start only continues a cache."""
    views_per_s: float | None
    """The teacher's rate on the planning batch; None likewise."""


def plan_cache(
    config: ExtractConfig,
    *,
    processes: int = 1,
    announce: Callable[[ExtractPlan], None] | None = None,
    download_progress: Callable[[int, int | None], None] | None = None,
    calibration_progress: Callable[[int, int], None] | None = None,
) -> PlannedCache:
    """Read the plan at `config.out`, or make and publish it.

    Args:
        config: as asked for.
        processes: that will extract; for the time in the announcement.
        announce: called with the plan of a new cache before anything is written, or refused for its exact size.
        download_progress: called with bytes done and in all while the teacher's weights are downloaded.
        calibration_progress: called with views done and in all while the views that int4 and klt are fitted to go
            through the teacher.

    Raises:
        UsageError: the folder holds something else or a cache with other settings, or a setting cannot be had.
        WeightsError: the teacher's weights cannot be had, or are not those of the cache.
        SpaceError: a new cache would not fit; nothing was published.
        ConfigError: no codec of this kind reaches the goal asked for; names the nearest that does.
        ProteusCacheError: no image can be read, or the teacher's outputs are not finite.
    """
    layout = CacheLayout(config.out)
    existing = _existing(layout)
    if existing is None:
        check_place(config.out, config.images)
    else:
        check_settings(config, existing)  # before weights are downloaded that it could not use
    teacher = _load_teacher(config, existing, download_progress)
    image_root = config.images if os.path.isdir(config.images) else config.images.parent
    calibration = None
    if existing is None:
        try:
            calibration = _publish_plan(config, layout, teacher, processes, announce, calibration_progress)
        except StorageError:
            if not is_cache(layout.root):  # else another process made the whole cache meanwhile and emptied tmp/
                raise
    finish_plan(layout)
    cache = open_cache(layout.root)
    check_settings(config, cache.manifest)
    check_weights(config, cache.manifest, teacher)
    check_image_root(cache, image_root, config.images)
    codecs = {
        target.name: load_codec(target.codec, tuple(target.shape), cache.parameters_blob(target))
        for target in cache.manifest.targets
    }
    return PlannedCache(
        cache=cache,
        teacher=teacher,
        spec=spec_of(cache.manifest),
        codecs=codecs,
        image_root=image_root,
        is_new=existing is None,
        view_bytes=calibration.view_bytes if calibration else None,
        views_per_s=calibration.views_per_s if calibration else None,
    )


def _existing(layout: CacheLayout) -> Manifest | None:
    """The manifest that is there, or None for a folder that a cache may be made in."""
    if not os.path.lexists(layout.root):
        return None
    if not os.path.isdir(layout.root):
        raise UsageError(f"{layout.root}: is a file; give --out another name")
    if is_cache(layout.root):
        return open_cache(layout.root).manifest
    foreign = [name for name in storage.list_folder(layout.root) if name not in ("tmp", "codec")]
    if is_cache(layout.root):  # another process published it in this moment
        return open_cache(layout.root).manifest
    if foreign:
        raise UsageError(stores.occupied(layout.root, foreign))
    return None


def _load_teacher(
    config: ExtractConfig, existing: Manifest | None, progress: Callable[[int, int | None], None] | None
) -> Teacher:
    name = config.teacher or (existing.teacher.name if existing else None)
    if name is None:
        raise UsageError("no teacher: say which with --teacher, for example --teacher dinov2_vitg14")
    weights = config.weights
    if weights is None and existing is not None and existing.teacher.weights_source.startswith("random:"):
        weights = existing.teacher.weights_source
    size_px = config.size_px or (existing.teacher.size_px if existing else None)
    return load_teacher(name, weights=weights, home=config.home, size_px=size_px, progress=progress)


def _publish_plan(
    config: ExtractConfig,
    layout: CacheLayout,
    teacher: Teacher,
    processes: int,
    announce: Callable[[ExtractPlan], None] | None,
    calibration_progress: Callable[[int, int], None] | None,
) -> Calibration:
    """Make the plan and publish it; another process may have been faster, which is as good."""
    started = time.monotonic()
    table, classes = image_table(config)
    target_names = config.targets or DEFAULT_TARGETS
    for name in target_names:
        teacher.target_shape(name)
    codec = config.codec or DEFAULT_CODEC
    codec_names = {name: codec_for_target(codec, name) for name in target_names}
    spec = ViewSpec(
        augment=config.augment or "deit",  # type: ignore[arg-type]  # checked by ViewSpec
        size_px=teacher.identity.size_px,
        view_format=config.view_format or "jpeg",  # type: ignore[arg-type]  # likewise
        seed=config.seed or 0,
        mean=teacher.identity.mean,
        std=teacher.identity.std,
    )
    photographs = Photographs(
        root=config.images if os.path.isdir(config.images) else config.images.parent,
        table=table,
        spec=spec,
        workers=config.workers if config.workers is not None else default_workers(usable_cores(), processes),
    )
    _refuse_what_cannot_fit(config, teacher, table, spec, codec_names)
    calibration = calibrate(config, teacher, photographs, codec_names, calibration_progress)
    codecs = _fit(config, calibration, codec_names)
    list_bytes = parquet_bytes(table)
    plan_files = {f"{hashlib.sha256(list_bytes).hexdigest()}.parquet": list_bytes}
    for fitted in codecs.values():
        blob = fitted.parameters_blob()
        if blob is not None:
            plan_files[f"{hashlib.sha256(blob).hexdigest()}.safetensors"] = blob
    shard_size = config.shard_size or DEFAULT_SHARD_SIZE
    manifest = Manifest(
        teacher=teacher_record(teacher, calibration.precision),
        images=ImagesRecord(
            n_images=len(table),
            sha256=hashlib.sha256(list_bytes).hexdigest(),
            classes=list(classes) if classes is not None else None,
            n_probe=int(np.count_nonzero(table["probe"].to_numpy())),
            held_out=held_out_shards(len(table), shard_size, spec.seed),
        ),
        views=views_record(spec),
        targets=[
            TargetRecord(name=name, shape=list(teacher.target_shape(name)), codec=codecs[name].record())
            for name in target_names
        ],
        shard_size=shard_size,
        libraries=libraries(),
        canary=calibration.canary,
        licences={
            "teacher": teacher.identity.licence,
            "images": "as granted to whoever extracts; views show them and may not be shared further than they may",
        },
    )
    plan = _plan_of_new_cache(config, manifest, calibration, reports_of(codecs), processes)
    if announce is not None:
        announce(plan)
    plan.check()
    won = publish_plan(layout, plan_files, manifest)
    logger.info(
        "planned cache=%s images=%d seconds=%.1f%s",
        layout.root,
        len(table),
        time.monotonic() - started,
        "" if won else " (another process published first)",
    )
    return calibration


def _refuse_what_cannot_fit(
    config: ExtractConfig, teacher: Teacher, table: pa.Table, spec: ViewSpec, codec_names: dict[str, str]
) -> None:
    """Look at the space before minutes of calibration: refuse what codes alone fill, however small the views are.

    Raises:
        SpaceError: names what would fit, with views of a typical size.
    """
    if any(map(is_upper_limit, codec_names.values())):
        return
    shapes = {name: teacher.target_shape(name) for name in codec_names}
    try:
        records = {name: planned_codec(codec, shapes[name]) for name, codec in codec_names.items()}
    except ConfigError:
        return  # the fit knows more of what can be had
    size = CacheSize(
        n_images=len(table),
        n_views=config.views or DEFAULT_VIEWS,
        n_probe=int(np.count_nonzero(table["probe"].to_numpy())),
        shard_size=config.shard_size or DEFAULT_SHARD_SIZE,
        targets=tuple(TargetRecord(name=name, shape=list(shapes[name]), codec=records[name]) for name in shapes),
        view_bytes=0.0,
    )
    plan = ExtractPlan(
        out=config.out,
        teacher=teacher.identity.name,
        weights=teacher.identity.weights_source,
        size=size,
        n_held_out=len(held_out_shards(len(table), size.shard_size, spec.seed)),
        units_todo=size.n_units,
        views_todo=size.n_stored_views,
        free=storage.free_space(config.out),
        rate=Rate(views_per_s=None, source="not measured yet"),
        processes=1,
        is_published=False,
    )
    if not plan.fits():
        replace(plan, size=replace(size, view_bytes=typical_view_bytes(spec.size_px, spec.view_format))).check()


def _fit(config: ExtractConfig, calibration: Calibration, codec_names: dict[str, str]) -> dict[str, Codec]:
    """A codec for every target; its tokens are let go of as soon as it is fitted."""
    device = use_device(config.device)
    codecs: dict[str, Codec] = {}
    try:
        for name, codec in codec_names.items():
            started = time.monotonic()
            try:
                codecs[name] = fit_codec(codec, calibration.tokens.pop(name), device=device)
            except ConfigError as error:
                raise ConfigError(f"target {name}: {error}") from error
            logger.info("fitted target=%s codec=%s seconds=%.1f", name, codec, time.monotonic() - started)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    warn_of_few_views(codec_names, reports_of(codecs))
    return codecs


def reports_of(codecs: dict[str, Codec]) -> dict[str, CalibrationReport]:
    """What fitting showed, of the codecs that have a distribution to fit."""
    return {name: codec.calibration for name, codec in codecs.items() if codec.calibration is not None}


def _plan_of_new_cache(
    config: ExtractConfig,
    manifest: Manifest,
    calibration: Calibration,
    reports: dict[str, CalibrationReport],
    processes: int,
) -> ExtractPlan:
    n_views = config.views or DEFAULT_VIEWS
    return size_plan(
        manifest,
        config.out,
        n_views=n_views,
        units_todo=n_views * manifest.n_shards + manifest.n_probe_shards,
        views_todo=n_views * manifest.images.n_images + manifest.images.n_probe,
        view_bytes=calibration.view_bytes,
        reports=reports,
        rate=measured_rate(calibration.views_per_s),
        processes=processes,
        is_published=False,
    )


def measured_rate(views_per_s: float) -> Rate:
    """The teacher's rate on the planning batch."""
    return Rate(views_per_s=views_per_s, source="measured here")


def size_plan(
    manifest: Manifest,
    out: Path,
    *,
    n_views: int,
    units_todo: int,
    views_todo: int,
    view_bytes: float,
    reports: dict[str, CalibrationReport],
    rate: Rate,
    processes: int,
    is_published: bool,
) -> ExtractPlan:
    """What is left to write of `n_views` view indices and the probe, and the space there is for it."""
    return ExtractPlan(
        out=out,
        teacher=manifest.teacher.name,
        weights=manifest.teacher.weights_source,
        size=CacheSize(
            n_images=manifest.images.n_images,
            n_views=n_views,
            n_probe=manifest.images.n_probe,
            shard_size=manifest.shard_size,
            targets=tuple(manifest.targets),
            view_bytes=view_bytes,
            fitted=reports,
        ),
        n_held_out=len(manifest.images.held_out),
        units_todo=units_todo,
        views_todo=views_todo,
        free=storage.free_space(out),
        rate=rate,
        processes=processes,
        is_published=is_published,
    )


def publish_plan(layout: CacheLayout, plan_files: dict[str, bytes], manifest: Manifest) -> bool:
    """Make a planned cache exist: its plan files first, by digest and suffix, and its manifest last.

    Returns:
        False where another process has published a manifest first.
    """
    storage.make_folder(layout.temporary, layout.root)
    for name, data in plan_files.items():
        _place_plan_file(layout, name, data)
    temp, _ = storage.write_durable(layout.temporary, "manifest.json", manifest.sealed)
    return storage.publish_once(temp, layout.manifest)


def _place_plan_file(layout: CacheLayout, name: str, data: bytes) -> None:
    final = layout.temporary / f"plan-{name}"
    if storage.size_of(final) is None:
        storage.write_whole(final, lambda: data, layout.temporary)
    else:
        storage.sync_folder(layout.temporary)  # whoever wrote it may have been cut off before that


def finish_plan(layout: CacheLayout) -> None:
    """Move the plan files that the manifest names to their places; done by every start, any of which may be cut.

    What is left of other plans goes: no other manifest can be published any more, and whoever still tries reads this.
    Names that are there are synced, too: whoever made them may have been cut off before that.
    """
    manifest = open_cache(layout.root).manifest
    storage.sync_folder(layout.root)  # the manifest before all that follows from it
    moves = {f"plan-{manifest.images.sha256}.parquet": layout.images}
    for target in manifest.targets:
        if target.codec.parameters is not None:
            moves[f"plan-{target.codec.parameters}.safetensors"] = layout.parameters(target.codec.parameters)
    for name, final in moves.items():
        storage.make_folder(final.parent, layout.root)
        if storage.size_of(final) is not None:
            storage.sync_folder(final.parent)
            continue
        if storage.size_of(layout.temporary / name) is None and storage.size_of(final) is None:
            raise FormatError(
                f"{final}: missing, and no copy is left of it; run `{stores.repair_command(layout.root)}`"
            )
        try:
            storage.publish(layout.temporary / name, final)
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            if storage.size_of(final) is None:  # else another process moved it in this moment
                raise FormatError(f"{final}: missing; run the same command again") from error
    storage.make_folder(layout.temporary, layout.root)
    for name in storage.list_folder(layout.temporary):
        if _PLAN_FILE.fullmatch(name):
            with suppress(ProteusCacheError):
                storage.remove(layout.temporary / name)


def parquet_bytes(table: pa.Table) -> bytes:
    """The bytes of `images.parquet`; equal for equal lists, written by one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_statistics=False)
    return buffer.getvalue()
