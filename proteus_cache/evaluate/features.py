"""Features of views: what a frozen model says of an image, in the form that a protocol wants.

k-NN takes the CLS token after the final norm, at length 1. A linear probe takes the CLS tokens of the last blocks, each
after the final norm, and the mean patch token of the last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from proteus_cache.devices import Advise, or_explain
from proteus_cache.errors import ProteusCacheError
from proteus_cache.evaluate.labelled import Part
from proteus_cache.evaluate.reading import BadImages, in_order, read_views
from proteus_cache.teachers.teacher import Teacher

log = logging.getLogger(__name__)

LAST_BLOCKS: Final = 4
"""A linear probe reads at most so many of the last blocks."""


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

    Each image is read and cut once for all models. A model that overflows in half precision is computed in fp32 from
    there on.

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
    bad_images = BadImages(len(part))
    requests = in_order(range(len(part)), batch_size)
    with closing(read_views(part, requests, bad_images, size_px=size_px, n_threads=n_threads)) as batches:
        for batch in batches:
            if len(batch.rows):
                rows = slice(len(kept), len(kept) + len(batch.rows))
                for name, model in models.items():
                    by_model[name][rows] = normalize(compute(model, batch.views, ["cls"])["cls"], dim=1).cpu()
                kept += batch.rows.tolist()
            progress(batch.n_requests)
    labels = torch.from_numpy(part.labels[kept])
    return Features({name: rows[: len(kept)] for name, rows in by_model.items()}, labels, bad_images.reasons)


def n_last_blocks(model: Teacher) -> int:
    """How many last blocks a linear probe reads of this model: four, or all where there are fewer."""
    return min(LAST_BLOCKS, model.identity.depth)


def last_block_features(model: Teacher, views: Tensor, batch_size: int) -> Tensor:
    """What a linear probe reads of a model, from one forward.

    Args:
        model: frozen; a model that overflows in half precision is computed in fp32 from there on.
        views: (B, H, W, 3) uint8.
        batch_size: views in one forward.

    Returns:
        (B, (n + 1) D) float32 on the model's device, n = `n_last_blocks(model)`: the CLS tokens of the last n blocks,
        first to last, and the mean patch token of the last, the final norm applied to each.
    """
    starts = range(0, len(views), batch_size)
    return torch.cat([_last_blocks(model, views[start : start + batch_size]) for start in starts])


def _last_blocks(model: Teacher, views: Tensor) -> Tensor:
    depth = model.identity.depth
    names = [f"block.{number}" for number in range(depth - n_last_blocks(model), depth)]
    tokens = compute(model, views, names)
    mean_patch = tokens[names[-1]][:, 1:].mean(dim=1)
    return torch.cat([*(tokens[name][:, 0] for name in names), mean_patch], dim=1)


def compute(model: Teacher, views: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The model's targets of a batch, finite.

    Args:
        model: goes on in fp32 if it overflows in half precision.
        views: (B, H, W, 3) uint8, B at least 1.
        names: of targets.

    Raises:
        ProteusCacheError: the GPU has too little memory (says what fits), or the weights are damaged.
    """
    return or_explain(
        partial(_finite, model, views, names),
        len(views),
        lambda n: model.targets(views[:n], names),
        _smaller_batch(len(views)),
    )


def _finite(model: Teacher, views: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    targets = model.targets(views, names)
    if not _are_finite(targets) and model.precision != "fp32":
        log.warning("not finite in precision=%s, going on in fp32 model=%s", model.precision, model.identity.name)
        targets = model.to(model.device, "fp32").targets(views, names)
    if not _are_finite(targets):
        raise ProteusCacheError(
            f"{model.identity.name} ({model.identity.weights_source}): its features are not finite numbers; "
            "its weights are damaged or its training diverged"
        )
    return targets


def _are_finite(targets: Mapping[str, Tensor]) -> bool:
    return all(bool(tokens.isfinite().all()) for tokens in targets.values())


def _smaller_batch(batch: int) -> Advise:
    def advise(fits: int | None, memory: str) -> str:
        if fits is None:
            return f"the GPU has too little memory for a single image ({memory}); free some there, or try --device cpu"
        return (
            f"the GPU has too little memory for {batch} images at once ({memory}); --batch-size {fits} fits: run the "
            "same command again with it"
        )

    return advise
