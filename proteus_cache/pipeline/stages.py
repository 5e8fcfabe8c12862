"""The stages of a pipeline in the order they run: where each one writes, and the command that it stands for.

Settings are checked by the records of the commands themselves, so that a pipeline accepts what they accept. No image,
no weights and no GPU are needed for that.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from proteus_cache.choices import unknown
from proteus_cache.codecs.names import codec_for_target, parse_codec
from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.extract.config import DEFAULT_CODEC, DEFAULT_TARGETS, DEFAULT_VIEWS, ExtractConfig
from proteus_cache.next_steps import command_line
from proteus_cache.pipeline.document import Evaluate, Extract, Pack, Pipeline, Section, Train
from proteus_cache.teachers.registry import check_teacher_name
from proteus_cache.train.config import TrainConfig, config_from_mapping

Kind: TypeAlias = Literal["draw", "extract", "pack", "train", "eval"]
PROTOCOL = "knn"
"""What `eval` does when no protocol is named."""
_OWN_KEYS = {"cache", "run", "pack", "move"}
"""Keys of a section that are no options of its command, or flags without a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage."""

    kind: Kind
    name: str
    out: Path
    """What it makes: a folder, or the report of an evaluation."""
    arguments: tuple[str, ...]
    """Of `proteus-cache`; of Python where scenes are drawn."""
    section: Section
    config: tuple[Path, str] | None = None
    """A file that has to be there first, and its text."""
    inputs: tuple[Path, ...] = ()
    """Files and folders that must be there and that no stage makes."""
    extraction: ExtractConfig | None = None
    training: TrainConfig | None = None
    source: Path | None = None
    """A pack's cache; a score's run."""

    @property
    def title(self) -> str:
        """For people: "train vit_s14"."""
        return f"{self.kind} {self.name}"

    @property
    def command(self) -> str:
        """The one line that does the same, once `config` is there."""
        if self.kind == "draw":
            return shlex.join(["python", *self.arguments])
        line = command_line(*self.arguments)
        return f"{line} --json > {shlex.quote(str(self.out))}" if self.kind == "eval" else line

    @property
    def shell(self) -> list[str]:
        """What does the same in a shell, lines to be pasted."""
        if self.config is None:
            return [self.command]
        path, text = self.config
        quoted = shlex.quote(str(path))
        return [
            f"mkdir -p {shlex.quote(str(path.parent))} && cat > {quoted} <<'EOF'",
            *text.splitlines(),
            "EOF",
            self.command,
        ]


def stages_of(pipeline: Pipeline, home: Path, file: Path) -> list[Stage]:
    """The stages, each run with its scores behind it.

    Args:
        pipeline: as read.
        home: the folder PROTEUS_HOME.
        file: it was read from, for messages.

    Raises:
        UsageError: a setting that its command would refuse, or stages that do not go together; says where.
    """
    _check_moves(pipeline, file)
    draws = [_draw(name, pipeline, home) for name in pipeline.draw]
    caches = [_extract(name, stage, pipeline, home, file) for name, stage in pipeline.extract.items()]
    packs = [_pack(name, stage, pipeline, home, file) for name, stage in pipeline.pack.items()]
    trained = []
    for name, run in pipeline.train.items():
        trained.append(_train(name, run, pipeline, home, file))
        for score, evaluation in pipeline.eval.items():
            if evaluation.run is None or name in evaluation.run:
                trained.append(_evaluate(name, score, evaluation, pipeline, home, file))
    stages = [*draws, *caches, *packs, *trained]
    _check_places(stages, file)
    return stages


def cache_targets(stage: Extract) -> tuple[str, ...]:
    """Targets that a cache will hold."""
    return stage.targets or DEFAULT_TARGETS


def pack_targets(stage: Pack, pipeline: Pipeline) -> tuple[str, ...]:
    """Targets that a pack will hold."""
    return stage.targets or cache_targets(pipeline.extract[stage.cache])


def n_views(stage: Pack, pipeline: Pipeline) -> int:
    """View indices that a pack will hold, the probe left out."""
    if stage.views is None:
        return pipeline.extract[stage.cache].views or DEFAULT_VIEWS
    if len(stage.views) == 1 and stage.views[0].isdecimal():
        return int(stage.views[0])
    return sum(view != "probe" for view in stage.views)


def _check_places(stages: list[Stage], file: Path) -> None:
    """No two stages may write to one place, as the run `a.yaml` and the settings of the run `a` would."""
    owners: dict[Path, str] = {}
    for stage in stages:
        for place in (stage.out, *(() if stage.config is None else (stage.config[0],))):
            if place in owners:
                raise ConfigError(f"{file}: {owners[place]} and {stage.title} would both write {place}; rename one")
            owners[place] = stage.title


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Name the place in the file for what is refused inside."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        raise type(error)(message if message.startswith(place) else f"{place}: {message}") from error


def _options(section: Section, **changed: object) -> list[str]:
    """The keys of a section as the options of its command."""
    values = {name: getattr(section, name) for name in type(section).model_fields if name not in _OWN_KEYS} | changed
    words = []
    for name, value in values.items():
        if value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words


def _draw(name: str, pipeline: Pipeline, home: Path) -> Stage:
    stage, out = pipeline.draw[name], home / "images" / name
    code = (
        "from pathlib import Path; from proteus_cache.demo.scenes import write_scenes; "
        f"write_scenes(Path({json.dumps(str(out))}), per_class={stage.per_class}, seed={stage.seed})"
    )
    return Stage(kind="draw", name=name, out=out, arguments=("-c", code), section=stage)


def _images(value: str | None, pipeline: Pipeline, home: Path) -> tuple[Path | None, tuple[Path, ...]]:
    """Where images are, and what must be there: the same, unless stages draw it.

    A name of `draw`, or a folder of such names, comes before a path.
    """
    if value is None:
        return None, ()
    if any(name == value or name.startswith(f"{value}/") for name in pipeline.draw):
        return home / "images" / value, ()
    path = Path(value).expanduser()
    return path, (path,)


def _weights_file(weights: str | None) -> tuple[Path, ...]:
    return () if weights is None or weights.startswith("random:") else (Path(weights).expanduser(),)


def _extract(name: str, stage: Extract, pipeline: Pipeline, home: Path, file: Path) -> Stage:
    out = home / "caches" / name
    images, inputs = _images(stage.images, pipeline, home)
    with _at(f"{file}: extract.{name}"):
        check_teacher_name(stage.teacher)
        if stage.teacher == "vit" and stage.weights is None:
            raise UsageError("the teacher vit needs `weights`: a file that describes it")
        values = stage.model_dump(exclude={"gpus", "images", "size"})
        config = ExtractConfig(**values, images=images or Path(), out=out, home=home, size_px=stage.size)
        if pipeline.plan.gpu_kind is not None:
            _check_gpu_kind(pipeline.plan.gpu_kind)
    return Stage(
        kind="extract",
        name=name,
        out=out,
        arguments=("extract", *_options(stage, images=images), "--out", str(out)),
        section=stage,
        inputs=(*inputs, *_weights_file(stage.weights)),
        extraction=config,
    )


def _check_gpu_kind(kind: str) -> None:
    from proteus_cache.plan.rates import GPUS

    if kind not in GPUS:
        raise UsageError(f"plan.gpu_kind: {unknown('kind of GPU', kind, GPUS)}")


def _pack(name: str, stage: Pack, pipeline: Pipeline, home: Path, file: Path) -> Stage:
    out, cache = home / "packs" / name, pipeline.extract[stage.cache]
    with _at(f"{file}: pack.{name}"):
        held = cache_targets(cache)
        for target in stage.targets or ():
            if target not in held:
                raise UsageError(f"the cache {stage.cache} does not keep {target!r}; it keeps {', '.join(held)}")
        if stage.codec is not None:
            _check_codec(stage.codec, cache.codec or DEFAULT_CODEC, stage.cache)
        most = cache.views or DEFAULT_VIEWS
        if n_views(stage, pipeline) > most:
            raise UsageError(f"{n_views(stage, pipeline)} views of {stage.cache}, which has {most}; raise its `views`")
    move = ["--move", "--yes"] if stage.move else []
    return Stage(
        kind="pack",
        name=name,
        out=out,
        arguments=("pack", str(home / "caches" / stage.cache), "--out", str(out), *_options(stage), *move),
        section=stage,
        source=home / "caches" / stage.cache,
    )


def _check_codec(codec: str, held: str, cache: str) -> None:
    """`pack` cannot bring back what `klt` has left out."""
    wanted, found = codec_for_target(codec, "patch"), codec_for_target(held, "patch")
    if wanted != found and parse_codec(held).family == "klt":
        raise UsageError(
            f"the cache {cache} is extracted as {found}, and {wanted} cannot bring back what that has left out; leave "
            "`codec` out here, or extract the cache as float16"
        )


def _check_moves(pipeline: Pipeline, file: Path) -> None:
    """A pack that takes its cache's units away must be the last that reads them."""
    moved: dict[str, str] = {}
    for name, stage in pipeline.pack.items():
        if stage.cache in moved:
            raise ConfigError(
                f"{file}: pack.{name}: pack.{moved[stage.cache]} has moved the units of {stage.cache} away by then; "
                "put the pack with `move: true` behind all others of its cache"
            )
        if stage.move:
            moved[stage.cache] = name


def _train(name: str, stage: Train, pipeline: Pipeline, home: Path, file: Path) -> Stage:
    out, place = home / "runs" / name, f"{file}: train.{name}"
    settings, inputs = _settings(stage, pipeline, home, place)
    settings["out"] = str(out)
    with _at(place):
        config = config_from_mapping(settings, place)
        if config.teacher is not None:
            check_teacher_name(config.teacher)
        if stage.pack is not None:
            _check_pack(config, stage.pack, pipeline)
        if stage.gpus is not None and config.global_batch < stage.gpus:
            raise UsageError(f"a batch of {config.global_batch} cannot be shared by {stage.gpus} processes")
    if stage.gpus is not None:
        settings["gpus"] = stage.gpus
    path = home / "runs" / f"{name}.yaml"
    return Stage(
        kind="train",
        name=name,
        out=out,
        arguments=("train", "--config", str(path), "--resume"),
        section=stage,
        config=(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)),
        inputs=(*inputs, *_weights_file(config.teacher_weights), *(() if config.init is None else (config.init,))),
        training=config,
    )


def _settings(
    stage: Train, pipeline: Pipeline, home: Path, place: str
) -> tuple[dict[str, Any], tuple[Path, ...]]:  # values of YAML
    """What stands in the config of a run, and the images that no stage draws."""
    settings = {key: value for key, value in stage.settings.items() if value is not None}
    inputs: tuple[Path, ...] = ()
    if stage.pack is not None:
        settings["data"] = str(home / "packs" / stage.pack)
    elif settings.get("live") is not True:
        raise ConfigError(f"{place}: needs `pack`, the pack to train from, or `live: true` with `teacher` and `images`")
    if isinstance(settings.get("images"), str):
        images, inputs = _images(settings["images"], pipeline, home)
        assert images is not None, "a text names a place"
        settings["images"] = str(images.absolute())  # as `train` writes it down
    return settings, inputs


def _check_pack(config: TrainConfig, name: str, pipeline: Pipeline) -> None:
    """What a run needs must be in its pack."""
    pack = pipeline.pack[name]
    cache = pipeline.extract[pack.cache]
    if config.repeats > n_views(pack, pipeline):
        raise UsageError(
            f"repeats {config.repeats} shows as many different views of an image in an epoch, and the pack {name} "
            f"has {n_views(pack, pipeline)}"
        )
    if not config.live:
        _check_targets(config, name, pack_targets(pack, pipeline))
    elif config.teacher != cache.teacher:
        raise UsageError(f"a replay needs the teacher of its pack: that is {cache.teacher}, not {config.teacher}")


def _check_targets(config: TrainConfig, pack: str, held: tuple[str, ...]) -> None:
    """The losses' targets must be in the pack."""
    needed = (*config.targets, *(config.block_targets or ()))
    missing = [name for name in needed if name not in held]
    if missing:
        raise UsageError(
            f"its losses need {', '.join(missing)}, and the pack {pack} holds {', '.join(held)}; add what is missing "
            "to the `targets` of pack and cache, or set the weights of those losses to 0"
        )
    if config.weight_block > 0 and not any(name.startswith("block.") for name in held):
        raise UsageError(
            f"weight_block is {config.weight_block:g}, and the pack {pack} holds {', '.join(held)}; "
            "add block.N to the `targets` of pack and cache"
        )


def _evaluate(run: str, name: str, stage: Evaluate, pipeline: Pipeline, home: Path, file: Path) -> Stage:
    images, inputs = _images(stage.images, pipeline, home)
    with _at(f"{file}: eval.{name}"):
        _check_protocol(stage.protocol or PROTOCOL)
        if stage.teacher is not None:
            check_teacher_name(stage.teacher)
        elif stage.weights is not None:
            raise UsageError("`weights` are those of a teacher; name it with `teacher`")
    folder = home / "runs" / run
    return Stage(
        kind="eval",
        name=f"{run}.{name}",
        out=home / "runs" / f"{run}.{name}.json",
        arguments=("eval", str(folder), *_options(stage, images=images)),
        section=stage,
        inputs=(*inputs, *_weights_file(stage.weights)),
        source=folder,
    )


def _check_protocol(name: str) -> None:
    from typing import get_args

    from proteus_cache.evaluate.report import Protocol

    if name not in get_args(Protocol):
        raise UsageError(unknown("protocol", name, get_args(Protocol)))


def to_json(stage: Stage) -> dict[str, Any]:  # JSON values
    """A stage for machines."""
    config = None if stage.config is None else {"path": str(stage.config[0]), "text": stage.config[1]}
    return {
        "stage": stage.kind,
        "name": stage.name,
        "out": str(stage.out),
        "command": stage.command,
        "config": config,
    }
