"""Three losses that tell what a student lacks, measured after every epoch.

    seen        stored views that were trained on
    probe       a view of the same images that never is:    a gap to `seen` asks for more views
    held_out    views of images that never are:             a gap to `probe` asks for more images

The student is not in training then: no gradient, no drop path. Masks are those of the first steps, the same after every
epoch, so that only the student changes from one line to the next.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Final

import torch
from accelerate import Accelerator

from proteus_cache.pack.order import BatchPlan, SequentialOrder
from proteus_cache.train.advice import advise
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.data import TrainingData
from proteus_cache.train.feed import DeviceFeed
from proteus_cache.train.masking import n_masked_images
from proteus_cache.train.run_folder import LOSS_NAMES
from proteus_cache.train.source import n_patches
from proteus_cache.train.state import TrainingState

log = logging.getLogger(__name__)

_FEW_VIEWS: Final = 4096
"""So many are read in this process: reader processes would take longer to start."""


class Gaps:
    """Measures the losses of one run after its epochs.

    Args:
        config: of the run.
        accelerator: of this process.
        data: that is trained on; its `evaluation_orders` are not empty.
        state: the student.
        n_epochs: of the run.
        n_workers: reader processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: TrainingData,
        state: TrainingState,
        n_epochs: int,
        n_workers: int,
    ) -> None:
        self._config = replace(config, drop_path=0.0)
        self._accelerator = accelerator
        self._data = data
        self._state = state
        self._last_epoch = n_epochs - 1
        self._chain = _Chain(data.evaluation_orders, config.global_batch)
        self._n_workers = n_workers if self._chain.n_views > _FEW_VIEWS else 0
        self._warned: set[str] = set()

    def is_due(self, done: int) -> bool:
        """Whether losses are to be measured after so many steps."""
        epoch, rest = divmod(done, self._data.order.steps_per_epoch)
        every = self._config.evaluate_every
        return rest == 0 and every is not None and (epoch % every == 0 or epoch - 1 == self._last_epoch)

    def measure(self) -> dict[str, list[float]]:
        """The losses now, the same in every process.

        Returns:
            By kind of views: sum, token, feature, patch and block loss; NaN for one of weight 0.
        """
        accelerator, model = self._accelerator, self._state.bare
        totals = torch.zeros(len(self._chain.orders), len(LOSS_NAMES), device=accelerator.device)
        steps = range(self._chain.n_steps)
        reader = self._data.open(
            self._chain,
            steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            n_workers=self._n_workers,
            pin=accelerator.device.type == "cuda",
        )
        model.eval()
        try:
            with reader, torch.no_grad(), accelerator.autocast():
                for batch in DeviceFeed(reader, self._config, n_patches(self._data), accelerator.device):
                    kind = self._chain.kind_of(batch.step)
                    targets = self._data.targets_of(batch)
                    totals[kind] += model(
                        batch.views, targets, batch.masked_MK, batch.first_odd, self._chain.counts[kind], None
                    )
        finally:
            model.train()
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals, reduction="sum")
        rows: list[list[float]] = totals.tolist()
        return dict(zip(self._chain.orders, rows, strict=True))

    def warn(self, after_epoch: Mapping[str, float | None]) -> None:
        """Say what a gap asks for, once for each remedy."""
        for advice in advise(after_epoch):
            if advice.remedy not in self._warned:
                self._warned.add(advice.remedy)
                log.warning("%s", advice.text)


class _Chain:
    """Several sequences one after the other, as one order."""

    def __init__(self, orders: Mapping[str, SequentialOrder], batch_size: int) -> None:
        self.orders = dict(orders)
        self.batch_size = batch_size
        """An upper bound: batches are those of the sequences."""
        self.counts = [_counts(order) for order in orders.values()]
        """Views and masked views of each sequence: what its means run over."""
        self.n_views = sum(order.records.size for order in orders.values())
        self._ends = list(accumulate(order.n_steps for order in orders.values()))
        self.n_steps = self._ends[-1]

    def kind_of(self, step: int) -> int:
        """Number of the sequence that a step belongs to."""
        return bisect_right(self._ends, step)

    def batch(self, step: int) -> BatchPlan:
        """Batch `step` of `n_steps`."""
        kind = self.kind_of(step)
        first = self._ends[kind - 1] if kind else 0
        return list(self.orders.values())[kind].batch(step - first)


def _counts(order: SequentialOrder) -> tuple[float, float]:
    n_whole, rest = divmod(order.records.size, order.batch_size)
    n_masked = n_whole * n_masked_images(order.batch_size) + n_masked_images(rest)
    return float(order.records.size), float(max(1, n_masked))
