"""Views in worker processes: a job in, a batch of finished views out.

Jobs carry all that a worker needs, so that no worker holds the image list. A bad image becomes a `Quarantined`
entry; an I/O error is never one: it ends the run, naming the file.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_cache.cache.receipt import Quarantined
from proteus_cache.cache.writer import StoredView
from proteus_cache.errors import BadImageError
from proteus_cache.views.make import make_view
from proteus_cache.views.spec import ViewSpec
from proteus_cache.workers import AHEAD, answers, is_piped, shared, shared_memory_suffices, warn_of_pipes


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


class RenderWork:
    """What a worker does with a job."""

    def __init__(self, root: Path, spec: ViewSpec, share_memory: bool) -> None:
        self.root = root
        self.spec = spec
        self.share_memory = share_memory

    def __call__(self, job: Job) -> Rendered:
        """The views of one job."""
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
        return Rendered(job, views, shared(made) if self.share_memory else made, quarantined)


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
    needed_bytes = workers * AHEAD * batch_size * spec.size_px**2 * 3
    work = RenderWork(root, spec, share_memory=workers > 0 and shared_memory_suffices(needed_bytes))
    warned = False
    again, kept = "run the same command again", "finished units are kept"
    with closing(answers(work, jobs, workers=workers, again=again, kept=kept)) as batches:
        for batch in batches:
            if workers > 0 and not warned and is_piped(batch.pixels):
                warned = True
                warn_of_pipes(needed_bytes)
            if pin:
                batch.pixels = torch.as_tensor(batch.pixels).pin_memory()
            yield batch


def default_workers(cores: int, processes: int) -> int:
    """Rendering processes for each of `processes` extracting ones on a machine with `cores` usable cores."""
    return max(1, cores // processes - (1 if cores // processes > 4 else 0))
