"""Small pipelines for tests, and a quick way to run their commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from proteus_cache.pipeline.document import read_pipeline
from proteus_cache.pipeline.run import Done, run_pipeline
from proteus_cache.pipeline.stages import Stage, stages_of


class _Update(Protocol):
    def __call__(self, done: float, total: float, n_bytes: int) -> None: ...


class Shown:
    """Keeps what a pipeline tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, label: str, unit: str) -> AbstractContextManager[_Update]:
        @contextmanager
        def ignored() -> Iterator[_Update]:
            yield lambda done, total, n_bytes: None

        return ignored()


def small() -> dict[str, Any]:  # values of YAML
    """Twelve scenes, two views, four steps; everything on the CPU, without worker processes."""
    return {
        "version": 1,
        "draw": {"scenes/train": {"per_class": 2}, "scenes/test": {"per_class": 1, "seed": 1}},
        "extract": {
            "c": {
                **{"teacher": "demo", "images": "scenes/train", "views": 2, "shard_size": 4, "codec": "float16"},
                **{"workers": 0, "device": "cpu"},
            }
        },
        "pack": {"c-float16": {"cache": "c", "workers": 1}},
        "train": {
            "r": {
                **{"pack": "c-float16", "student": "vit_demo", "max_steps": 6, "batch_size": 4, "lr": 1.0e-3},
                **{"workers": 0, "device": "cpu", "checkpoint_every": 1},
            }
        },
        "eval": {"knn": {"images": "scenes", "workers": 1, "device": "cpu"}},
    }


def write(path: Path, value: object) -> Path:
    """A pipeline's file."""
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def stages(file: Path, home: Path) -> list[Stage]:
    """The stages of a file."""
    return stages_of(read_pipeline(file), home, file)


def run_stages(file: Path, home: Path, program: list[str]) -> tuple[list[Done], Shown]:
    """Run a pipeline in this process, its commands with `program`."""
    shown = Shown()
    return run_pipeline(stages(file, home), program, ["--quiet"], shown), shown
