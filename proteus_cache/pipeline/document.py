"""The YAML of a pipeline as a frozen record; docs/pipelines.md is its specification.

Keys and types are checked here, before anything is made. What a key means to a command is checked by the command's
own record (stages.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from proteus_cache import storage
from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError, FormatError, StorageError
from proteus_cache.train.config import TrainConfig
from proteus_cache.yaml_text import MAX_BYTES, read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DRAWN = re.compile(rf"{_NAME.pattern}(/{_NAME.pattern})?")
_SET_HERE = {"data": "`pack` says which", "out": "the run's name says it"}
"""Settings of a training that a pipeline sets itself."""


def _as_names(value: object) -> object:
    """`cls,patch` or a list of names as a tuple."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list) or not value or not all(isinstance(part, str) and part for part in value):
        raise PydanticCustomError("names", "a list of names")
    return tuple(value)


def _as_view_names(value: object) -> object:
    """A number of view indices, or names of them, as `pack --views` takes them."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return (str(value),)
    try:
        return _as_names(value)
    except PydanticCustomError:
        raise PydanticCustomError("views", "a whole number of at least 1, or a list of view indices") from None


def _as_one_or_more(value: object) -> object:
    """One name or several as a tuple."""
    return _as_names([value] if isinstance(value, str) else value)


Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
Count: TypeAlias = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every part of a pipeline: frozen, unknown keys refused, strict types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True)


class Planned(Section):
    """What `--dry-run` reckons with; nothing else reads it."""

    n_images: Count | None = None
    """Images in the folders that are not there yet."""
    gpus: Count = 1
    gpu_kind: str | None = None
    """As for `proteus-cache plan`; None: the kind found here, and no hours without one."""


class Draw(Section):
    """Scenes of the demo, drawn into a folder."""

    per_class: Count
    seed: Annotated[int, Field(ge=0)] = 0


class Extract(Section):
    """A cache; the keys are the options of `proteus-cache extract`."""

    teacher: str
    weights: str | None = None
    images: str | None = None
    limit: int | None = None
    views: int | None = None
    targets: Names | None = None
    codec: str | None = None
    calibration_images: int | None = None
    augment: str | None = None
    size: int | None = None
    view_format: str | None = None
    probe_images: int | None = None
    seed: int | None = None
    shard_size: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    precision: str | None = None
    device: str | None = None
    gpus: Count | None = None


class Pack(Section):
    """A pack of a cache; the keys are the options of `proteus-cache pack`."""

    cache: str
    views: Annotated[tuple[str, ...], BeforeValidator(_as_view_names)] | None = None
    targets: Names | None = None
    codec: str | None = None
    move: bool = False
    workers: Count | None = None


class Train(Section):
    """A run: keys of its own, and any setting of `TrainConfig` but those that follow from them."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="allow", strict=True)

    pack: str | None = None
    """None for a run whose teacher is live."""
    gpus: Count | None = None

    @property
    def settings(self) -> dict[str, Any]:  # values of YAML
        """The training's settings as they stand in the file."""
        return dict(self.model_extra or {})


class Evaluate(Section):
    """Scores of runs; the other keys are the options of `proteus-cache eval`."""

    run: Annotated[tuple[str, ...], BeforeValidator(_as_one_or_more)] | None = None
    """None: every run of the pipeline."""
    images: str | None = None
    protocol: str | None = None
    teacher: str | None = None
    weights: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    probe_steps: Count | None = None
    probe_batch: Count | None = None
    batch_size: Count | None = None
    workers: Count | None = None
    device: str | None = None


class Pipeline(Section):
    """A whole file: sections of named stages."""

    version: Literal[1]
    plan: Planned = Planned()
    draw: dict[str, Draw] = {}
    extract: dict[str, Extract] = {}
    pack: dict[str, Pack] = {}
    train: dict[str, Train] = {}
    eval: dict[str, Evaluate] = {}


_STAGES: Mapping[str, type[Section]] = {
    "draw": Draw,
    "extract": Extract,
    "pack": Pack,
    "train": Train,
    "eval": Evaluate,
}


def read_pipeline(path: Path) -> Pipeline:
    """The pipeline in a file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has an unknown key (the nearest is named) or a value of
            another type, or names what it does not hold.
    """
    value = _read_yaml(path)
    try:
        pipeline = Pipeline.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explained(error.errors()[0])}") from error
    _check_names(pipeline, path)
    _check_references(pipeline, path)
    return pipeline


def training_keys() -> list[str]:
    """Keys that a stage of `train` may have."""
    return [*Train.model_fields, *(name for name in TrainConfig.__dataclass_fields__ if name not in _SET_HERE)]


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the YAML file of a pipeline")
    try:
        value = read_yaml(storage.read_bytes(path, MAX_BYTES), str(path))
    except StorageError as error:
        reason = "no such file" if not path.exists() else "cannot be read"
        raise ConfigError(f"{path}: {reason}; give the YAML file of a pipeline, as in docs/pipelines.md") from error
    except FormatError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a pipeline is a list of `name: value` lines, as in docs/pipelines.md")
    return value


def _explained(error: ErrorDetails) -> str:
    """The first thing that is wrong, with the key that it is wrong with."""
    where = [str(part) for part in error["loc"] if part != "[key]"]
    kind, place = error["type"], ".".join(where)
    if kind == "extra_forbidden":
        owner = ".".join(where[:-1])
        return (f"{owner}: " if owner else "") + unknown("key", where[-1], _keys_at(where[:-1]))
    if kind == "missing":
        return f"{place} is missing{' (the only version is 1)' if place == 'version' else ''}"
    if kind == "literal_error":
        return f"{place} must be {error['ctx']['expected']}, got {_short(error['input'])}"
    return f"{place} must be {_wanted(error)}, got {_short(error['input'])}"


def _wanted(error: ErrorDetails) -> str:
    """What a value should have been."""
    kinds = {
        "int_type": "a whole number",
        "string_type": "a text",
        "bool_type": "true or false",
        "dict_type": "`name: value` lines",
        "model_type": "`name: value` lines",
        "model_attributes_type": "`name: value` lines",
    }
    if error["type"] == "greater_than_equal":
        return f"at least {error['ctx']['ge']}"
    return kinds.get(error["type"], error["msg"])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(where: list[str]) -> list[str]:
    """The keys of the section at a place."""
    if not where:
        return list(Pipeline.model_fields)
    section = Planned if where[0] == "plan" else _STAGES[where[0]]
    return list(section.model_fields)


def _check_names(pipeline: Pipeline, path: Path) -> None:
    """Names become names of folders and files; keys of a training are those of its config."""
    for section in _STAGES:
        pattern = _DRAWN if section == "draw" else _NAME
        for name in getattr(pipeline, section):
            if not pattern.fullmatch(name):
                slash = " (and one / between two names)" if section == "draw" else ""
                raise ConfigError(
                    f"{path}: {section}: {name!r} is no name of a folder: use letters, digits, . _ and -{slash}"
                )
    for name, stage in pipeline.train.items():
        for key in stage.settings:
            if key in _SET_HERE:
                raise ConfigError(f"{path}: train.{name}: {key} is not set here: {_SET_HERE[key]}")
            if key not in training_keys():
                raise ConfigError(f"{path}: train.{name}: {unknown('key', key, training_keys())}")


def _check_references(pipeline: Pipeline, path: Path) -> None:
    """A stage may name only what the same file makes."""

    def refuse(place: str, what: str, name: str, names: Mapping[str, object]) -> NoReturn:
        there = unknown(what, name, names) if names else f"there is no {what} in this file"
        raise ConfigError(f"{path}: {place}: {there}")

    for name, pack in pipeline.pack.items():
        if pack.cache not in pipeline.extract:
            refuse(f"pack.{name}.cache", "cache", pack.cache, pipeline.extract)
    for name, run in pipeline.train.items():
        if run.pack is not None and run.pack not in pipeline.pack:
            refuse(f"train.{name}.pack", "pack", run.pack, pipeline.pack)
    for name, scores in pipeline.eval.items():
        for run_name in scores.run or ():
            if run_name not in pipeline.train:
                refuse(f"eval.{name}.run", "run", run_name, pipeline.train)
    if not any(getattr(pipeline, section) for section in _STAGES):
        raise ConfigError(f"{path}: has no stage; the sections are {', '.join(_STAGES)}")
