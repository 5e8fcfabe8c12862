"""What a run learns from: batches in an order, and what the teacher says of them.

Targets are stored (`stored.py`: a pack), or come from a live teacher, for the stored views of a pack (`stored.py`,
which proves that both train the same student) or for fresh views of images (`fresh.py`, the published method).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import torch

from proteus_cache.codecs.codec import Basis
from proteus_cache.pack.order import Order, SequentialOrder
from proteus_cache.teachers.teacher import Precision
from proteus_cache.train.feed import DeviceBatch, HostBatch
from proteus_cache.train.source import TargetSource
from proteus_cache.train.targets import Target


class TrainingOrder(Order, Protocol):
    """An order of training."""

    @property
    def n_samples(self) -> int:
        """Views that an epoch draws from."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""


class BatchReader(Protocol):
    """This process's part of every batch of a range of steps, in order."""

    @property
    def bytes_read(self) -> int:
        """From the disk, so far."""

    @property
    def waited_s(self) -> float:
        """How long its consumer has waited for it, so far."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> HostBatch: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TrainingData(TargetSource, Protocol):
    """One source of batches and targets."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What a resumed run must find again: names for people, values to be compared."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """Metadata of the weights that come out."""

    @property
    def description(self) -> Mapping[str, object]:
        """For config.yaml."""

    @property
    def bases(self) -> Mapping[str, Basis]:
        """By target, where losses look along some directions only."""

    @property
    def n_views(self) -> int | None:
        """Stored views that training draws from or holds out; None for fresh ones."""

    @property
    def bytes_per_view(self) -> float:
        """Read from the disk for one."""

    @property
    def order(self) -> TrainingOrder:
        """What every step trains on."""

    @property
    def evaluation_orders(self) -> Mapping[str, SequentialOrder]:
        """What the losses after an epoch are measured on, by `seen`, `probe` and `held_out`; empty where neither views
        nor images are kept from training."""

    def open(self, order: Order, steps: range, *, rank: int, world_size: int, n_workers: int, pin: bool) -> BatchReader:
        """Batches of these steps of an order of this source.

        Args:
            order: `order`, or one of `evaluation_orders`.
            steps: consecutive.
            rank: of this process.
            world_size: processes that share a batch.
            n_workers: reader processes; 0 reads in this process.
            pin: hand out pinned memory.
        """

    def samples_of(self, step: int) -> list[dict[str, object]]:
        """What the global batch of a step of `order` was made of, for people who look for a bad sample.

        Returns:
            One dictionary a position: the sample's `key`, where it lies, `is_finite` and `largest` (absolute value)
            of its targets where those are stored.
        """

    def to(self, device: torch.device, precision: Precision) -> None:
        """Move what makes targets to the device that trains."""

    def targets_of(self, part: DeviceBatch) -> Mapping[str, Target]:
        """Targets of views on the device by name, those that the losses need: float32, whole or as components."""
