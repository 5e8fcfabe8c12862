"""From the loader to the device: batches are copied one step ahead, on a stream of their own.

Nothing here waits for the GPU; how long it computed is timed by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proteus_cache.students.registry import student_size
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.drop_path import draw_kept
from proteus_cache.train.masking import draw_masks, n_masked_patches


class HostBatch(Protocol):
    """What the pack's loader gives: this process's slice of a global batch."""

    @property
    def step(self) -> int: ...  # 0-based
    @property
    def epoch(self) -> int: ...
    @property
    def positions(self) -> Tensor: ...  # (b,) int64, consecutive, within the global batch
    @property
    def views(self) -> Tensor: ...  # (b, H, W, 3) uint8
    @property
    def codes(self) -> Tensor: ...  # (b, code_bytes) uint8


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The same on the device, with the masks of its odd positions."""

    step: int
    epoch: int
    first_odd: int
    """0 or 1: the first masked view of this slice."""
    views: Tensor
    codes: Tensor
    masked_MK: Tensor
    """(M, K) int64, a row for each masked view."""
    kept: Tensor | None = None
    """(b, 2, depth, 2) uint8, branches that drop path leaves; None without drop path."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is on the device."""
        tensors = (self.views, self.codes, self.masked_MK)
        return tensors if self.kept is None else (*tensors, self.kept)


class DeviceFeed:
    """Batches on the device, each copied while the work queued for the one before it is computed.

    Args:
        batches: of this process, in order.
        config: seed and mask ratio of the run.
        n_patches: of a view.
        device: where to.
    """

    def __init__(self, batches: Iterator[HostBatch], config: TrainConfig, n_patches: int, device: torch.device) -> None:
        self._batches = batches
        self._config = config
        self._n_patches = n_patches
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch

    def __iter__(self) -> Iterator[DeviceBatch]:
        ahead = self._next()
        while ahead is not None:
            batch, copied = ahead
            if copied is not None:
                compute = torch.cuda.current_stream(self._device)
                compute.wait_event(copied)
                for tensor in batch.tensors():
                    tensor.record_stream(compute)
            yield batch
            ahead = self._next()

    def _next(self) -> tuple[DeviceBatch, torch.cuda.Event | None] | None:
        host = next(self._batches, None)
        while host is not None and not len(host.positions):  # the end of an evaluation, shared by many processes
            host = next(self._batches, None)
        if host is None:
            return None
        masks = torch.from_numpy(self._masks(host))
        first_odd = (int(host.positions[0]) + 1) % 2
        kept = self._kept(host)
        if self._stream is None:
            return DeviceBatch(host.step, host.epoch, first_odd, host.views, host.codes, masks, kept), None
        with torch.cuda.stream(self._stream):
            views, codes, masked = (
                tensor.to(self._device, non_blocking=True) for tensor in (host.views, host.codes, masks.pin_memory())
            )
            if kept is not None:
                kept = kept.pin_memory().to(self._device, non_blocking=True)
            batch = DeviceBatch(host.step, host.epoch, first_odd, views, codes, masked, kept)
            return batch, self._stream.record_event()

    def _masks(self, host: HostBatch) -> npt.NDArray[np.int64]:
        config = self._config
        if config.weight_patch == 0:
            return np.empty((0, 0), np.int64)
        hidden = n_masked_patches(config.mask_ratio, self._n_patches)
        return draw_masks(config.seed, host.step, host.positions.numpy(), n_patches=self._n_patches, n_masked=hidden)

    def _kept(self, host: HostBatch) -> Tensor | None:
        config = self._config
        if config.drop_path == 0:
            return None
        depth = student_size(config.student).depth
        positions = host.positions.numpy()
        return torch.from_numpy(draw_kept(config.seed, host.step, positions, drop_path=config.drop_path, depth=depth))


def cut(batch: DeviceBatch, n_parts: int) -> Iterator[DeviceBatch]:
    """Consecutive parts of a batch, as equal as can be; fewer when it has fewer views."""
    n_views = len(batch.views)
    borders = sorted({round(part * n_views / n_parts) for part in range(n_parts + 1)})
    masked = 0
    for begin, end in pairwise(borders):
        first_odd = (batch.first_odd + begin) % 2
        n_masked = len(range(first_odd, end - begin, 2)) if len(batch.masked_MK) else 0
        yield DeviceBatch(
            batch.step,
            batch.epoch,
            first_odd,
            batch.views[begin:end],
            batch.codes[begin:end],
            batch.masked_MK[masked : masked + n_masked],
            None if batch.kept is None else batch.kept[begin:end],
        )
        masked += n_masked


class DeviceClock:
    """How long the device computed, asked for without stopping it.

    On a GPU each interval is between two events on the compute stream; on a CPU it is plain time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._busy_s = 0.0
        self._began = 0.0
        self._open: torch.cuda.Event | None = None

    def begin(self) -> None:
        """A step's work starts to be queued."""
        if self._device.type == "cuda":
            self._open = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # untyped in torch
            self._open.record(torch.cuda.current_stream(self._device))
        else:
            self._began = time.perf_counter()

    def end(self) -> None:
        """A step's work is queued (on a CPU: done)."""
        if self._open is not None:
            done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # likewise
            done.record(torch.cuda.current_stream(self._device))
            self._events.append((self._open, done))
        else:
            self._busy_s += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since the last call; on a GPU only after the last step's results were fetched."""
        busy_s: float = self._busy_s + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._events.clear()
        self._busy_s = 0.0
        return busy_s
