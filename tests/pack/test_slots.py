"""Slots: lent without a copy, back when nobody looks any more."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_cache.memory import available_memory
from proteus_cache.pack.slots import SlotPool, SlotShape, shared_file

SHAPE = SlotShape(n=3, code_bytes=5, side_px=2)


def test_fields_do_not_overlap() -> None:
    pool = SlotPool(SHAPE.slot_bytes, 1)
    slot = pool.array(0)

    SHAPE.views(slot, 3)[...] = 1
    SHAPE.codes(slot, 3)[...] = 2

    assert (SHAPE.views(slot, 3) == 1).all()
    assert SHAPE.views(slot, 2).shape == (2, 2, 2, 3)
    assert SHAPE.codes(slot, 2).shape == (2, 5)


def test_a_lent_slot_comes_back_when_its_last_tensor_is_gone() -> None:
    pool = SlotPool(SHAPE.slot_bytes, 1)
    slot = pool.take()
    assert slot is not None
    tensor = torch.from_numpy(SHAPE.views(pool.lend(slot), 3))
    part = tensor[1:].reshape(-1)[:4]

    del tensor
    assert (pool.take(), pool.n_lent) == (None, 1)
    del part

    assert (pool.n_lent, pool.take()) == (0, 0)


def test_memory_outlives_its_pool() -> None:
    pool = SlotPool(SHAPE.slot_bytes, 1)
    array = pool.lend(0)
    array[:] = 7

    del pool

    assert (array == 7).all()


def test_two_maps_of_one_file_are_one_memory(tmp_path: Path) -> None:
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    descriptor = shared_file(SHAPE.slot_bytes, folder)
    assert descriptor is not None
    ours, theirs = SlotPool(SHAPE.slot_bytes, 1, descriptor), SlotPool(SHAPE.slot_bytes, 1, descriptor)
    os.close(descriptor)

    theirs.array(0)[:4] = np.arange(4)

    assert ours.array(0)[:4].tolist() == [0, 1, 2, 3]
    assert not any(name.startswith("slots") for name in os.listdir(folder))


def test_a_folder_without_room_gives_no_file(tmp_path: Path) -> None:
    assert shared_file(4096, tmp_path / "missing") is None
    assert shared_file(1 << 60, tmp_path) is None


def test_a_full_file_system_gives_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    assert shared_file(4096, tmp_path) is None


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8000 * 1024),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "active_file 0\ninactive_file 0"}, 8000 * 1024),
        (
            {"memory.max": "900", "memory.current": "700", "memory.stat": "anon 9\nactive_file 40\ninactive_file 60"},
            300,
        ),
        ({"memory.max": "900", "memory.current": "950", "memory.stat": "active_file 1\ninactive_file 2"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "900",
                "memory/memory.usage_in_bytes": "700",
                "memory/memory.stat": "active_file 1\ninactive_file 1\ntotal_active_file 4\ntotal_inactive_file 6",
            },
            210,
        ),
    ],
)
def test_memory_is_what_machine_and_container_leave(tmp_path: Path, files: dict[str, str], available: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")

    assert available_memory(meminfo, tmp_path) == available
    assert available_memory(tmp_path / "missing", tmp_path / "missing") == 1 << 50
