"""Three kills in one epoch, whoever reads and however far ahead, whole epochs and cut ones: the bytes are the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from proteus_cache.pack import loader
from proteus_cache.pack.reader import open_pack
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train
from proteus_cache.train.progress import Progress
from tests.pack.synthetic import write_pack
from tests.train.runs import finished, forked, killed, ready_processes, results, run_config, tiny_student

pytestmark = pytest.mark.slow

READERS = (0, 1, 2)
PREFETCHED = (1, 4)
"""Batches on their way per reader."""
KILLS = {4: (6, 8, 10), 3: (8, 10, 12)}
"""Batch size to the steps of the second epoch after which a run is killed; the last one ends that epoch.

Of 20 trained images a batch of 4 leaves none over, a batch of 3 two.
"""
N_STEPS = {4: 15, 3: 18}
CASES = tuple(product(KILLS, READERS, PREFETCHED))


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    with tiny_student(), ready_processes():
        yield


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two view indices, of which every epoch takes one."""
    return write_pack(tmp_path_factory.mktemp("packs") / "pack", n_images=20, shard_size=6)


def _config(pack: Path, out: Path, batch_size: int, readers: int = 0) -> TrainConfig:
    return run_config(
        pack,
        out,
        batch_size=batch_size,
        workers=readers,
        max_steps=N_STEPS[batch_size],
        checkpoint_every=1,
        drop_path=0.1,
        ema_decay=0.9,
        evaluate_every=None,
    )


def _name(batch_size: int, readers: int, prefetched: int) -> str:
    return f"batch-{batch_size}-readers-{readers}-prefetched-{prefetched}"


def _kill_three_times(pack: str, folder: str) -> None:
    """All cases, in a process that has all imports behind it."""
    torch.set_num_threads(1)

    def run(batch_size: int, readers: int, prefetched: int, killed_after: int | None = None) -> None:
        def die(progress: Progress) -> None:
            if progress.step == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)

        loader.PREFETCH = prefetched
        out = Path(folder, _name(batch_size, readers, prefetched))
        done = train(_config(Path(pack), out, batch_size, readers), resume=True, progress=die)
        assert done.first_step == KILLS[batch_size][-1] - 1  # it was killed ahead of the save

    for case in CASES:
        for step in KILLS[case[0]]:
            killed(partial(run, *case, step))
        finished(partial(run, *case))


def test_three_kills_in_one_epoch_change_nothing(pack: Path, tmp_path: Path) -> None:
    orders = {batch: open_pack(pack).training_order(seed=0, batch_size=batch) for batch in KILLS}
    assert {batch: order.n_samples % batch for batch, order in orders.items()} == {4: 0, 3: 2}
    assert all(KILLS[batch][-1] == 2 * order.steps_per_epoch for batch, order in orders.items())
    undisturbed = {}
    for batch_size in KILLS:
        out = tmp_path / "undisturbed" / str(batch_size)
        train(_config(pack, out, batch_size))
        undisturbed[batch_size] = results(out)

    process = forked(_kill_three_times, str(pack), str(tmp_path))
    process.join()

    assert process.exitcode == 0
    assert len(CASES) == 12
    for batch_size, readers, prefetched in CASES:
        name = _name(batch_size, readers, prefetched)
        assert results(tmp_path / name) == undisturbed[batch_size], name
