"""Small runs for the tests of resuming and of several processes: a made-up pack, a tiny student, what a run leaves."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

import pytest

from proteus_cache.students.registry import STUDENTS, StudentSize
from proteus_cache.train.config import TrainConfig, config_from_mapping

RESULTS = ("student.safetensors", "heads.safetensors", "ema.safetensors", "metrics.jsonl")


@contextmanager
def tiny_student() -> Iterator[None]:
    """`vit_s14` is small inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cast(dict[str, StudentSize], STUDENTS), "vit_s14", StudentSize(width=24, depth=2, heads=3))
        yield


def run_config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    """A run of the tiny student on a CPU."""
    values: dict[str, object] = {
        "student": "vit_s14",
        "data": pack,
        "out": out,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup_epochs": 1,
        "workers": 0,
        "device": "cpu",
    }
    return config_from_mapping(values | settings)


def results(out: Path) -> dict[str, bytes]:
    """What a finished run promises, by file name."""
    return {name: (out / name).read_bytes() for name in RESULTS}


def step_lines(out: Path) -> list[dict[str, Any]]:  # numbers, and null for a loss that is off
    """Lines of `metrics.jsonl` that are about a step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@contextmanager
def ready_processes() -> Iterator[None]:
    """Processes that `forked` starts inside have torch imported already.

    They come from a fork server of their own, in place of the one that an extraction of another test may have started.
    """
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # typeshed leaves it out
    forkserver.set_forkserver_preload(["torch", "proteus_cache.train.loop"])
    try:
        yield
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # likewise
        forkserver.set_forkserver_preload(["__main__"])  # as it is in the beginning


def forked(target: Callable[..., None], *args: object) -> ForkServerProcess:
    """Start `target(*args)` in a process."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process
