"""Whether a stage is done, by what is on disk and by the same settings. Whoever is not sure runs the command.

The commands go on with what is unfinished and refuse what is different, in their own words. So "not finished" is
never wrong here, only slower.
"""

from __future__ import annotations

import json
from typing import Any

from proteus_cache import storage
from proteus_cache.cache.reader import is_cache, open_cache
from proteus_cache.demo.scenes import CLASSES, is_scene
from proteus_cache.errors import ConfigError, FormatError, StorageError, UsageError
from proteus_cache.pack.plan import first_views, plan_pack, plan_path
from proteus_cache.pack.reader import is_pack, open_pack
from proteus_cache.pipeline.document import Draw, Extract, Pack
from proteus_cache.pipeline.stages import Stage
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.run_folder import CONFIG, STUDENT
from proteus_cache.yaml_text import MAX_BYTES, read_yaml

_MAX_BYTES = 64 << 20


def is_finished(stage: Stage, stages: list[Stage]) -> bool:
    """Whether nothing is left to do.

    Args:
        stage: the stage.
        stages: all of the pipeline: a pack may have taken a cache's units away.

    Raises:
        UsageError: what is there was made with other settings.
    """
    if stage.kind == "draw":
        return _is_drawn(stage)
    if stage.kind == "extract":
        return _was_moved(stage, stages) or _is_extracted(stage)
    if stage.kind == "pack":
        return _is_packed(stage)
    return _is_trained(stage) if stage.kind == "train" else _is_scored(stage)


def _is_drawn(stage: Stage) -> bool:
    assert isinstance(stage.section, Draw)
    last = stage.section.per_class - 1
    for label, name in enumerate(CLASSES):
        first = stage.out / name / f"{name}_0000.jpg"
        n_images = len(list((stage.out / name).glob("*.jpg")))
        if n_images > last + 1 or (first.is_file() and not is_scene(first, label, stage.section.seed)):
            raise UsageError(
                f"{stage.out}: holds other images than {stage.section.per_class} a class of seed {stage.section.seed}; "
                "remove the folder, or draw to another"
            )
    return all((stage.out / name / f"{name}_{last:04d}.jpg").is_file() for name in CLASSES)


def _was_moved(stage: Stage, stages: list[Stage]) -> bool:
    """Whether `pack --move` has begun to take units away: the cache was complete then, and is not any more."""
    moves = [other for other in stages if other.source == stage.out and isinstance(other.section, Pack)]
    return any(
        other.section.move and (is_pack(other.out) or storage.size_of(plan_path(other.out)) is not None)
        for other in moves
        if isinstance(other.section, Pack)
    )


def _is_extracted(stage: Stage) -> bool:
    """Whether every unit is there. Weights from a file are left to the command, which compares them."""
    from proteus_cache.extract.compatibility import check_settings
    from proteus_cache.extract.pipeline import units_to_do
    from proteus_cache.extract.run import wanted_views

    config = stage.extraction
    assert config is not None
    assert isinstance(stage.section, Extract)
    if not is_cache(stage.out):
        return False
    cache = open_cache(stage.out)
    if config.weights not in (None, cache.manifest.teacher.weights_source):
        return False
    if config.weights is not None and not config.weights.startswith("random:"):
        return False
    n_listed = cache.manifest.images.n_images
    if config.limit is not None and config.limit != n_listed:
        return False
    check_settings(config, cache.manifest)
    return not units_to_do(cache, wanted_views(config, cache))


def _is_packed(stage: Stage) -> bool:
    section = stage.section
    assert isinstance(section, Pack)
    assert stage.source is not None
    if not is_pack(stage.out) or not is_cache(stage.source):
        return False
    views: list[str] | None = None if section.views is None else list(section.views)
    if views is not None and len(views) == 1 and views[0].isdecimal():
        views = first_views(open_cache(stage.source), int(views[0]))
    plan = plan_pack(
        stage.source, stage.out, views=views, targets=section.targets, codec=section.codec, move=section.move
    )
    if plan.finished is None:
        return False
    left = any(plan.cache.units(view) for view in plan.views) if section.move else False
    return not left


def _is_trained(stage: Stage) -> bool:
    """Whether the newest start of this very run came to its end."""
    wanted = stage.training
    assert wanted is not None
    weights, config = _changed_at(stage, STUDENT), _changed_at(stage, CONFIG)
    if weights is None or config is None or weights < config:
        return False
    try:
        recorded = read_yaml(storage.read_bytes(stage.out / CONFIG, MAX_BYTES), str(stage.out / CONFIG))
        run = config_from_mapping(recorded["train"])
        is_of_pack = _is_of_pack(wanted, recorded)
    except (FormatError, ConfigError, KeyError, TypeError):
        return False  # the command says what is wrong with it
    return is_of_pack and _starts_as(run, wanted) and _settings(run, wanted) == _settings(wanted, wanted)


def _starts_as(run: TrainConfig, wanted: TrainConfig) -> bool:
    """Whether the start weights, where some are asked for, are those that the run began with."""
    if wanted.init is None or not wanted.init.is_file():
        return run.init == wanted.init
    return run.init_sha256 == storage.sha256_of(wanted.init)[1]


def _changed_at(stage: Stage, name: str) -> int | None:
    try:
        return (stage.out / name).stat().st_mtime_ns
    except OSError:
        return None


def _is_of_pack(wanted: TrainConfig, recorded: dict[str, Any]) -> bool:  # YAML values
    """Whether the pack is the one that was trained from; a live teacher has none."""
    if wanted.data is None or not is_pack(wanted.data):
        return wanted.data is None
    return bool(recorded["pack"]["pack_digest"] == open_pack(wanted.data).digest)  # KeyError: the command decides


def _settings(config: TrainConfig, asked: TrainConfig) -> dict[str, object]:
    """What decides the result of a run, but what a run writes into its config itself."""
    given = asked.to_mapping()
    kept: dict[str, object] = {
        name: value for name, value in config.identity().items() if not _is_filled_in(name, given)
    }
    return kept | {
        "max_steps": config.max_steps,
        "precision": None if asked.precision is None else config.precision,  # a run writes down the one it took
        "teacher_weights": config.teacher_weights,
    }


def _is_filled_in(name: str, given: dict[str, Any]) -> bool:
    return name.endswith("_sha256") and given.get(name) is None


def _is_scored(stage: Stage) -> bool:
    """Whether the report is of these weights and of this command."""
    assert stage.source is not None
    try:
        scored_at = stage.out.stat().st_mtime_ns
        trained_at = (stage.source / STUDENT).stat().st_mtime_ns
        report = json.loads(storage.read_bytes(stage.out, _MAX_BYTES))
    except (OSError, ValueError, StorageError):
        return False
    return scored_at >= trained_at and isinstance(report, dict) and report.get("command") == stage.command
