"""What the host does in a second: views rendered as `extract` renders them, files written as it writes them."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from proteus_cache import storage
from proteus_cache.cache.layout import view_name
from proteus_cache.errors import ProteusCacheError, StorageError
from proteus_cache.extract.rendering import Job, default_workers, render_jobs
from proteus_cache.processes import usable_cores
from proteus_cache.teachers.outline import TeacherOutline
from proteus_cache.views.spec import ViewSpec

_RENDER_S = 6.0
_RENDER_BATCH = 16
_MADE_UP = 48
_DISK_S = 4.0
_FILE_BYTES = 256 << 20
_CHUNK_BYTES = 16 << 20
_FREE_SHARE = 8
"""Measuring writes at most one part in so many of what is free, and one file at a time."""


def disk_rate(out: Path) -> float:
    """Bytes a second of files that are hashed, written and synced where a cache at `out` would be.

    They are made of the same random bytes again and again, which only a deduplicating file system would notice,
    and removed at once.

    Raises:
        StorageError: nothing can be written there.
    """
    folder = out
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    limit = min(_FILE_BYTES, storage.free_space(folder).bytes // _FREE_SHARE)
    chunk = np.random.default_rng(0).bytes(max(1, min(_CHUNK_BYTES, limit)))
    n_chunks = max(1, limit // len(chunk))
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".proteus-measures-", dir=folder))
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write there to measure the disk: {error.strerror}; give --out a folder that takes files"
        ) from error
    n_bytes, seconds = 0, 0.0
    try:
        while seconds < _DISK_S:
            started = time.perf_counter()
            path, written = storage.write_durable(scratch, "unit", lambda: itertools.repeat(chunk, n_chunks))
            seconds += time.perf_counter() - started
            n_bytes += written.size
            storage.discard(path)
    finally:
        storage.discard(scratch)
    return n_bytes / seconds


def render_rate(outline: TeacherOutline, photographs: Sequence[Path]) -> tuple[float, int]:
    """Views a second of as many rendering processes as `extract` starts on this machine, and their number.

    Args:
        outline: of the teacher: size and pixel statistics of the views.
        photographs: to render; without any, some are made up.

    Raises:
        ProteusCacheError: none of them can be read.
    """
    spec = ViewSpec(
        augment="deit", size_px=outline.size_px, view_format="jpeg", seed=0, mean=outline.mean, std=outline.std
    )
    n_workers = default_workers(usable_cores(), 1)
    with tempfile.TemporaryDirectory() as folder:
        files = list(photographs) or made_up_photographs(Path(folder), _MADE_UP)
        batches = render_jobs(_jobs(files), Path("/"), spec, workers=n_workers, batch_size=_RENDER_BATCH, pin=False)
        with closing(batches):
            started = now = 0.0
            n_views = n_batches = 0
            for batch in batches:
                now = time.perf_counter()
                n_batches += 1
                if n_batches <= n_workers:  # its process has just started
                    started = now
                    continue
                n_views += len(batch.views)
                if now - started > _RENDER_S:
                    break
    if n_views == 0:
        raise ProteusCacheError(f"{files[0].parent}: none of the images taken as a sample can be read")
    return n_views / (now - started), n_workers


def made_up_photographs(folder: Path, n: int) -> list[Path]:
    """JPEG files of 500 x 375 px and about 110 KB, which are ImageNet's averages."""
    random = np.random.default_rng(0)
    files = []
    for number in range(n):
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + random.normal(0, 12, smooth.shape)
        files.append(folder / f"{number:03d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def _jobs(files: Sequence[Path]) -> Iterator[Job]:
    """The same photographs without end, under another view index each time."""
    for index in itertools.count():
        for start in range(0, len(files), _RENDER_BATCH):
            part = [str(file.resolve()) for file in files[start : start + _RENDER_BATCH]]
            rows = list(range(start, start + len(part)))
            yield Job(
                view=view_name(index),
                shard=0,
                rows=rows,
                keys=[f"image_{row}" for row in rows],
                paths=part,
                labels=[None] * len(part),
                is_last=False,
            )
