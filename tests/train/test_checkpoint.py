from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proteus_cache import storage
from proteus_cache.documents import canonical, parse_sealed, seal
from proteus_cache.errors import ChecksumError, DamageError, StorageError
from proteus_cache.train.checkpoint import (
    TENSOR_FILES,
    CheckpointState,
    checkpoint_steps,
    clear_unfinished,
    newest_checkpoint,
    write_checkpoint,
)
from tests.train.operations import killed_at


def _tensors(step: int) -> dict[str, dict[str, Tensor]]:
    return {name: {"weight": torch.full((5,), float(step))} for name in TENSOR_FILES}


def _write(folder: Path, step: int, *, keep: int = 2, after: int | None = None) -> Path:
    state = CheckpointState(
        step=step,
        config={"lr": 1e-3, "student": "vit_s14", "max": None},
        data={"pack digest": "p"},
        precision="fp32",
        world_size=1,
        scaler={"scale": 65536.0, "_growth_tracker": 3},
        files={},
    )
    return write_checkpoint(folder, state, _tensors(step), keep=keep, after=after)


def _step_found(folder: Path) -> int | None:
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return None
    for tensors in (checkpoint.model, checkpoint.ema, checkpoint.optimizer):
        assert tensors["weight"].tolist() == [float(checkpoint.state.step)] * 5
    return checkpoint.state.step


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = _write(tmp_path / "checkpoints", 4)

    checkpoint = newest_checkpoint(tmp_path / "checkpoints")

    assert checkpoint is not None
    assert checkpoint.path == path == tmp_path / "checkpoints" / "step-00000004"
    assert checkpoint.state.config == {"lr": 1e-3, "student": "vit_s14", "max": None}
    assert checkpoint.state.scaler == {"scale": 65536.0, "_growth_tracker": 3}
    assert _step_found(path.parent) == 4
    assert sorted(file.name for file in path.iterdir()) == sorted([*TENSOR_FILES, "state.json"])


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        _write(tmp_path, step)

    assert checkpoint_steps(tmp_path) == [6, 10]
    assert _step_found(tmp_path) == 10


def test_damaged_later_checkpoints_do_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (4, 20, 30):
        (_write(tmp_path, step, keep=3) / "ema.safetensors").write_bytes(b"damaged" if step > 4 else b"")
    _write(tmp_path, 4)

    _write(tmp_path, 10)

    assert checkpoint_steps(tmp_path) == [4, 10, 20, 30]
    assert _step_found(tmp_path) == 10


def test_damaged_checkpoints_that_the_run_has_passed_go_and_push_out_none(tmp_path: Path) -> None:
    for step in (4, 6, 8):
        _write(tmp_path, step, keep=3)
    for step in (6, 8):  # so the run goes on from 4
        (tmp_path / f"step-{step:08d}" / "ema.safetensors").write_bytes(b"damaged")

    _write(tmp_path, 7, after=4)

    assert checkpoint_steps(tmp_path) == [4, 7, 8]
    assert _step_found(tmp_path) == 7


def test_checkpoints_that_could_not_be_read_are_not_removed_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 6, 8):
        _write(tmp_path, step, keep=3)
    (tmp_path / "step-00000008" / "ema.safetensors").write_bytes(b"damaged")
    sha256_of = storage.sha256_of

    def stale(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
        if path.parent.name == "step-00000006":
            with storage.reported("read", path):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return sha256_of(path, from_disk=from_disk)

    monkeypatch.setattr(storage, "sha256_of", stale)
    assert _step_found(tmp_path) == 4

    _write(tmp_path, 10, after=4)

    monkeypatch.undo()
    assert checkpoint_steps(tmp_path) == [4, 6, 10]
    _write(tmp_path, 12, after=10)
    assert checkpoint_steps(tmp_path) == [10, 12]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = _write(tmp_path, 2)
    (path / "state.json").write_bytes(b"damaged")

    _write(tmp_path, 2)

    assert _step_found(tmp_path) == 2


@pytest.mark.parametrize("name", [*TENSOR_FILES, "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    _write(tmp_path, 2)
    file = _write(tmp_path, 4) / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:-1] if damage == "cut" else data)

    with caplog.at_level(logging.WARNING):
        found = _step_found(tmp_path)

    assert found == 2
    assert "checkpoint step=4 is damaged and is skipped, step=2 is used instead" in caplog.text
    assert name in caplog.text
    assert file.parent.is_dir()


def test_a_checkpoint_under_another_steps_name_is_not_used(tmp_path: Path) -> None:
    _write(tmp_path, 2).rename(tmp_path / "step-00000009")

    with pytest.raises(DamageError, match="none of the 1 checkpoints is whole"):
        newest_checkpoint(tmp_path)


def test_unknown_fields_in_the_state_are_refused(tmp_path: Path) -> None:
    file = _write(tmp_path, 2) / "state.json"
    state = parse_sealed(file.read_bytes(), "state")
    file.write_bytes(seal(state | {"later": 1}))

    with pytest.raises(DamageError):
        newest_checkpoint(tmp_path)


def test_the_state_is_canonical(tmp_path: Path) -> None:
    data = (_write(tmp_path, 2) / "state.json").read_bytes()

    assert seal(parse_sealed(data, "state")) == data
    assert canonical(parse_sealed(data, "state"))[:-1] == data[: data.rindex(b',"digest"')]


def test_what_a_killed_writer_left_is_never_found_and_is_cleared(tmp_path: Path) -> None:
    _write(tmp_path, 2)
    path = _write(tmp_path, 4)
    path.rename(tmp_path / "tmp-step-00000004.123.abc")

    found = _step_found(tmp_path)
    clear_unfinished(tmp_path, 2, keep=2)

    assert found == 2
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000002"]


def test_old_ones_that_killed_writers_did_not_come_to_remove_go_at_the_next_start(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        _write(tmp_path, step, keep=9)

    clear_unfinished(tmp_path, 4, keep=2)

    assert checkpoint_steps(tmp_path) == [3, 4, 5]  # 4 was loaded just now; of 5 nothing is known
    clear_unfinished(tmp_path, 0, keep=2)
    assert checkpoint_steps(tmp_path) == [3, 4, 5]


def test_a_failed_write_leaves_the_older_checkpoint_alone(tmp_path: Path) -> None:
    _write(tmp_path, 2)
    tensors = _tensors(4)
    del tensors["ema.safetensors"]
    state = newest_checkpoint(tmp_path)
    assert state is not None

    with pytest.raises(KeyError):
        write_checkpoint(tmp_path, state.state.model_copy(update={"step": 4}), tensors, keep=1)

    assert [file.name for file in tmp_path.iterdir()] == ["step-00000002"]
    assert _step_found(tmp_path) == 2


@pytest.mark.parametrize("is_there", [False, True])
def test_a_writer_killed_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path, is_there: bool) -> None:
    start = tmp_path / "start"
    _write(start, 2)
    if is_there:  # damaged, and to be written anew
        (_write(start, 4) / "ema.safetensors").write_bytes(b"damaged")
    found = []
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(start, folder)

        was_killed = killed_at(number, lambda folder=folder: _write(folder, 4, keep=1))  # type: ignore[misc]  # bound now

        found.append(_step_found(folder) or 0)
        clear_unfinished(folder, found[-1], keep=1)
        _write(folder, 4, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000004"]
        assert _step_found(folder) == 4
        if not was_killed:
            break
    assert found == sorted(found)
    assert set(found) == {2, 4}
    assert len(found) > 20


def test_the_older_goes_only_after_the_newer_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 2)
    read = []
    sha256_of = storage.sha256_of

    def watch(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
        assert from_disk
        assert path.parent.name.startswith("tmp-step-00000004.")  # it has no name yet that a run would find
        assert checkpoint_steps(tmp_path) == [2]
        read.append(path.name)
        return sha256_of(path, from_disk=from_disk)

    monkeypatch.setattr(storage, "sha256_of", watch)

    _write(tmp_path, 4, keep=1)

    assert sorted(read) == sorted(TENSOR_FILES)
    assert checkpoint_steps(tmp_path) == [4]


@pytest.mark.parametrize("n_failures", [1, 2])
@pytest.mark.parametrize("failure", ["flipped", "unreadable"])
def test_what_the_disk_does_not_give_back_is_written_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, n_failures: int, failure: str
) -> None:
    _write(tmp_path, 2)
    sha256_of, left = storage.sha256_of, [n_failures]

    def bad_disk(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
        if path.name == "optimizer.safetensors" and left[0]:
            left[0] -= 1
            if failure == "unreadable":
                raise StorageError(f"{path}: cannot read: Input/output error")
            data = bytearray(path.read_bytes())
            data[-1] ^= 16
            path.write_bytes(data)
        return sha256_of(path, from_disk=from_disk)

    monkeypatch.setattr(storage, "sha256_of", bad_disk)

    if n_failures == 1:
        _write(tmp_path, 4, keep=1)
    else:
        with pytest.raises(ChecksumError if failure == "flipped" else StorageError, match=r"optimizer\.safetensors"):
            _write(tmp_path, 4, keep=1)

    kept = 4 if n_failures == 1 else 2
    assert "the disk does not give back what was written, which is written once more" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{kept:08d}"]
    assert _step_found(tmp_path) == kept


def test_with_both_damaged_there_is_an_error_and_nothing_is_removed(tmp_path: Path) -> None:
    (_write(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    (_write(tmp_path, 4) / "state.json").unlink()

    with pytest.raises(DamageError, match="none of the 2 checkpoints is whole; remove them and start again"):
        newest_checkpoint(tmp_path)

    assert checkpoint_steps(tmp_path) == [2, 4]
