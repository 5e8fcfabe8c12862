"""processes: places given by launchers, cores, and ending when the parent is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from proteus_cache import processes
from proteus_cache.errors import UsageError
from proteus_cache.processes import Worker, speaks, start_ranks, usable_cores, worker_from_environment

_LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_STEP_ID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Worker(3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}, Worker(3, 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Worker(1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),
        (
            {
                **{"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"},
                **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"},
            },
            Worker(2 * 8 + 5, 4 * 8),
        ),
    ],
)
def test_the_place_comes_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Worker | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert worker_from_environment() == expected


def test_an_impossible_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")

    with pytest.raises(UsageError, match="worker 8 of 8"):
        worker_from_environment()


def test_cores_are_cut_by_the_container_quota(tmp_path: Path) -> None:
    assert usable_cores() >= 1
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert processes._quota_cores(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processes._quota_cores(tmp_path) > 1000


def _write_place(folder: str) -> None:
    (Path(folder) / os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"] + os.environ["MASTER_ADDR"])


def _fail_or_wait(folder: str) -> None:
    if os.environ["RANK"] == "0":
        sys.exit(7)
    signal.pause()


def test_ranks_get_a_launcher_environment(tmp_path: Path) -> None:
    assert start_ranks(2, _write_place, str(tmp_path)) == 0

    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [
        ("0", "2127.0.0.1"),
        ("1", "2127.0.0.1"),
    ]


def test_a_failed_rank_ends_the_others(tmp_path: Path) -> None:
    assert start_ranks(2, _fail_or_wait, str(tmp_path)) == 7


def _interrupt_parent_and_wait(folder: str) -> None:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    (Path(folder) / os.environ["RANK"]).write_text(str(blocked))
    while len(list(Path(folder).iterdir())) < 2:
        os.sched_yield()
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)
    signal.pause()


def test_ctrl_c_reaches_the_ranks_through_their_parent_only(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start_ranks(2, _interrupt_parent_and_wait, str(tmp_path))

    assert [path.read_text() for path in tmp_path.iterdir()] == ["True", "True"]
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
print(child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""
_CHILD = """
import os, time
from proteus_cache.processes import follow_parent
follow_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT.format(child=_CHILD)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())

        parent.kill()
        parent.wait()

    assert _is_gone(child)


def _is_gone(pid: int) -> bool:
    """Wait until a process has ended; a minute is only reached when it never does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
    return False


@pytest.mark.parametrize(
    ("environment", "is_heard"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),  # srun makes one log
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, True),  # a task of an array has its own
    ],
)
def test_one_process_of_each_log_speaks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_heard: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert speaks(worker_from_environment()) is is_heard


def _ignore_the_first_request(folder: str) -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    (Path(folder) / os.environ["RANK"]).touch()
    while len(asked) < 2:
        time.sleep(0.02)
    sys.exit(3)


def _interrupt_when_ready(folder: Path, parent: int) -> None:
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    os.kill(parent, signal.SIGINT)


def test_a_rank_that_lost_the_first_request_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ASK_AGAIN_S", 0.2)
    threading.Thread(target=_interrupt_when_ready, args=(tmp_path, os.getpid()), daemon=True).start()
    began = time.monotonic()

    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        start_ranks(2, _ignore_the_first_request, str(tmp_path))

    assert time.monotonic() - began < 20
