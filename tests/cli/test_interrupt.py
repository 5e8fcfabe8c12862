"""Ctrl-C through the command line, early and in the middle: one line, a status, nobody left, and how to go on.

Extraction in the middle has its own test (tests/extract/test_interrupt.py).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.running import extract_arguments, run
from tests.extract.test_interrupt import processes_of_session
from tests.makers import make_images


class Command:
    """A command in a session of its own, as a terminal would start it."""

    def __init__(self, arguments: list[object]) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "proteus_cache", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return when something is so; fail when the command ends before."""
        while not is_so():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def press_ctrl_c(self) -> None:
        """To every process of the terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Status, stdout and stderr; nobody of the session is left, and no stack trace was printed."""
        out, errors = self.process.communicate(timeout=60)
        deadline = time.monotonic() + 2
        while (left := processes_of_session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []
        # Python's own start, which nobody can make silent, dies of the signal itself and has not met our code.
        is_before_us = self.process.returncode == -signal.SIGINT and "proteus_cache" not in errors
        assert "Traceback" not in errors or is_before_us, errors
        assert "Exception ignored" not in errors, errors
        return self.process.returncode, out, errors


@contextmanager
def started(*arguments: object) -> Iterator[Command]:
    """A running command, killed when a test leaves it behind."""
    command = Command(list(arguments))
    try:
        yield command
    finally:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGKILL)
            command.process.communicate()


def proposed(text: str) -> list[str]:
    """The arguments of the command at the end of a message."""
    return shlex.split(text.strip().splitlines()[-1].partition("proteus-cache ")[2].rpartition("proteus-cache ")[2])


def train_slowly(folder: Path, out: Path, processes: int) -> list[object]:
    return [
        *("train", "--student", "vit_ti14", "--data", folder / "pack", "--out", out, "--batch-size", 8),
        *("--workers", 1, "--device", "cpu", "--gpus", processes),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("name", ["extract", "pack", "train", "eval", "verify"])
def test_ctrl_c_before_the_work_begins_is_one_line(folder: Path, tmp_path: Path, name: str, delay_s: float) -> None:
    arguments: dict[str, list[object]] = {
        "extract": [*extract_arguments(folder), "--out", tmp_path / "my cache", "--views", 400],
        "pack": ["pack", folder / "cache", "--out", tmp_path / "my pack"],
        "train": train_slowly(folder, tmp_path / "my run", 1),
        "eval": ["eval", folder / "run", "--images", folder / "images", "--device", "cpu"],
        "verify": ["verify", folder / "cache", "--read-data"],
    }

    with started(*arguments[name]) as command:
        time.sleep(delay_s)  # wherever that is: imports, planning, or the work itself
        if command.process.poll() is not None:
            pytest.skip("it was faster")
        command.press_ctrl_c()
        status, out, errors = command.end()

    if status == 0:
        pytest.skip("it had just finished")
    if status == -signal.SIGINT and "proteus_cache" not in errors and "proteus-cache:" not in errors:
        pytest.skip("Python itself had not begun")
    last = errors.splitlines()[-1]
    assert status == 1, errors
    if "nothing was begun" not in last:
        added = ["--resume"] if name == "train" else []
        assert proposed(out if out else last) == [*command.arguments, *added]


@pytest.mark.slow
def test_ctrl_c_while_packing_keeps_the_finished_tars(folder: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 60)
    cache, pack = tmp_path / "cache", tmp_path / "my pack"
    run(*extract_arguments(folder), "--images", tmp_path / "images", "--out", cache, "--views", 30, "--shard-size", 4)

    with started("pack", cache, "--out", pack, "--workers", 1) as command:
        command.wait_until(lambda: any(pack.glob("v000/*.tar")))
        command.press_ctrl_c()
        status, out, errors = command.end()

    assert (status, out) == (1, "")
    assert "interrupted; finished tars are kept; to go on: proteus-cache pack" in errors
    kept = {path: path.stat().st_ino for path in pack.glob("v*/*.tar")}
    run(*proposed(errors))
    assert kept
    assert {path: path.stat().st_ino for path in kept} == kept
    assert "whole" in run("verify", pack, "--read-data").stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_while_training_saves_the_step_and_says_how_to_go_on(
    folder: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "my run"
    metrics = out / "metrics.jsonl"

    with started(*train_slowly(folder, out, processes)) as command:
        command.wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
        command.press_ctrl_c()
        status, said, errors = command.end()

    steps = len(metrics.read_text().splitlines())
    assert status == 1
    assert f"run {out}: stopped by SIGINT; the checkpoint of step {steps} is kept\nnext: " in said
    assert "Ctrl-C" in errors
    assert proposed(said) == [*command.arguments, "--resume"]
    resumed = run(*proposed(said), "--gpus", 1, "--max-steps", steps + 1)
    assert f"resumes   after step {steps}" in resumed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_ctrl_c_leaves_at_once(folder: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    slow = [*train_slowly(folder, out, processes), "--student", "vit_b14", "--batch-size", 24]

    with started(*slow) as command:
        command.wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
        command.press_ctrl_c()
        time.sleep(0.3)  # a second signal right behind the first would be one with it
        if command.process.poll() is None:
            command.press_ctrl_c()
        began = time.monotonic()
        status, _, errors = command.end()

    assert status in (1, -signal.SIGINT)
    assert time.monotonic() - began < 30
    assert "Ctrl-C" in errors
