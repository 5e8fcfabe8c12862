"""Features of images: read, centre crop, every model, length 1.

Each image is read and cut once for all models, by threads (decoding and resizing leave the interpreter free),
while the models compute on the batch before.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from proteus_cache.devices import Advise, or_explain
from proteus_cache.errors import BadImageError, ProteusCacheError
from proteus_cache.evaluate.labelled import Part
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.render import Pixels, render
from proteus_cache.views.source import read_source
from proteus_cache.views.spec import ViewSpec

log = logging.getLogger(__name__)

BAD_IMAGES_AT_LEAST: Final = 10
"""So many bad images of a part are skipped, or one in a thousand if that is more."""
_BAD_IMAGES_SHARE = 0.001
_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Features:
    """What models say of the images of a part that could be read."""

    by_model: dict[str, Tensor]
    """Model name to (N, D) float32 on the CPU, each row of length 1."""
    labels: Tensor
    """(N,) int64."""
    bad_images: tuple[str, ...]
    """Why each skipped image was skipped; every reason names the file."""


def extract_features(
    models: Mapping[str, Teacher],
    part: Part,
    *,
    size_px: int,
    batch_size: int,
    n_threads: int,
    progress: Callable[[int], None],
) -> Features:
    """CLS features after the final norm, L2-normalised, of the centre of each image.

    An image is resized by its shorter side to 256/224 of the size (bicubic) and cut in the centre: the view
    that augmentation `none` makes, without a trip through JPEG. A model that overflows in half precision is
    computed in fp32 from there on.

    Args:
        models: name to model, all for views of `size_px`.
        part: the images.
        size_px: side of the square crop.
        batch_size: images in one forward.
        n_threads: threads that read and resize.
        progress: called with the number of images done since the last call.

    Raises:
        StorageError: an image cannot be read. ProteusCacheError: more bad images than are let pass.
    """
    by_model = {name: torch.empty(len(part), model.identity.width) for name, model in models.items()}
    kept: list[int] = []
    bad_images: list[str] = []
    for results in _batches(part, size_px, batch_size, n_threads):
        good = [(index, pixels) for index, pixels in results if not isinstance(pixels, BadImageError)]
        for _, error in results:
            if isinstance(error, BadImageError):
                _add_bad(bad_images, str(error), len(part))
        if good:
            views = torch.from_numpy(np.stack([pixels for _, pixels in good]))
            rows = slice(len(kept), len(kept) + len(good))
            for name, model in models.items():
                by_model[name][rows] = or_explain(
                    partial(_cls, model, views), len(views), partial(_attempt, model, views), _smaller_batch(len(views))
                )
            kept += [index for index, _ in good]
        progress(len(results))
    labels = torch.from_numpy(part.labels[kept])
    return Features({name: rows[: len(kept)] for name, rows in by_model.items()}, labels, tuple(bad_images))


def centre_view(path: Path, size_px: int) -> Pixels:
    """The centre of one image as (size, size, 3) uint8; errors as `read_source`."""
    spec = ViewSpec(augment="none", size_px=size_px)
    source = read_source(path)
    return render(source.image, draw_recipe(spec, "", "v000", source.width, source.height), spec)


_Result = tuple[int, Pixels | BadImageError]


def _batches(part: Part, size_px: int, batch_size: int, n_threads: int) -> Iterator[list[_Result]]:
    """Images in their order, batch by batch, a few batches read ahead."""

    def read(index: int) -> _Result:
        try:
            return index, centre_view(part.root / part.relative_path(index), size_px)
        except BadImageError as error:
            return index, error

    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="read-image")
    ahead: deque[list[Future[_Result]]] = deque()
    try:
        for start in range(0, len(part), batch_size):
            stop = min(start + batch_size, len(part))
            ahead.append([pool.submit(read, index) for index in range(start, stop)])
            if len(ahead) > _BATCHES_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _add_bad(bad_images: list[str], reason: str, n_images: int) -> None:
    bad_images.append(reason)
    log.warning("skipped image reason=%s", reason)
    limit = max(BAD_IMAGES_AT_LEAST, int(n_images * _BAD_IMAGES_SHARE))
    if len(bad_images) > limit:
        raise ProteusCacheError(
            f"more than {limit} of {n_images:,} images cannot be used, so a score would be one of other "
            f"images; the last: {reason}. Repair or remove them and run the same command again"
        )


def _attempt(model: Teacher, views: Tensor, n: int) -> None:
    model.targets(views[:n], ["cls"])


def _smaller_batch(batch: int) -> Advise:
    def advise(fits: int | None, memory: str) -> str:
        if fits is None:
            return f"the GPU has too little memory for a single image ({memory}); free some there, or try --device cpu"
        return (
            f"the GPU has too little memory for {batch} images at once ({memory}); --batch-size {fits} fits: run the "
            "same command again with it"
        )

    return advise


def _cls(model: Teacher, views: Tensor) -> Tensor:
    features = model.targets(views, ["cls"])["cls"]
    if not features.isfinite().all() and model.precision != "fp32":
        log.warning("not finite in precision=%s, going on in fp32 model=%s", model.precision, model.identity.name)
        features = model.to(model.device, "fp32").targets(views, ["cls"])["cls"]
    if not features.isfinite().all():
        raise ProteusCacheError(
            f"{model.identity.name} ({model.identity.weights_source}): its features are not finite numbers; "
            "its weights are damaged or its training diverged"
        )
    return normalize(features, dim=1).cpu()
