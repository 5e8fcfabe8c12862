from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.drop_path import draw_kept
from proteus_cache.train.feed import DeviceBatch, DeviceClock, DeviceFeed, cut
from proteus_cache.train.masking import draw_masks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class _HostBatch:
    step: int
    epoch: int
    positions: Tensor
    views: Tensor
    codes: Tensor


def _config(**settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": "vit_s14",
        "data": "pack",
        "out": "run",
        "seed": 3,
        "batch_size": 8,
    }
    return config_from_mapping(values | settings)


def _host_batch(step: int, begin: int, end: int) -> _HostBatch:
    positions = torch.arange(begin, end)
    return _HostBatch(step, 0, positions, positions.reshape(-1, 1, 1, 1).repeat(1, 2, 2, 3), positions.reshape(-1, 1))


def _feed(config: TrainConfig, batches: list[_HostBatch]) -> list[DeviceBatch]:
    return list(DeviceFeed(iter(batches), config, 16, CPU))


def test_batches_come_in_order_with_the_masks_of_their_odd_positions() -> None:
    first, second = _feed(_config(), [_host_batch(4, 0, 3), _host_batch(5, 3, 8)])

    assert (first.step, first.first_odd) == (4, 1)
    assert (second.step, second.first_odd) == (5, 0)
    for batch, begin, end in ((first, 0, 3), (second, 3, 8)):
        expected = draw_masks(3, batch.step, np.arange(begin, end), n_patches=16, n_masked=8)
        assert batch.masked_MK.tolist() == expected.tolist()
        assert all(position % 2 for position in batch.codes[batch.first_odd :: 2, 0].tolist())


def test_nothing_is_masked_without_a_patch_loss() -> None:
    (batch,) = _feed(_config(weight_patch=0.0), [_host_batch(0, 0, 4)])

    assert batch.masked_MK.shape == (0, 0)


def test_branches_are_left_out_by_seed_step_and_position_alone() -> None:
    first, second = _feed(_config(drop_path=0.5, student="vit_ti14"), [_host_batch(4, 0, 3), _host_batch(4, 3, 8)])

    assert first.kept is not None
    assert second.kept is not None
    expected = draw_kept(3, 4, np.arange(8), drop_path=0.5, depth=12)
    assert torch.equal(torch.cat((first.kept, second.kept)), torch.from_numpy(expected))


def test_nothing_is_drawn_without_drop_path() -> None:
    (batch,) = _feed(_config(), [_host_batch(0, 0, 4)])

    assert batch.kept is None


@given(
    begin=st.integers(0, 5), size=st.integers(1, 9), n_parts=st.integers(1, 12), drop_path=st.sampled_from([0.0, 0.5])
)
def test_parts_put_together_are_the_batch(begin: int, size: int, n_parts: int, drop_path: float) -> None:
    (batch,) = _feed(_config(drop_path=drop_path), [_host_batch(0, begin, begin + size)])

    parts = list(cut(batch, n_parts))

    assert len(parts) == min(n_parts, size)
    assert torch.equal(torch.cat([part.codes for part in parts]), batch.codes)
    assert torch.equal(torch.cat([part.masked_MK for part in parts]), batch.masked_MK)
    kept = [part.kept for part in parts if part.kept is not None]
    if drop_path > 0:
        assert batch.kept is not None
        assert torch.equal(torch.cat(kept), batch.kept)
    else:
        assert not kept
    for part in parts:
        odd = part.codes[part.first_odd :: 2, 0].tolist()
        assert len(odd) == len(part.masked_MK)
        assert all(position % 2 for position in odd)


def test_the_clock_adds_up_what_the_device_did() -> None:
    clock, began = DeviceClock(CPU), time.perf_counter()

    for _ in range(3):
        clock.begin()
        torch.randn(100, 100).sum()
        clock.end()

    assert 0 < clock.take() <= time.perf_counter() - began
    assert clock.take() == 0
