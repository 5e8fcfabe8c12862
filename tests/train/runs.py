"""Small runs for the tests of resuming and of several processes: a made-up pack, a tiny student, what a run leaves."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

import pytest

from proteus_cache import storage
from proteus_cache.students.registry import STUDENTS, StudentSize
from proteus_cache.train.checkpoint import TENSOR_FILES
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


def results(out: Path) -> dict[str, str]:
    """SHA-256 of what a finished run promises, the optimiser's state in its last checkpoint included, by file name."""
    last = max((out / "checkpoints").glob("step-*")).name
    files = [*RESULTS, *(f"checkpoints/{last}/{name}" for name in TENSOR_FILES)]
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}


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
    forkserver.set_forkserver_preload(["torch", "proteus_cache.train.loop", "tests.pack.synthetic"])
    try:
        yield
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # likewise
        forkserver.set_forkserver_preload(["__main__"])  # as it is in the beginning


def killed(work: Callable[[], object], disk: storage.Disk | None = None) -> None:
    """Do `work` in a child of this process, which a SIGKILL in the middle must end.

    This process has to be one that `forked` started and that never trained itself: a copy of one that did cannot.

    Args:
        work: what it is about.
        disk: to put under the child's stores.
    """
    status = _in_child(work, disk)
    assert os.WIFSIGNALED(status), f"nothing killed it: exit code {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def finished(work: Callable[[], object]) -> None:
    """Do `work` in a child of this process, which must come to its end."""
    assert _in_child(work, None) == 0


def _in_child(work: Callable[[], object], disk: storage.Disk | None) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.fsync = lambda fd: None  # the end of a process loses nothing that was not synced
            storage.disk = disk or storage.disk
            with tiny_student():
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # nothing of the parent may run in a copy
    return os.waitpid(child, 0)[1]


def forked(target: Callable[..., None], *args: object) -> ForkServerProcess:
    """Start `target(*args)` in a process."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process
