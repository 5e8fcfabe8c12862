"""SIGKILL at random moments: what was committed stays, one more start finishes the same cache."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import closing, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import open_cache, workers
from proteus_cache.cache.verify import verify_cache
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.rendering import Job, render_jobs
from proteus_cache.views.spec import ViewSpec
from tests.makers import identity, make_config, make_images, run_extract


def _extract_in_child(config: ExtractConfig) -> None:
    import torch

    torch.set_num_threads(1)
    run_extract(config)


@pytest.mark.parametrize(("workers", "n_kills"), [(0, 12), (2, 8)])
def test_killed_at_random_moments_the_cache_is_finished_by_one_more_start(
    tmp_path: Path, workers: int, n_kills: int
) -> None:
    undisturbed = make_config(tmp_path, n_images=40, views=3, workers=workers)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.makers"])
    _run_for(context, undisturbed, None)  # starts the fork server, too
    seconds = _run_for(context, make_config(tmp_path, out=tmp_path / "timed", views=3, workers=workers), None)
    config = make_config(tmp_path, out=tmp_path / "killed", views=3, workers=workers)
    rng = random.Random(5)
    committed: list[set[str]] = []

    for _ in range(n_kills):
        _run_for(context, config, rng.uniform(0, seconds / 4))
        if (config.out / "manifest.json").exists():
            committed.append(set(identity(open_cache(config.out))))
    run_extract(config)

    cache = open_cache(config.out)
    assert all(earlier <= later for earlier, later in pairwise(committed))
    assert identity(cache) == identity(open_cache(undisturbed.out))
    assert verify_cache(cache.path, read_data=True) == []
    assert list((cache.path / "tmp").iterdir()) == []


def _run_for(context: multiprocessing.context.ForkServerContext, config: ExtractConfig, seconds: float | None) -> float:
    """Extract in a process of its own, killed after `seconds` unless it was faster; returns how long it ran."""
    process = context.Process(target=_extract_in_child, args=(config,))
    started = time.monotonic()
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return time.monotonic() - started


def _die_while_looking(event: Any) -> None:  # Any: an event of ours or of the library
    """What a worker does that is killed while it asks whether the loader has ended."""
    getattr(event, "_cond", nullcontext()).__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_worker_killed_while_it_looks_at_the_end_does_not_hold_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    make_event = workers._WorkerContext.Event

    def remember(context: Any) -> Any:
        events.append(make_event(context))
        return events[-1]

    monkeypatch.setattr(workers._WorkerContext, "Event", remember)
    folder = make_images(tmp_path / "images", 2)
    files = sorted(folder.rglob("*.JPEG"))
    spec = ViewSpec(augment="deit", size_px=16)
    jobs = [
        Job("v000", 0, [row], [f"image_{row}"], [str(file.resolve())], [None], is_last=False)
        for row, file in enumerate(files)
    ]

    with closing(render_jobs(jobs, Path("/"), spec, workers=1, batch_size=1, pin=False)) as batches:
        next(batches)
        worker = multiprocessing.get_context("forkserver").Process(target=_die_while_looking, args=(events[0],))
        worker.start()
        worker.join()

    assert worker.exitcode == -signal.SIGKILL
    assert events[0].is_set()
