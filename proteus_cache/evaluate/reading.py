"""Images of a part to views: read and cut by threads, batch by batch, in the order asked for.

Decoding and resizing leave the interpreter free, so threads read while the models compute on the batch before. No more
than a few batches are in memory. Which pixels come out depends on the request alone, never on the number of threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.errors import BadImageError, ProteusCacheError
from proteus_cache.evaluate.labelled import Part
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.render import Pixels, render
from proteus_cache.views.source import read_source
from proteus_cache.views.spec import ViewSpec

log = logging.getLogger(__name__)

BAD_IMAGES_AT_LEAST: Final = 10
"""So many bad images of a part are skipped, or one in a thousand if that is more."""
_BAD_IMAGES_SHARE = 0.001
_BATCHES_AHEAD = 2


class Request(NamedTuple):
    """One view that is wanted."""

    row: int
    """Of the image in its part."""
    view: str | None = None
    """None: the centre; else the name (`v000`, `v001`, ...) of a random crop."""


@dataclass(frozen=True, slots=True)
class ViewBatch:
    """The views of one batch of requests."""

    rows: NDArray[np.int64]
    """(B,) rows of the images that could be read, in the order of the requests."""
    views: Tensor
    """(B, H, W, 3) uint8."""
    places: NDArray[np.int64]
    """(B,) ascending: which of the requests each view answers."""
    n_requests: int
    """B and the requests for bad images."""


class BadImages:
    """The images of one part that cannot be used: skipped, named once each, and too many are an error."""

    def __init__(self, n_images: int) -> None:
        self._n_images = n_images
        self._reasons: dict[int, str] = {}

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each was skipped, in the order they were met; every reason names the file."""
        return tuple(self._reasons.values())

    def add(self, row: int, reason: str) -> None:
        """Skip an image.

        Raises:
            ProteusCacheError: more of them than are let pass.
        """
        if row in self._reasons:
            return
        self._reasons[row] = reason
        log.warning("skipped image reason=%s", reason)
        limit = max(BAD_IMAGES_AT_LEAST, int(self._n_images * _BAD_IMAGES_SHARE))
        if len(self._reasons) > limit:
            raise ProteusCacheError(
                f"more than {limit} of {self._n_images:,} images cannot be used, so a score would be one of other "
                f"images; the last: {reason}. Repair or remove them and run the same command again"
            )


def in_order(rows: Sequence[int] | NDArray[np.int64], batch_size: int) -> Iterator[list[Request]]:
    """Requests for the centres of these rows, batch by batch."""
    for start in range(0, len(rows), batch_size):
        yield [Request(int(row)) for row in rows[start : start + batch_size]]


_Result: TypeAlias = tuple[int, Pixels | BadImageError]


def read_views(
    part: Part,
    batches: Iterable[Sequence[Request]],
    bad_images: BadImages,
    *,
    size_px: int,
    n_threads: int,
    seed: int = 0,
) -> Generator[ViewBatch, None, None]:
    """The views asked for, batch by batch; a batch of bad images only is empty.

    Close it to end the threads at once, whatever is still to be read.

    Args:
        part: where the images are.
        batches: what is wanted; taken a few batches ahead.
        bad_images: told of what cannot be used.
        size_px: side of the square views.
        n_threads: threads that read and cut.
        seed: of random crops.

    Raises:
        StorageError: an image cannot be read. ProteusCacheError: more bad images than are let pass.
    """

    def read(request: Request) -> _Result:
        path = part.root / part.relative_path(request.row)
        try:
            if request.view is None:
                return request.row, centre_view(path, size_px)
            return request.row, random_crop_view(path, size_px, part.key(request.row), request.view, seed)
        except BadImageError as error:
            return request.row, error

    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="read-image")
    ahead: deque[list[Future[_Result]]] = deque()
    try:
        for batch in batches:
            ahead.append([pool.submit(read, request) for request in batch])
            if len(ahead) > _BATCHES_AHEAD:
                yield _collect(ahead.popleft(), bad_images, size_px)
        while ahead:
            yield _collect(ahead.popleft(), bad_images, size_px)
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(futures: Sequence[Future[_Result]], bad_images: BadImages, size_px: int) -> ViewBatch:
    rows: list[int] = []
    places: list[int] = []
    views: list[Pixels] = []
    for place, future in enumerate(futures):
        row, pixels = future.result()
        if isinstance(pixels, BadImageError):
            bad_images.add(row, str(pixels))
        else:
            rows.append(row)
            places.append(place)
            views.append(pixels)
    return ViewBatch(
        rows=np.array(rows, dtype=np.int64),
        views=torch.from_numpy(np.stack(views) if views else np.empty((0, size_px, size_px, 3), dtype=np.uint8)),
        places=np.array(places, dtype=np.int64),
        n_requests=len(futures),
    )


def centre_view(path: Path, size_px: int) -> Pixels:
    """The centre of one image as (size, size, 3) uint8; errors as `read_source`.

    The shorter side is resized to 256/224 of the size (bicubic) and the centre is cut: the view that augmentation
    `none` makes, without a trip through JPEG.
    """
    spec = ViewSpec(augment="none", size_px=size_px)
    source = read_source(path)
    return render(source.image, draw_recipe(spec, "", "v000", source.width, source.height), spec)


def random_crop_view(path: Path, size_px: int, key: str, view: str, seed: int) -> Pixels:
    """A random part of one image, flipped or not, as (size, size, 3) uint8; errors as `read_source`.

    RandomResizedCrop (area 0.08 to 1, ratio 3/4 to 4/3, bicubic) and a flip at 0.5: augmentation `deit` without its ops
    and its erasing. A pure function of the image and (seed, key, view).
    """
    spec = ViewSpec(augment="deit", size_px=size_px, seed=seed)
    source = read_source(path)
    recipe = draw_recipe(spec, key, view, source.width, source.height)
    return render(source.image, recipe.model_copy(update={"ops": (), "erasing": None}), spec)
