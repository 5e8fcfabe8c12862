"""Batches for a training loop of one's own: pixels and targets as float tensors, on the device that trains.

The same views in the same order as `proteus-cache train` reads with this seed and batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_cache.pack.loader import Loader, open_loader
from proteus_cache.processes import usable_cores

if TYPE_CHECKING:
    from proteus_cache.pack.reader import Pack


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """This process's part of one global batch, ready for a model."""

    step: int
    """Counted from 0."""
    epoch: int
    """Counted from 0."""
    pixels: Tensor
    """(b, 3, H, W) float32, normalised as they were for the teacher."""
    targets: dict[str, Tensor]
    """`cls` (b, D), all others (b, T, D), float32."""


def decoded_batches(
    pack: Pack,
    *,
    batch_size: int,
    n_steps: int,
    first_step: int,
    seed: int,
    repeats: int,
    device: str | torch.device,
    workers: int | None,
    rank: int,
    world_size: int,
) -> Iterator[DecodedBatch]:
    """The batches of `Pack.batches`, which says what the arguments are."""
    place = torch.device(device)
    loader = open_loader(
        pack,
        pack.training_order(seed=seed, batch_size=batch_size, repeats=repeats),
        first_step=first_step,
        last_step=n_steps,
        rank=rank,
        world_size=world_size,
        n_workers=max(1, usable_cores() // world_size - 1) if workers is None else workers,
        pin=place.type == "cuda",
    )
    return _decoded(loader, pack, place)


def _decoded(loader: Loader, pack: Pack, device: torch.device) -> Iterator[DecodedBatch]:
    with loader:
        for batch in loader:
            views, codes = (tensor.to(device, non_blocking=True) for tensor in (batch.views, batch.codes))
            yield DecodedBatch(batch.step, batch.epoch, pack.normalise(views), pack.decode(codes))
