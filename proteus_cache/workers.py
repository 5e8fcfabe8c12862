"""Jobs in worker processes: answers in the order of the jobs, a bounded number ahead, and an end within seconds.

Workers are forked from a server that has imported what they need. They end at once with the process that started
them, are deaf to Ctrl-C (their parent decides), and hold no lock that its end would wait for.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from proteus_cache.errors import ProteusCacheError, SpaceError
from proteus_cache.plan.human import human_bytes
from proteus_cache.processes import follow_parent, start_fork_server

logger = logging.getLogger(__name__)

AHEAD: Final = 2
"""Jobs under way for each worker."""
_SHARED_FOLDER: Final = "/dev/shm"

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def answers(
    work: Callable[[Job], Answer], jobs: Iterable[Job], *, workers: int, again: str, kept: str
) -> Generator[Answer]:
    """Do jobs in order, in `workers` processes ahead of the consumer (0: here, on demand).

    Args:
        work: done in the workers; picklable. What it raises of our own errors is raised here.
        jobs: taken lazily; at most `AHEAD * workers` are under way.
        workers: processes.
        again: what to do when workers were killed, such as "run the same command again".
        kept: what is not lost then, such as "finished units are kept".

    Raises:
        SpaceError: /dev/shm has no room for the queues of worker processes.
        ProteusCacheError: a worker was killed.
    """
    if workers == 0:
        yield from map(work, jobs)
        return
    with closing(_in_workers(_Jobs(work), jobs, workers, again, kept)) as made:
        for answer in made:
            if isinstance(answer, ProteusCacheError):
                raise answer
            yield answer


class _Jobs(Dataset[Answer | ProteusCacheError], Generic[Job, Answer]):
    """Map-style by job: the sampler hands out jobs instead of numbers."""

    def __init__(self, work: Callable[[Job], Answer]) -> None:
        self.work = work

    def __getitem__(self, job: Job) -> Answer | ProteusCacheError:
        """The answer, or the error that ends the run: raised here, torch would bury it in a stack trace."""
        try:
            return self.work(job)
        except ProteusCacheError as error:
            return error


def _in_workers(
    dataset: _Jobs[Job, Answer], jobs: Iterable[Job], workers: int, again: str, kept: str
) -> Generator[Answer | ProteusCacheError]:
    start_fork_server([__name__, type(dataset.work).__module__, "proteus_cache.fork_server"])
    context = _WorkerContext()
    _check_semaphores(context, 4 * workers + 12, kept)
    loader: DataLoader[Answer | ProteusCacheError] = DataLoader(
        dataset,
        batch_size=None,
        sampler=jobs,  # any iterable of jobs serves
        num_workers=workers,
        prefetch_factor=AHEAD,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        collate_fn=_keep,  # without batching it gets one item, not a list
    )  # it does not pin: its pinning thread would wait for ever for the rest of what a killed worker was sending
    batches: Iterator[Answer | ProteusCacheError] | None = None
    try:
        batches = iter(loader)
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if not _means_killed(error):
            raise
        raise ProteusCacheError(
            f"a rendering process was ended from outside (killed, or out of memory); {again}, with fewer --workers if "
            f"memory is short; {kept}"
        ) from error
    finally:
        # Workers hold nothing that matters. torch would wait for each to finish its batches, or to be born.
        for worker in context.workers:
            if worker.pid is not None:
                worker.kill()
        del batches


def _means_killed(error: Exception) -> bool:
    """Whether the loader met the end of a worker: it saw it, or it asked one for an answer that it had announced."""
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in str(error) or "killed by signal" in str(error)
    return not str(error).startswith("Caught ")  # else the loader passes on what the work itself raised


class _WorkerContext(ForkServerContext):
    """The start method "forkserver", remembering what it started."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[ForkServerProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> ForkServerProcess:  # type: ignore[override]  # a class there
        worker = ForkServerProcess(*args, **kwargs)
        self.workers.append(worker)
        return worker

    def Event(self) -> _Flag:  # type: ignore[override]  # as much of one as the loader uses
        return _Flag(self)


class _Flag:
    """An event without a lock: a worker that is killed while it looks at an ordinary one keeps that one's lock, and
    the loader, which sets it at its end, would wait for it for ever."""

    def __init__(self, context: ForkServerContext) -> None:
        self._is_set = context.RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        self._is_set.value = True

    def is_set(self) -> bool:
        return bool(self._is_set.value)


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    follow_parent()
    torch.set_num_threads(1)


def _keep(answer: Answer) -> Answer:
    return answer


def _check_semaphores(context: ForkServerContext, count: int, kept: str) -> None:
    """Refuse to start workers where the queues to them could not be made.

    Raises:
        SpaceError: /dev/shm, where the C library keeps semaphores, is full or not there.
    """
    try:
        made = [context.Lock() for _ in range(count)]
    except OSError as error:
        raise SpaceError(
            f"{_SHARED_FOLDER}: rendering processes cannot be started: {error.strerror}; free space there, give the "
            f"container more of it (docker run --shm-size=8g), or render in this process with --workers 0; {kept}"
        ) from error
    del made


def shared(array: NDArray[Any]) -> torch.Tensor | NDArray[Any]:  # of any type of number
    """An array in shared memory, or as it is where that has no room left.

    The loader would move it there by itself, but in a thread, where an error leaves its consumer waiting for ever.
    """
    tensor = torch.from_numpy(array)
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return array
    return tensor


def shared_memory_suffices(needed_bytes: int, folder: str = _SHARED_FOLDER) -> bool:
    """Whether what workers have under way fits into the shared-memory file system with room to spare."""
    return os.path.isdir(folder) and shutil.disk_usage(folder).free > 2 * needed_bytes


def warn_of_pipes(needed_bytes: int) -> None:
    """Say that what workers made comes through pipes."""
    logger.warning(
        "views go through pipes, which is slower: %s has no room for twice their %s; give it more (a "
        "container: --shm-size), or use fewer --workers or a smaller --batch-size",
        _SHARED_FOLDER,
        human_bytes(needed_bytes),
    )


def is_piped(made: torch.Tensor | NDArray[np.generic]) -> bool:
    """Whether an answer's array came through a pipe instead of shared memory."""
    return isinstance(made, np.ndarray)
