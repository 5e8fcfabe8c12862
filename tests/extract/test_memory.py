"""Too little memory: of the GPU, whose errors are injected here, and of /dev/shm, really small where that can be."""

import logging
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from proteus_cache import workers
from proteus_cache.cache.verify import verify_cache
from proteus_cache.errors import ProteusCacheError, SpaceError
from proteus_cache.extract import rendering
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.processes import Worker
from proteus_cache.teachers.teacher import Teacher
from tests.makers import identity, make_cache, make_config, run_extract, shows_canaries


def give_memory_for(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which `n` views fit."""
    targets = Teacher.targets

    def limited(self: Teacher, views: Tensor, *others: Any) -> dict[str, Tensor]:
        if len(views) > n:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return targets(self, views, *others)

    monkeypatch.setattr(Teacher, "targets", limited)


def test_the_batch_that_fits_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_memory_for(3, monkeypatch)
    config = make_config(tmp_path, batch_size=8)

    with pytest.raises(ProteusCacheError, match=r"too little memory for 8 views at once .*; --batch-size 2 fits: run"):
        run_extract(config)

    assert not (config.out / "manifest.json").exists()
    assert run_extract(make_config(tmp_path, batch_size=2)).units_left == 0


def test_the_batch_that_fits_is_named_in_the_middle_and_what_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, n_images=10, batch_size=4)
    planned = plan_cache(config)
    done: list[int] = []

    def shrink(at: Any) -> None:
        done.append(at.units_committed)
        if len(done) == 2:
            give_memory_for(2, monkeypatch)

    with pytest.raises(ProteusCacheError, match=r"4 views at once .*--batch-size 2 fits.*finished units are kept"):
        extract(config, planned, Worker(0, 1), shrink)
    kept = len(planned.cache.units("v000"))
    result = run_extract(make_config(tmp_path, batch_size=2))

    assert kept >= 1
    assert result.units_committed == 6 - kept
    assert verify_cache(config.out, read_data=True) == []


def test_a_unit_that_is_redone_keeps_to_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    targets = Teacher.targets

    def infinite_at_first(self: Teacher, views: Tensor, *others: Any) -> dict[str, Tensor]:
        found = targets(self, views, *others)
        sizes.append(len(views))
        is_infinite = self.precision == "bf16" and not shows_canaries(views)
        return {name: value * torch.inf if is_infinite else value for name, value in found.items()}

    config = make_config(tmp_path, batch_size=2, precision="bf16")
    planned = plan_cache(config)
    monkeypatch.setattr(Teacher, "targets", infinite_at_first)
    extract(config, planned, Worker(0, 1), lambda _: None)

    assert max(sizes) == 2


def test_a_teacher_that_does_not_fit_at_all_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_memory_for(0, monkeypatch)

    with pytest.raises(ProteusCacheError, match=r"too little memory for a single view .* smaller teacher"):
        run_extract(make_config(tmp_path))


def test_views_travel_by_pipe_where_shared_memory_gives_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    pixels = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    assert isinstance(workers.shared(pixels), Tensor)
    monkeypatch.setattr(Tensor, "share_memory_", full)

    assert workers.shared(pixels) is pixels


def test_views_by_pipe_are_the_same_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_cache(tmp_path / "plain")
    monkeypatch.setattr(rendering, "shared_memory_suffices", lambda _: False)

    with caplog.at_level(logging.WARNING):
        piped = make_cache(tmp_path / "piped", workers=2)

    assert list(identity(piped).values()) == list(identity(plain).values())
    assert caplog.text.count("views go through pipes, which is slower: /dev/shm has no room") == 1


def test_workers_that_cannot_get_a_queue_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ForkServerContext, "Lock", full)

    with pytest.raises(SpaceError, match=r"/dev/shm: rendering processes cannot be started: No space .* --workers 0"):
        run_extract(make_config(tmp_path, workers=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("filled", "status", "said"),
    [
        (True, 1, "/dev/shm: rendering processes cannot be started: No space left on device"),
        (False, 0, "views go through pipes, which is slower"),
    ],
)
def test_a_real_small_dev_shm_is_met_with_words(tmp_path: Path, filled: bool, status: int, said: str) -> None:
    config = make_config(tmp_path, n_images=12)
    arguments = [
        *("extract", "--teacher", "vit", "--weights", str(config.weights), "--images", str(config.images)),
        *("--out", str(config.out), "--device", "cpu", "--workers", "1", "--shard-size", "4", "--batch-size", "16"),
    ]
    fill = "head -c 96k /dev/zero > /dev/shm/full; " if filled else ""
    script = f'mount -t tmpfs -o size=96k tmpfs /dev/shm && {fill}exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a kernel that lets this user mount a tmpfs of its own")

    outcome = subprocess.run(
        [*inside, sys.executable, "-m", "proteus_cache", *arguments], capture_output=True, text=True, check=False
    )

    assert outcome.returncode == status, outcome.stderr
    assert said in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "Exception ignored" not in outcome.stderr
