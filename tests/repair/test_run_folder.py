"""Repair of a run: a damaged checkpoint goes only when a whole one stays."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proteus_cache import storage
from proteus_cache.errors import UsageError
from proteus_cache.repair.run_folder import repair_run
from proteus_cache.train.checkpoint import TENSOR_FILES, CheckpointState, checkpoint_steps, write_checkpoint
from proteus_cache.train.finished import write_finished
from proteus_cache.train.run_folder import EMA, HEADS, STUDENT
from proteus_cache.train.tensors import replace_tensors
from proteus_cache.train.verify import verify_run
from tests.cli.running import run as run_command
from tests.repair.stores import copy_bytes, cut, flip, tree


def make_run(folder: Path) -> Path:
    """Three whole checkpoints."""
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {}\n")
    for step in (2, 4, 6):
        state = CheckpointState(step=step, config={}, data={}, precision="fp32", world_size=1, scaler=None, files={})
        tensors = {name: {"weight": torch.full((64,), float(step))} for name in TENSOR_FILES}
        write_checkpoint(folder / "checkpoints", state, tensors, keep=3)
    return folder


def finish(run: Path) -> Path:
    """Final weights, and the record of them."""
    tensors = {"weight": torch.ones(64)}
    files = {name: replace_tensors(run / name, tensors, {"name": name}) for name in (STUDENT, HEADS, EMA)}
    write_finished(run, 6, files)
    return run


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int) -> None:
    """From now on the disk fails `times` times when a file is read whose path holds `name`."""
    sha256_of, left = storage.sha256_of, [times]

    def read(path: Path, **options: bool) -> tuple[int, str]:
        if name in str(path) and left[0]:
            left[0] -= 1
            with storage.reported("read", path):
                raise OSError(number, os.strerror(number))
        return sha256_of(path, **options)

    monkeypatch.setattr(storage, "sha256_of", read)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("step", [2, 6])
def test_a_damaged_checkpoint_is_removed(tmp_path: Path, step: int, damage: Callable[[Path], None]) -> None:
    run = make_run(tmp_path / "run")
    damage(run / f"checkpoints/step-{step:08d}/ema.safetensors")
    asked: list[str] = []

    promised = repair_run(run, dry_run=True)
    report = repair_run(run, agree=asked.append)

    assert [action.state for action in promised.actions] == ["to do"]
    assert [action.state for action in report.actions] == ["done"]
    assert report.is_whole
    assert checkpoint_steps(run / "checkpoints") == [each for each in (2, 4, 6) if each != step]
    assert asked == [f"{run}: remove 1 damaged checkpoint? A whole one remains."]
    assert repair_run(run).actions == []


def test_the_last_ones_are_kept_when_none_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step in (2, 4, 6):
        flip(run / f"checkpoints/step-{step:08d}/model.safetensors")
    before = tree(run)

    report = repair_run(run)

    assert [action.state for action in report.actions] == ["not done"] * 3
    assert tree(run) == before
    assert not report.is_whole


def test_damaged_final_weights_are_left_to_resume(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "run"))
    (run / "student.safetensors").write_bytes(b"junk")

    report = repair_run(run)

    (action,) = report.actions
    assert action.state == "not done"
    assert f"proteus-cache train --config {run / 'config.yaml'} --resume" in action.remedy
    assert (run / "student.safetensors").read_bytes() == b"junk"


def test_nothing_is_removed_when_the_answer_is_no(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip(run / "checkpoints/step-00000004/model.safetensors")
    before = tree(run)

    def no(question: str) -> None:
        raise UsageError(question)

    with pytest.raises(UsageError):
        repair_run(run, agree=no)

    assert tree(run) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("times", [1, 2, 1000])
def test_a_checkpoint_that_cannot_be_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    run = make_run(tmp_path / "run")
    before = tree(run)
    failing(monkeypatch, "step-00000004/ema", number, times)

    report = repair_run(run)

    (action,) = report.actions
    assert (action.paths, action.state) == (("checkpoints/step-00000004",), "not done")
    assert action.problem == f"ema.safetensors: cannot read: {os.strerror(number)}"
    assert "kept" in action.remedy
    assert tree(run) == before
    assert not report.is_whole


def test_what_was_found_damaged_once_and_whole_then_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    before = tree(run)
    sha256_of, wrong = storage.sha256_of, ["0" * 64]

    def read(path: Path, **options: bool) -> tuple[int, str]:
        size, found = sha256_of(path, **options)
        return size, wrong.pop() if wrong and "step-00000004/ema" in str(path) else found

    monkeypatch.setattr(storage, "sha256_of", read)

    assert [action.state for action in repair_run(run).actions] == ["not done"]
    assert tree(run) == before


@pytest.mark.parametrize("read_data", [True, False])
@pytest.mark.parametrize("name", [STUDENT, HEADS, EMA, "finished.json"])
def test_a_lost_file_of_a_finished_run_is_missed(tmp_path: Path, name: str, read_data: bool) -> None:
    run = finish(make_run(tmp_path / "run"))
    assert verify_run(run, read_data) == []
    (run / name).unlink()

    (finding,) = verify_run(run, read_data)

    assert (finding.path, finding.problem.partition(" ")[0]) == (name, "missing")
    assert f"proteus-cache train --config {run / 'config.yaml'} --resume" in finding.remedy
    outcome = run_command("verify", run, "--json", *["--read-data"] * read_data, code=1)
    resume = f"proteus-cache train --config {run / 'config.yaml'} --resume --out {run}"
    assert json.loads(outcome.stdout)["next"] == resume


def test_final_weights_of_another_name_are_not_taken_for_these(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "run"))
    copy_bytes(run / EMA, run / STUDENT)

    (finding,) = verify_run(run, True)

    assert finding.path == STUDENT


def test_findings_of_a_run_name_a_file_once_and_a_command_that_mends(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "run"))
    flip(run / "checkpoints/step-00000004/ema.safetensors")
    flip(run / HEADS)

    outcome = run_command("verify", run, "--read-data", code=1)

    assert outcome.stdout.splitlines()[:4] == [
        "checkpoints/step-00000004: ema.safetensors: not the file that was written (its digest differs)",
        f"    run `proteus-cache repair {run}`, which removes it; --resume falls back to the checkpoint before it",
        "heads.safetensors: damaged (SHA-256 differs from finished.json)",
        f"    run `proteus-cache train --config {run / 'config.yaml'} --resume --out {run}`, which writes the final "
        "weights anew",
    ]


def test_a_run_on_a_disk_that_fails_is_looked_at_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finish(make_run(tmp_path / "run"))
    failing(monkeypatch, "safetensors", errno.EIO, 10**6)

    findings = verify_run(run, True)

    assert len(findings) == 6
    assert {finding.problem.rpartition(": ")[2] for finding in findings} == {"Input/output error"}
    assert not any("repair" in finding.remedy or "--resume" in finding.remedy for finding in findings)
