"""Processes of one run: who this one is, how many cores it may use, and ending when its parent is gone.

A run is one process, or several that a launcher (torchrun, `accelerate launch`, a SLURM array) or `start_ranks`
started. Nothing here needs torch.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.5
_GRACE_S = 20.0
_ASK_AGAIN_S = 5.0
"""Python drops an exception that a signal handler raises inside a callback of the interpreter, as in an import."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Worker:
    """This process among those of one run."""

    index: int
    count: int


def rank_from_environment() -> Worker | None:
    """The rank that torchrun, `accelerate launch` or `start_ranks` gave this process, or None outside of them."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _worker(environment["RANK"], environment["WORLD_SIZE"])
    return None


def worker_from_environment() -> Worker | None:
    """The share of the units that a launcher gave this process, or None outside a launcher.

    Read in this order: the rank, as above; the task of a SLURM array (SLURM_ARRAY_TASK_ID, counted from
    SLURM_ARRAY_TASK_MIN, and SLURM_ARRAY_TASK_COUNT) with the process of `srun` in it (SLURM_PROCID and SLURM_NTASKS);
    that process alone. Tasks of a SLURM array share nothing, so they can extract together but not train together.
    """
    environment = os.environ
    rank = rank_from_environment()
    if rank is not None:
        return rank
    index, count = _process_of_step()
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        task = int(environment["SLURM_ARRAY_TASK_ID"]) - int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        return _worker(task * count + index, int(environment["SLURM_ARRAY_TASK_COUNT"]) * count)
    return _worker(index, count) if count > 1 else None


def _process_of_step() -> tuple[int, int]:
    """Which process of how many `srun` started; (0, 1) outside of it."""
    if "SLURM_STEP_ID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return 0, 1
    return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])


def speaks(worker: Worker | None) -> bool:
    """Whether a worker shows plan and progress: the first of those that share a log, as in a task of an array."""
    in_array = rank_from_environment() is None and "SLURM_ARRAY_TASK_ID" in os.environ
    return worker is None or worker.index == 0 or (in_array and _process_of_step()[0] == 0)


def _worker(index: str | int, count: str | int) -> Worker:
    from proteus_cache.errors import UsageError

    worker = Worker(int(index), int(count))
    if not 0 <= worker.index < worker.count:
        raise UsageError(
            f"the launcher says worker {worker.index} of {worker.count}: the index must be below the count"
        )
    return worker


def usable_cores() -> int:
    """Cores that this process may really use: its affinity, cut by the container's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota_cores()))


def _quota_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores of the cgroup quota (v2, then v1), rounded up; a large number without one."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return 1 << 16 if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        pass
    try:
        quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        return 1 << 16 if int(quota) <= 0 else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return 1 << 16


def follow_parent() -> None:
    """End this process at once when the process that started it is gone, SIGKILL included.

    Works for children of `multiprocessing` with any start method, and for plain children (a change of the parent's
    number is then looked for twice a second). Call it first thing in a worker or rank.
    """
    parent = multiprocessing.parent_process()
    started_by = os.getppid()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
        else:
            while os.getppid() == started_by:
                time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started inside never see SIGINT; this one gets it afterwards.

    Ctrl-C goes to every process of the terminal. One that is still importing would answer with a stack trace.
    """
    multiprocessing.resource_tracker.ensure_running()  # it unblocks SIGINT when it has to be started first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server(preload: list[str]) -> None:
    """Start the process that workers of the start method "forkserver" are forked from, unless it runs.

    Args:
        preload: modules that it imports, so that a worker starts at once.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    with _deaf_to_ctrl_c():
        multiprocessing.forkserver.ensure_running()


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def start_ranks(count: int, target: Callable[..., None], *args: object, patience_s: float = _GRACE_S) -> int:
    """Run `target(*args)` in `count` fresh processes with the environment that torchrun would give them.

    SIGINT and SIGTERM reach the ranks as one SIGTERM; those that have not ended after `patience_s`, or by a second
    SIGINT, are killed. When one rank fails the others are told to stop, and killed after 20 s. `target` must be
    importable and its arguments picklable (they never leave this machine).

    Returns:
        0, or the exit status of the first rank that failed.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came, and a rank ended early; no rank runs any more.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [
        context.Process(target=_run_rank, args=(rank, count, port, target, args), name=f"rank-{rank}")
        for rank in range(count)
    ]
    heard: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda number, _: heard.append(number))
    try:
        with _deaf_to_ctrl_c():
            for rank in ranks:
                rank.start()
        status = _wait(ranks, heard, patience_s)
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status != 0 and heard:
        raise KeyboardInterrupt(signal.Signals(heard[0]).name)
    return status


def _run_rank(rank: int, count: int, port: int, target: Callable[..., None], args: tuple[object, ...]) -> None:
    follow_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        target(*args)
    except SystemExit as leaving:
        leave_rank(leaving.code)
    except BaseException:
        traceback.print_exc()
        leave_rank(1)


def leave_rank(code: object) -> None:
    """End this process at once when it is a rank that failed; return otherwise.

    The usual end of Python takes apart what ranks share, and waits for ranks that may be gone.

    Args:
        code: of a SystemExit.
    """
    failed = code not in (None, 0)
    if failed and rank_from_environment() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _wait(ranks: list[multiprocessing.context.SpawnProcess], heard: list[int], patience_s: float) -> int:
    """Wait for all ranks; stop the others once one failed or the user interrupted.

    Args:
        ranks: started.
        heard: numbers of the signals that came, filled by handlers.
        patience_s: given to ranks that are interrupted.
    """
    failed: int | None = None
    ask_again = 0.0
    deadline: float | None = None
    while running := [rank for rank in ranks if rank.is_alive()]:
        multiprocessing.connection.wait([rank.sentinel for rank in running], timeout=_POLL_S)
        codes = [rank.exitcode for rank in ranks if rank.exitcode]
        if failed is None and codes:
            failed = codes[0]
        if deadline is None and (failed is not None or heard):
            deadline = time.monotonic() + (_GRACE_S if failed is not None else patience_s)
            if failed is None:
                _log.warning("stopping %d processes; a second Ctrl-C ends them at once", len(running))
        if deadline is not None and time.monotonic() >= ask_again:
            ask_again = time.monotonic() + _ASK_AGAIN_S
            for rank in running:
                if rank.is_alive():
                    rank.terminate()
        if deadline is not None and (time.monotonic() > deadline or heard.count(signal.SIGINT) > 1):
            for rank in running:
                rank.kill()
    codes = [rank.exitcode for rank in ranks if rank.exitcode]
    return failed if failed is not None else (codes[0] if codes else 0)
