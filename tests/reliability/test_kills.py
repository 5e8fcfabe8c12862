"""R3: the real `extract`, teacher and all, is killed with SIGKILL at random moments, in one process and in two.

The moments are uniform over the time that an undisturbed run takes. After each kill what was committed is whole and
still there; after a few, one more start finishes, and the cache has the keys and views of an undisturbed one.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import open_cache
from proteus_cache.extract import planning
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.processes import Worker
from proteus_cache.teachers import registry
from tests.makers import identity, make_config, run_extract
from tests.reliability import invariants

N_KILLS = {"one process": 150, "two processes": 44, "two renderers": 6}
"""200 together."""
N_KILLS_NIGHTLY = 25 * 200
KILLS_PER_CACHE = 6
SEED = 6

_SHAPES = {"one process": (1, 0), "two processes": (2, 0), "two renderers": (1, 2)}
"""Processes that extract, and those that render for each of them."""


@dataclass(frozen=True, slots=True)
class _Case:
    config: ExtractConfig
    n_processes: int
    context: BaseContext
    undisturbed: dict[str, list[object]]
    seconds: float
    """Of an undisturbed run."""


def _extract_in_child(config: ExtractConfig, worker: Worker, started: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    started.send(None)
    run_extract(config, worker)


def _run(context: Any, config: ExtractConfig, n_processes: int, kill_after_s: list[float]) -> int:  # any start method
    """One start, each process of which is killed after its number of seconds; returns how many were in time."""
    running = []
    for index in range(n_processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_extract_in_child, args=(config, Worker(index, n_processes), theirs))
        process.start()
        running.append((process, ours))
    for _, connection in running:
        connection.recv()
    started = time.monotonic()
    for (process, _), seconds in sorted(zip(running, kill_after_s, strict=False), key=lambda pair: pair[1]):
        process.join(max(0.0, started + seconds - time.monotonic()))
        process.kill()
    for process, connection in running:
        process.join()
        connection.close()
        assert process.exitcode is not None
        assert invariants.wrong_exit(process.exitcode, killed=True) == []
    return sum(process.exitcode == -signal.SIGKILL for process, _ in running)


def _case(folder: Path, n_processes: int, workers: int) -> _Case:
    config = make_config(folder, n_images=6, views=2, shard_size=2, batch_size=2, workers=workers)
    run_extract(replace(config, workers=0))
    if workers:  # whose own fork server must not be that of this process
        context: BaseContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.makers"])
        _run(context, replace(config, out=folder / "first"), n_processes, [])  # which starts the fork server
    else:
        context = multiprocessing.get_context("fork")  # all that is warm here is warm there
    seconds = []
    for number in range(3):
        started = time.monotonic()
        _run(context, replace(config, out=folder / f"timed-{number}"), n_processes, [])
        seconds.append(time.monotonic() - started)
    return _Case(config, n_processes, context, identity(open_cache(config.out)), min(seconds))


def _kill_at_random(case: _Case, folder: Path, n_kills: int, seed: str) -> None:
    rng = random.Random(seed)
    kills = n_caches = 0
    told = f"seed {seed}"
    while kills < n_kills:
        n_caches += 1
        config = replace(case.config, out=folder / f"cache-{n_caches}")
        kills_here = 0
        committed: dict[str, str] = {}
        while kills_here < KILLS_PER_CACHE:
            at = [rng.uniform(0, case.seconds) for _ in range(case.n_processes)]
            in_time = _run(case.context, config, case.n_processes, at)
            kills_here += in_time
            told = f"seed {seed}, cache {n_caches}, kill {kills + kills_here} at {at}"
            assert invariants.damage_of_cache(config.out, most_unfinished=kills_here) == [], told
            now = invariants.committed(config.out)
            assert invariants.lost(committed, now) == [], told
            committed = now
            if in_time == 0:
                break
        kills += kills_here
        result = run_extract(replace(config, workers=0))
        assert result.units_left == 0, told
        assert result.units_committed == len(case.undisturbed) - len(committed), told
        assert invariants.differences_of_cache(config.out, case.undisturbed) == [], told


@pytest.fixture(autouse=True)
def _quick_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes that are forked from this one find the teacher loaded and copy no memory to count references."""
    monkeypatch.setattr(planning, "load_teacher", cache(registry.load_teacher))
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", list(N_KILLS))
def test_killed_at_random_moments_one_more_start_finishes(name: str, tmp_path: Path, fast_folder: Path) -> None:
    case = _case(tmp_path, *_SHAPES[name])

    _kill_at_random(case, fast_folder, N_KILLS[name], f"{SEED} {name}")


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", list(N_KILLS))
def test_killed_at_thousands_of_random_moments(name: str, tmp_path: Path, fast_folder: Path) -> None:
    case = _case(tmp_path, *_SHAPES[name])

    _kill_at_random(case, fast_folder, N_KILLS[name] * N_KILLS_NIGHTLY // 200, f"{SEED} {name} nightly")
