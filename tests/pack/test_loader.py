"""The loader: the same batches from processes, threads and the caller itself, and what happens when things
end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_cache.errors import ChecksumError, ProteusCacheError, UsageError
from proteus_cache.pack import loader, worker
from proteus_cache.pack.loader import Batch, Loader, _Processes, open_loader
from proteus_cache.pack.reader import Pack
from proteus_cache.pack.slots import shared_file
from tests.pack.synthetic import expected_codes, expected_view

N_STEPS = 10
FIELDS = ("view_indices", "positions", "views", "codes")


def load(
    pack: Pack,
    *,
    first: int = 0,
    last: int = N_STEPS,
    repeats: int = 1,
    **how: Any,  # options of open_loader
) -> list[Batch]:
    order = pack.training_order(seed=5, batch_size=4, repeats=repeats)
    with open_loader(pack, order, first_step=first, last_step=last, **how) as opened:
        return list(opened)


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert (batch.step, batch.epoch) == (other.step, other.epoch)
        for field in FIELDS:
            assert torch.equal(getattr(batch, field), getattr(other, field))


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_hold_what_the_order_says(whole_pack: Pack, repeats: int) -> None:
    rows = [row for row in range(12) if row != 4]
    order = whole_pack.training_order(seed=5, batch_size=4, repeats=repeats)

    for batch in load(whole_pack, repeats=repeats):
        plan = order.batch(batch.step)
        assert plan.view_indices is not None
        assert batch.view_indices is not None
        assert batch.epoch == plan.epoch
        assert batch.view_indices.tolist() == plan.view_indices.tolist()
        assert batch.positions.tolist() == [0, 1, 2, 3]
        assert (batch.views.dtype, batch.codes.dtype, batch.positions.dtype) == (torch.uint8, torch.uint8, torch.int64)
        for place, (number, record) in enumerate(zip(batch.view_indices.tolist(), plan.records, strict=True)):
            view, row = f"v{number:03d}", rows[record]
            assert np.array_equal(batch.views[place], expected_view(view, row, 8))
            assert np.array_equal(batch.codes[place], np.concatenate(expected_codes(view, row, whole_pack.targets)))


@pytest.mark.parametrize("repeats", [1, 2])
def test_readers_do_not_change_batches(
    whole_pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture, repeats: int
) -> None:
    alone = load(whole_pack, repeats=repeats)

    assert_equal(load(whole_pack, repeats=repeats, n_workers=1), alone)
    assert_equal(load(whole_pack, repeats=repeats, n_workers=3), alone)
    assert not caplog.records
    assert_equal(load(whole_pack, repeats=repeats, n_workers=2, shared_folder=tmp_path / "missing"), alone)
    assert "reading with threads instead of processes" in caplog.text


def test_little_shared_memory_means_less_read_ahead(whole_pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def only_the_second(size: int, folder: Path) -> int | None:
        sizes.append(size)
        return shared_file(size, folder) if len(sizes) == 2 else None

    monkeypatch.setattr(loader, "shared_file", only_the_second)

    batches = load(whole_pack, n_workers=2)

    assert sizes[1] < sizes[0]
    assert_equal(batches, load(whole_pack))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_resuming_needs_no_replay(whole_pack: Pack, n_workers: int) -> None:
    assert_equal(load(whole_pack, first=7, n_workers=n_workers), load(whole_pack)[7:])


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_every_batch(whole_pack: Pack, world_size: int, repeats: int) -> None:
    whole = load(whole_pack, repeats=repeats)

    parts = [load(whole_pack, repeats=repeats, rank=rank, world_size=world_size) for rank in range(world_size)]

    for step, batch in enumerate(whole):
        for field in FIELDS:
            joined = torch.cat([getattr(part[step], field) for part in parts])
            assert torch.equal(joined, getattr(batch, field))


def test_held_out_and_probe_are_read_once(whole_pack: Pack) -> None:
    held_out, probe = whole_pack.held_out_order(batch_size=2), whole_pack.probe_order(batch_size=4)
    assert held_out is not None
    assert probe is not None

    for order, sizes, view_index in ((held_out, [2, 1], 0), (probe, [4, 1], None)):
        batches = list(open_loader(whole_pack, order, first_step=0, last_step=order.n_steps, n_workers=1))
        assert [len(batch.views) for batch in batches] == sizes
        for batch in batches:
            found = None if batch.view_indices is None else set(batch.view_indices.tolist())
            assert found == (None if view_index is None else {view_index})


def test_a_consumer_that_keeps_batches_keeps_them_unharmed(whole_pack: Pack) -> None:
    order = whole_pack.training_order(seed=5, batch_size=4)
    kept, copies = [], []
    for batch in open_loader(whole_pack, order, first_step=0, last_step=N_STEPS, n_workers=1):
        kept.append(batch)
        copies.append(batch.codes.clone())

    assert all(torch.equal(batch.codes, copy) for batch, copy in zip(kept, copies, strict=True))


def test_batches_are_handed_out_without_a_copy(whole_pack: Pack) -> None:
    order = whole_pack.training_order(seed=5, batch_size=4)
    addresses = set()
    for batch in open_loader(whole_pack, order, first_step=0, last_step=40, n_workers=1):
        addresses.add(batch.codes.data_ptr())

    assert len(addresses) <= 4


def test_it_counts_what_it_reads(whole_pack: Pack) -> None:
    order = whole_pack.training_order(seed=5, batch_size=4)

    counts = []
    for n_workers in (0, 1):
        opened = open_loader(whole_pack, order, first_step=0, last_step=3, n_workers=n_workers)
        assert len(list(opened)) == 3
        counts.append(opened.bytes_read)

    assert counts[0] == counts[1] > 12 * whole_pack.code_bytes
    assert opened.waited_s > 0


@pytest.mark.parametrize("how", [{}, {"n_workers": 2}, {"n_workers": 2, "shared_folder": Path("/missing")}])
def test_damage_keeps_type_and_message(pack_copy: Pack, how: dict[str, Any]) -> None:
    path = pack_copy.path / "v001" / "s00003.tar"
    data = bytearray(path.read_bytes())
    data[512] ^= 1
    path.write_bytes(data)

    with pytest.raises(ChecksumError, match=r"v001/s00003\.tar: image row 9, byte 512"):
        load(pack_copy, **how)


def test_a_wrong_index_is_refused_before_reading(pack_copy: Pack) -> None:
    (pack_copy.path / "v001.idx").write_bytes((pack_copy.path / "probe.idx").read_bytes())

    with pytest.raises(ChecksumError, match=r"v001\.idx: is not the index that pack\.json names"):
        load(pack_copy)


def test_a_killed_reader_is_reported(whole_pack: Pack) -> None:
    order = whole_pack.training_order(seed=5, batch_size=4)
    with open_loader(whole_pack, order, first_step=0, last_step=1000, n_workers=1) as opened:
        next(opened)
        os.kill(reader_pids(opened)[0], signal.SIGKILL)

        with pytest.raises(ProteusCacheError, match=r"was killed by signal 9; the machine may be out of memory"):
            list(opened)


def test_closing_ends_the_readers(whole_pack: Pack) -> None:
    order = whole_pack.training_order(seed=5, batch_size=4)
    opened = open_loader(whole_pack, order, first_step=0, last_step=1000, n_workers=2)
    ends = [os.pidfd_open(pid) for pid in reader_pids(opened)]

    opened.close()

    assert len(select.select(ends, [], [], 30)[0]) == 2
    assert list(opened) == []
    for end in ends:
        os.close(end)


def test_readers_end_when_their_parent_is_killed(whole_pack: Pack) -> None:
    script = (
        "import sys; from proteus_cache.pack.reader import open_pack\n"
        "from proteus_cache.pack.loader import open_loader\n"
        "pack = open_pack(sys.argv[1]); order = pack.training_order(seed=0, batch_size=4)\n"
        "loader = open_loader(pack, order, first_step=0, last_step=10**6, n_workers=2); next(loader)\n"
        "print(*[reader.pid for reader in loader._readers._readers], flush=True); sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(whole_pack.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(worker.__file__).parents[2],
        text=True,
    )
    assert parent.stdout is not None
    ends = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]

    parent.kill()
    parent.communicate()

    assert len(ends) == 2
    for end in ends:
        assert select.select([end], [], [], 30)[0]
        os.close(end)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of 2 ranks does not exist"),
        ({"rank": 0, "world_size": 5}, "batch of 4 cannot be shared by 5 ranks"),
    ],
)
def test_impossible_ranks_are_refused(whole_pack: Pack, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(whole_pack, **how)


@pytest.mark.gpu
def test_pinned_batches_are_equal(whole_pack: Pack) -> None:
    pinned = load(whole_pack, n_workers=2, pin=True)

    assert all(batch.views.is_pinned() and batch.codes.is_pinned() for batch in pinned)
    assert_equal(pinned, load(whole_pack))


def test_unknown_errors_of_a_reader_keep_their_name() -> None:
    rebuilt = worker._rebuilt({"error": "SomeOtherError", "message": "what", "notes": ["where"]})

    assert isinstance(rebuilt, RuntimeError)
    assert str(rebuilt) == "SomeOtherError: what"
    assert rebuilt.__notes__ == ["where"]


def reader_pids(opened: Loader) -> list[int]:
    readers = opened._readers
    assert isinstance(readers, _Processes)
    return [reader.pid for reader in readers._readers]
