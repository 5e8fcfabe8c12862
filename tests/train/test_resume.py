"""Killed after any step, at any operation of a save, or at any moment: the resumed run ends with the same bytes."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_cache.errors import UsageError
from proteus_cache.pack.reader import open_pack
from proteus_cache.train.checkpoint import checkpoint_steps
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train
from proteus_cache.train.progress import Progress
from tests.pack.synthetic import write_pack
from tests.reliability.disks import Killing
from tests.train.operations import watched
from tests.train.runs import finished, forked, killed, ready_processes, results, run_config, tiny_student

N_STEPS = 40
SAVE_POINTS = (
    ("make folder tmp-step-N", 3),
    ("write unfinished tensors", 560),
    ("sync unfinished tensors", 8),
    ("rename tensors", 9),
    ("rename state.json", 3),
    ("sync folder tmp-step-N", 15),
    ("rename step-N", 3),
    ("rename unfinished tmp-step-N", 1),
)
"""Operations of the third save (of step 21), at which a run is killed: label, and which of this label in the run."""
DEFAULTS: dict[str, object] = {
    "repeats": 2,
    "drop_path": 0.2,
    "max_steps": N_STEPS,
    "checkpoint_every": 7,
    "ema_decay": 0.9,
    "evaluate_every": 5,
}


@pytest.fixture(scope="module", autouse=True)
def _small_student() -> Iterator[None]:
    with tiny_student(), ready_processes():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """The end of a process, unlike that of a machine, loses nothing that was not synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three view indices, a probe, a held-out tar, an image without a view, one that lacks a view index."""
    return write_pack(
        tmp_path_factory.mktemp("packs") / "pack",
        n_images=24,
        shard_size=3,
        views=("v000", "v001", "v002", "probe"),
        held_out=(2,),
        quarantined=(4,),
        missing={"v001": (13,)},
    )


def _config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    return run_config(pack, out, **(DEFAULTS | settings))


@pytest.fixture(scope="module")
def undisturbed(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Results of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(_config(pack, out))
    return results(out)


def _kill_everywhere(pack: str, folder: str) -> None:
    """A run for every step but the last and one for every point of a save, in a process that has all imports behind it.

    Each is killed, and then resumed until it is finished.
    """
    torch.set_num_threads(1)

    def run(name: str, killed_after: int | None = None) -> None:
        def die(progress: Progress) -> None:
            if progress.step == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)

        train(_config(Path(pack), Path(folder, name)), resume=True, progress=die)

    for step in range(1, N_STEPS):
        killed(partial(run, f"after-{step}", step))
        finished(partial(run, f"after-{step}"))
    for number, (label, nth) in enumerate(SAVE_POINTS):
        killed(partial(run, f"save-{number}"), Killing(label, nth, halfway=label.startswith("write")))
        finished(partial(run, f"save-{number}"))


@pytest.mark.slow
def test_a_run_killed_after_any_step_and_in_a_save_ends_with_the_same_bytes(
    pack: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    process = forked(_kill_everywhere, str(pack), str(tmp_path))
    process.join()

    assert process.exitcode == 0
    found = {out.name: results(out) for out in tmp_path.iterdir()}
    assert len(found) == N_STEPS - 1 + len(SAVE_POINTS)
    assert [name for name, result in found.items() if result != undisturbed] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "end", "checkpoint_every"),
    [
        pytest.param(0, 2, 1, id="the first saves"),
        pytest.param(27, 29, 4, id="a save at the end of an epoch, and the last"),
    ],
)
def test_a_run_killed_at_any_operation_ends_with_the_same_bytes(
    pack: Path, tmp_path: Path, begin: int, end: int, checkpoint_every: int
) -> None:
    copies = list[Path]()

    def keep_a_copy() -> None:
        copies.append(tmp_path / str(len(copies)))
        if (tmp_path / "run").exists():
            shutil.copytree(tmp_path / "run", copies[-1], ignore=shutil.ignore_patterns("tensorboard"))

    if begin:
        train(_config(pack, tmp_path / "run", max_steps=begin, evaluate_every=1))
    config = _config(pack, tmp_path / "run", max_steps=end, checkpoint_every=checkpoint_every, evaluate_every=1)
    with watched(keep_a_copy, every_write=40):
        train(config, resume=begin > 0)

    assert open_pack(pack).training_order(seed=0, batch_size=4, repeats=2).steps_per_epoch == 4
    expected, first_steps = results(tmp_path / "run"), []
    for out in copies:
        first_steps.append(train(dataclasses.replace(config, out=out), resume=True).first_step)
        assert results(out) == expected, f"killed at operation {out.name}"
        assert all(path.name.startswith("step-") for path in (out / "checkpoints").iterdir())
        shutil.rmtree(out)
    assert first_steps == sorted(first_steps)
    assert {begin, end} <= set(first_steps)


def _go_on(pack: str, out: str) -> None:
    torch.set_num_threads(1)
    with tiny_student():
        train(_config(Path(pack), Path(out), checkpoint_every=1), resume=True)


@pytest.mark.slow
def test_a_process_killed_at_any_moment_ends_with_the_same_bytes(
    pack: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    checkpoints, rng, n_killed = tmp_path / "run" / "checkpoints", random.Random(0), 0

    for _ in range(6):
        done = max(checkpoint_steps(checkpoints), default=0)
        process = forked(_go_on, str(pack), str(tmp_path / "run"))
        while process.is_alive() and max(checkpoint_steps(checkpoints), default=0) <= done:
            process.join(0.002)
        process.join(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        n_killed += process.exitcode != 0

    assert n_killed > 0
    train(_config(pack, tmp_path / "run"), resume=True)
    assert results(tmp_path / "run") == undisturbed


def test_random_state_of_the_process_changes_nothing(pack: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    def seed_everything(seed: int) -> None:
        random.seed(seed)
        np.random.seed(1000 - seed)  # the state that others may draw from
        torch.manual_seed(seed + 7)

    seed_everything(99)
    train(_config(pack, tmp_path / "run"), progress=lambda progress: seed_everything(progress.step))

    assert results(tmp_path / "run") == undisturbed


def test_other_repeats_are_another_run(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path / "run", max_steps=1))

    with pytest.raises(UsageError, match="made with repeats 2, and now it is 3; resume with the same settings"):
        train(_config(pack, tmp_path / "run", repeats=3), resume=True)
