"""Views in worker processes: a job in, a batch of finished views out.

Jobs carry all that a worker needs, so that no worker holds the image list. A bad image becomes a `Quarantined`
entry; an I/O error is never one: it ends the run, naming the file.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from proteus_cache.cache.receipt import Quarantined
from proteus_cache.cache.writer import StoredView
from proteus_cache.errors import BadImageError, ProteusCacheError, SpaceError
from proteus_cache.plan.human import human_bytes
from proteus_cache.processes import follow_parent, start_fork_server
from proteus_cache.views.make import make_view
from proteus_cache.views.spec import ViewSpec

logger = logging.getLogger(__name__)

_PREFETCH = 2
_SHARED_FOLDER = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Job:
    """Images of one unit that go through the teacher together."""

    view: str
    shard: int
    rows: list[int]
    keys: list[str]
    paths: list[str]
    labels: list[int | None]
    is_last: bool
    """Whether the unit ends with this job."""


@dataclass(slots=True)
class Rendered:
    """The views of one job, in row order; bad images are left out of `views` and `pixels`."""

    job: Job
    views: list[StoredView]
    pixels: torch.Tensor | NDArray[np.uint8]
    """(n, H, W, 3) uint8, decoded from the stored bytes; an array only between processes that share no memory."""
    quarantined: list[Quarantined]


class RenderDataset(Dataset[Rendered | ProteusCacheError]):
    """Map-style by job: the sampler hands out jobs instead of numbers."""

    def __init__(self, root: Path, spec: ViewSpec, share_memory: bool) -> None:
        self.root = root
        self.spec = spec
        self.share_memory = share_memory

    def __getitem__(self, job: Job) -> Rendered | ProteusCacheError:
        """The views of one job, or the error that ends the run: raised here, torch would bury it in a stack trace."""
        try:
            return self._render(job)
        except ProteusCacheError as error:
            return error

    def _render(self, job: Job) -> Rendered:
        views: list[StoredView] = []
        quarantined: list[Quarantined] = []
        side = self.spec.size_px
        pixels = np.empty((len(job.rows), side, side, 3), dtype=np.uint8)
        for row, key, path, label in zip(job.rows, job.keys, job.paths, job.labels, strict=True):
            try:
                view = make_view(self.root / path, path, key, label, job.view, self.spec)
            except BadImageError as error:
                reason = str(error).removeprefix(f"{self.root / path}: ")  # receipts are shared, local paths are not
                quarantined.append(Quarantined(row=row, key=key, path=path, reason=reason))
                continue
            pixels[len(views)] = view.pixels
            views.append(
                StoredView(
                    row=row,
                    key=key,
                    data=view.data,
                    digest=view.digest,
                    source_sha256=view.source_sha256,
                    sample_json=view.sample_json,
                )
            )
        made = pixels[: len(views)]
        return Rendered(job, views, _shared(made) if self.share_memory else made, quarantined)


def render_jobs(
    jobs: Iterable[Job], root: Path, spec: ViewSpec, *, workers: int, batch_size: int, pin: bool
) -> Generator[Rendered]:
    """Render jobs in order, in `workers` processes ahead of the consumer (0: here, on demand).

    Args:
        jobs: taken lazily; at most `2 * workers` are under way.
        root: the folder that paths are relative to.
        spec: of the cache's views.
        workers: rendering processes.
        batch_size: images in a full job; decides whether pixels may travel through /dev/shm (else a pipe).
        pin: page-lock the pixels for asynchronous copies to a GPU.

    Raises:
        StorageError: an image file cannot be read.
        SpaceError: /dev/shm has no room for the queues of worker processes.
        ProteusCacheError: a worker was killed.
    """
    needed_bytes = workers * _PREFETCH * batch_size * spec.size_px**2 * 3
    share_memory = workers > 0 and _shared_memory_suffices(needed_bytes)
    dataset = RenderDataset(root, spec, share_memory)
    rendered = map(dataset.__getitem__, jobs) if workers == 0 else _in_workers(dataset, jobs, workers)
    is_piped = False
    for batch in rendered:
        if isinstance(batch, ProteusCacheError):
            raise batch
        if not is_piped and workers > 0 and isinstance(batch.pixels, np.ndarray):
            is_piped = True
            logger.warning(
                "views go through pipes, which is slower: %s has no room for twice their %s; give it more (a "
                "container: --shm-size), or use fewer --workers or a smaller --batch-size",
                _SHARED_FOLDER,
                human_bytes(needed_bytes),
            )
        if pin:
            batch.pixels = torch.as_tensor(batch.pixels).pin_memory()
        yield batch


def _in_workers(dataset: RenderDataset, jobs: Iterable[Job], workers: int) -> Iterator[Rendered | ProteusCacheError]:
    start_fork_server([__name__, "proteus_cache.extract.fork_server"])
    context = _WorkerContext()
    _check_semaphores(context, 4 * workers + 12)
    loader: DataLoader[Rendered | ProteusCacheError] = DataLoader(
        dataset,
        batch_size=None,
        sampler=jobs,  # any iterable of jobs serves
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        collate_fn=_keep,  # type: ignore[arg-type]  # without batching it gets one item, not a list
    )  # it does not pin: its pinning thread would wait for ever for the rest of what a killed worker was sending
    batches: Iterator[Rendered | ProteusCacheError] | None = None
    try:
        batches = iter(loader)
        yield from batches
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise ProteusCacheError(
            "a rendering process was ended from outside (killed, or out of memory); run the same command again, with "
            "fewer --workers if memory is short; finished units are kept"
        ) from error
    finally:
        # Workers hold nothing that matters. torch would wait for each to finish its batches, or to be born.
        for worker in context.workers:
            if worker.pid is not None:
                worker.kill()
        del batches


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


def default_workers(cores: int, processes: int) -> int:
    """Rendering processes for each of `processes` extracting ones on a machine with `cores` usable cores."""
    return max(1, cores // processes - (1 if cores // processes > 4 else 0))


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    follow_parent()
    torch.set_num_threads(1)


def _keep(rendered: Rendered | ProteusCacheError) -> Rendered | ProteusCacheError:
    return rendered


def _check_semaphores(context: ForkServerContext, count: int) -> None:
    """Refuse to start workers where the queues to them could not be made.

    Raises:
        SpaceError: /dev/shm, where the C library keeps semaphores, is full or not there.
    """
    try:
        made = [context.Lock() for _ in range(count)]
    except OSError as error:
        raise SpaceError(
            f"{_SHARED_FOLDER}: rendering processes cannot be started: {error.strerror}; free space there, give the "
            "container more of it (docker run --shm-size=8g), or render in this process with --workers 0; finished "
            "units are kept"
        ) from error
    del made


def _shared(pixels: NDArray[np.uint8]) -> torch.Tensor | NDArray[np.uint8]:
    """The pixels in shared memory, or as they are where it has no room left.

    The loader would move them there by itself, but in a thread, where an error leaves its consumer waiting for ever.
    """
    views = torch.from_numpy(pixels)
    try:
        views.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return pixels
    return views


def _shared_memory_suffices(needed_bytes: int, folder: str = _SHARED_FOLDER) -> bool:
    """Whether worker batches fit into the shared-memory file system with room to spare."""
    return os.path.isdir(folder) and shutil.disk_usage(folder).free > 2 * needed_bytes
