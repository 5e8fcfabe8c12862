"""Damaged checkpoints, and a disk that is full: what a run does that is resumed, or that wants to save."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from torch import Tensor

from proteus_cache import storage
from proteus_cache.errors import DamageError, SpaceError, StorageError
from proteus_cache.train.board import Board
from proteus_cache.train.checkpoint import TENSOR_FILES, checkpoint_steps, verify_checkpoint, write_checkpoint
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train
from proteus_cache.train.steps import take_step
from proteus_cache.train.tensors import replace_tensors
from proteus_cache.train.verify import verify_run
from tests.cli.running import run as run_command
from tests.pack.synthetic import write_pack
from tests.reliability.disks import Failing, using
from tests.reliability.small_disk import fill, make_room, small_disk, why_no_small_disk
from tests.train.runs import results, run_config, tiny_student

N_STEPS = 24
SAVED = (7, 14, 21)


@pytest.fixture(scope="module", autouse=True)
def _small_student() -> Iterator[None]:
    with tiny_student():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("packs") / "pack", n_images=20, shard_size=6)


def _config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {"max_steps": N_STEPS, "checkpoint_every": 7, "keep_checkpoints": 3, "ema_decay": 0.9}
    return run_config(pack, out, **(values | {"evaluate_every": None} | settings))


@pytest.fixture(scope="module")
def undisturbed(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Results of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(_config(pack, out))
    return results(out)


@pytest.fixture(scope="module")
def stopped(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after step 21, with three checkpoints. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    train(_config(pack, out, max_steps=SAVED[-1]))
    assert checkpoint_steps(out / "checkpoints") == list(SAVED)
    return out


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _half_written(checkpoints: Path) -> None:
    for name in ("optimizer.safetensors", "state.json"):
        (checkpoints / _name(21) / name).unlink()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


Damage = Callable[[Path], object]


def _at(name: str, change: Damage) -> Damage:
    """Change one file of the newest checkpoint."""
    return lambda checkpoints: change(checkpoints / _name(21) / name)


DAMAGES: dict[str, tuple[Damage, int]] = {
    "newest half written": (_half_written, 14),
    **{f"newest flipped: {name}": (_at(name, _flip), 14) for name in TENSOR_FILES},
    **{f"newest cut: {name}": (_at(name, _cut), 14) for name in TENSOR_FILES},
    **{f"newest lacks {name}": (_at(name, Path.unlink), 14) for name in TENSOR_FILES},
    "state.json flipped": (_at("state.json", _flip), 14),
    "state.json half written": (_at("state.json", _cut), 14),
    "state.json empty": (_at("state.json", lambda path: path.write_bytes(b"")), 14),
    "the name is ahead of the state": (
        lambda checkpoints: (checkpoints / _name(21)).rename(checkpoints / _name(23)),
        14,
    ),
    "a name without anything": (lambda checkpoints: (checkpoints / _name(23)).mkdir(), 21),
    "a file under the name of a checkpoint": (lambda checkpoints: (checkpoints / _name(23)).write_bytes(b"mine"), 21),
    "two newest damaged": (lambda checkpoints: [*map(_flip, checkpoints.glob("step-000000[12]?/ema*"))], 7),
}
"""What is done to `checkpoints/`, and the step that the run goes on from."""


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_changes_nothing_and_is_said(
    stopped: Path,
    pack: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    damage, expected = DAMAGES[what]
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    damage(out / "checkpoints")
    named = [step for step in checkpoint_steps(out / "checkpoints") if step > expected]

    done = train(_config(pack, out), resume=True)

    warnings = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert done.first_step == expected
    assert len(warnings) == len(named) > 0
    for step in named:
        assert any(
            f"checkpoint step={step} is damaged and is skipped, step={expected} is used instead: {out}/checkpoints/"
            f"{_name(step)}" in warning
            for warning in warnings
        )
    assert results(out) == undisturbed


def test_foreign_files_and_leftovers_of_killed_writers_do_no_harm(
    stopped: Path, pack: Path, tmp_path: Path, undisturbed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    checkpoints = out / "checkpoints"
    (checkpoints / _name(21) / "notes.txt").write_text("mine")
    (checkpoints / "notes.txt").write_text("mine")
    shutil.copytree(checkpoints / _name(14), checkpoints / f"tmp-{_name(28)}.12.0123456789abcdef")

    done = train(_config(pack, out), resume=True)

    assert done.first_step == 21
    assert "skipped" not in caplog.text
    assert results(out) == undisturbed
    assert sorted(path.name for path in checkpoints.iterdir()) == ["notes.txt", *map(_name, (14, 21, 24))]


def test_damage_of_every_checkpoint_is_refused_and_nothing_is_changed(
    stopped: Path, pack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for step in SAVED:
        _flip(out / "checkpoints" / _name(step) / "ema.safetensors")
    before = _bytes_below(out)

    with pytest.raises(
        DamageError, match=r"checkpoints: none of the 3 checkpoints is whole; remove them .*\(.*step-00000021/ema"
    ):
        train(_config(pack, out), resume=True)
    outcome = run_command(*_command(pack, out), "--resume", code=1)

    assert "none of the 3 checkpoints is whole; remove them and start again without --resume" in outcome.stderr
    assert _bytes_below(out) == before


@pytest.mark.parametrize("name", [*TENSOR_FILES, "state.json"])
def test_a_disk_that_fails_is_not_taken_for_damage(stopped: Path, pack: Path, tmp_path: Path, name: str) -> None:
    class Unreadable(Failing):
        def open(self, path: Path) -> int:
            if path.name == name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().open(path)

    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    before = _bytes_below(out)

    with (
        using(Unreadable(0)),
        pytest.raises(StorageError, match=r"none of the 3 .* can be read, and nothing is changed: .*look at the disk"),
    ):
        train(_config(pack, out), resume=True)

    assert _bytes_below(out) == before
    assert train(_config(pack, out), resume=True).first_step == 21


def _bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _command(pack: Path, out: Path) -> list[object]:
    """The run of `_config` as a command."""
    config = out.parent / "train.yaml"
    config.write_text(
        "{lr: 1e-3, warmup_epochs: 1, checkpoint_every: 7, keep_checkpoints: 3, ema_decay: 0.9, evaluate_every: null}"
    )
    return [
        *("train", "--student", "vit_s14", "--data", pack, "--out", out, "--batch-size", 4, "--config", config),
        *("--max-steps", N_STEPS, "--workers", 0, "--device", "cpu"),
    ]


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_a_save_ends_the_run_and_keeps_the_checkpoints(
    pack: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int, sticky: bool
) -> None:
    out = tmp_path / "run"
    attempts: list[int] = []

    def fail_in_third(folder: Path, state: object, *args: object, **kwargs: object) -> Path:
        attempts.append(len(attempts))
        if len(attempts) < 3:
            return write_checkpoint(folder, state, *args, **kwargs)  # type: ignore[arg-type]  # as they came
        with using(Failing(100, number, only=frozenset({"write"}), sticky=sticky)):
            return write_checkpoint(folder, state, *args, **kwargs)  # type: ignore[arg-type]  # likewise

    def refuse(board: Board) -> None:
        raise SpaceError("the logs do not fit either, which is not what ended the run")

    monkeypatch.setattr("proteus_cache.train.steps.write_checkpoint", fail_in_third)
    monkeypatch.setattr(Board, "close", refuse)

    with pytest.raises(SpaceError, match=rf"{out}/checkpoints/tmp-step-00000021.*; free space") as caught:
        train(_config(pack, out))
    monkeypatch.undo()

    assert caught.value.__notes__ == ["the newest checkpoint is of step 14; go on with --resume"]
    assert len(attempts) == 3
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [_name(7), _name(14)]
    assert train(_config(pack, out), resume=True).first_step == 14
    assert results(out) == undisturbed


@pytest.mark.parametrize("when", ["before a save", "after a step"])
def test_a_disk_that_fills_up_ends_the_command_and_resume_goes_on_once_there_is_room(
    pack: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    if (why := why_no_small_disk(tmp_path)) is not None:
        pytest.skip(f"no small disk here ({why}); the same errors are injected above")
    taken: list[int] = []

    def save(folder: Path, state: object, *args: object, **kwargs: object) -> Path:
        if when == "before a save" and len(taken) == 14:
            fill(disk)
        return write_checkpoint(folder, state, *args, **kwargs)  # type: ignore[arg-type]  # as they came

    def step(*args: object, **kwargs: object) -> object:
        taken.append(len(taken))
        if when == "after a step" and len(taken) == 9:
            fill(disk)
        return take_step(*args, **kwargs)  # type: ignore[arg-type]  # likewise

    with small_disk(tmp_path / "disk", size_bytes=8 << 20) as disk:
        out = disk / "run"
        command = _command(pack, out)
        monkeypatch.setattr("proteus_cache.train.steps.write_checkpoint", save)
        monkeypatch.setattr("proteus_cache.train.steps.take_step", step)
        outcome = run_command(*command, code=1)
        monkeypatch.undo()
        message = outcome.stderr.splitlines()[-1]
        kept = sorted(path.name for path in (out / "checkpoints").iterdir())
        make_room(disk)
        run_command(*command, "--resume")
        found = results(out)

    assert f"{out}/" in message
    assert "No space left on device; free space or inodes there and run the same command again" in message
    assert "(the newest checkpoint is of step 7; go on with --resume)" in message
    assert kept == [_name(7)]
    assert found == undisturbed


def test_after_a_failed_sync_the_state_is_written_anew(
    pack: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class BadSync(Failing):
        def sync(self, descriptor: int) -> None:
            name = self.opened[descriptor][0].name
            if name.startswith(".state.json.") and not failed:
                failed.append(name)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            assert name not in failed  # what failed to sync once is never synced again
            super().sync(descriptor)

    failed: list[str] = []
    with using(BadSync(0)):
        train(_config(pack, tmp_path / "run"))

    assert len(failed) == 1
    assert results(tmp_path / "run") == undisturbed


def test_an_old_checkpoint_is_there_until_the_new_one_is_proven(
    pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 21 is damaged, and written anew: at every moment there is a checkpoint that verifies."""
    out, found = tmp_path / "run", []
    config = _config(pack, out, keep_checkpoints=1)
    train(_config(pack, out, max_steps=21))
    _flip(out / "checkpoints" / _name(21) / "model.safetensors")
    shutil.rmtree(out / "checkpoints" / _name(7))

    class Watching(Failing):
        def around(self, operation, call):  # type: ignore[no-untyped-def]  # as the toolbox has it
            if operation.name in ("rename", "unlink", "remove folder", "sync folder"):
                found.append(_whole(out / "checkpoints"))
            return call()

    with caplog.at_level(logging.CRITICAL), using(Watching(0)):
        train(config, resume=True)

    assert len(found) > 20
    assert all(found)
    assert found == sorted(found, key=lambda steps: steps[-1])
    assert _whole(out / "checkpoints") == [24]


def _whole(checkpoints: Path) -> list[int]:
    """Steps whose checkpoint verifies."""
    kept = []
    with using(Failing(0)):
        for step in checkpoint_steps(checkpoints):
            try:
                verify_checkpoint(checkpoints / _name(step))
            except (DamageError, StorageError):
                continue
            kept.append(step)
    return kept


def test_final_weights_that_were_cut_off_are_not_taken_for_a_finished_run(
    stopped: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    assert verify_run(out, True) == []

    def full(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> storage.Written:
        if path.name == "ema.safetensors":
            raise SpaceError(f"{path}: cannot write: No space left on device")
        return replace_tensors(path, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("proteus_cache.train.record.replace_tensors", full)
        with pytest.raises(SpaceError):
            train(_config(pack, out), resume=True)

    (finding,) = verify_run(out, True)
    assert finding.path == "finished.json"
    train(_config(pack, out), resume=True)
    assert verify_run(out, True) == []
