"""Repair of a run: a damaged checkpoint goes only when a whole one stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proteus_cache.errors import UsageError
from proteus_cache.repair.run_folder import repair_run
from proteus_cache.train.checkpoint import TENSOR_FILES, CheckpointState, checkpoint_steps, write_checkpoint
from tests.repair.stores import cut, flip, tree


def make_run(folder: Path) -> Path:
    """Three whole checkpoints."""
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {}\n")
    for step in (2, 4, 6):
        state = CheckpointState(step=step, config={}, data={}, precision="fp32", world_size=1, scaler=None, files={})
        tensors = {name: {"weight": torch.full((64,), float(step))} for name in TENSOR_FILES}
        write_checkpoint(folder / "checkpoints", state, tensors, keep=3)
    return folder


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
    run = make_run(tmp_path / "run")
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
