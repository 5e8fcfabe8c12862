"""A rendering process that is killed does not hold up the others; `tests/reliability` kills whole extractions."""

import multiprocessing
import os
import signal
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import workers
from proteus_cache.extract.rendering import Job, render_jobs
from proteus_cache.views.spec import ViewSpec
from tests.makers import make_images


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
