from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from proteus_cache.errors import UsageError
from proteus_cache.train.run_folder import (
    StepLog,
    check_run_folder,
    clear_leftovers,
    files_to_replace,
    metric_line,
)


def _lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _log(path: Path, steps: range, first_step: int) -> None:
    log = StepLog(path, first_step)
    log.write({"step": step} for step in steps)
    log.sync()
    log.close()


def test_a_log_goes_on_behind_the_step_that_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _log(path, range(1, 8), 0)

    _log(path, range(5, 10), 4)

    assert _lines(path) == list(range(1, 10))


@pytest.mark.parametrize("tail", [b'{"step": 4', b'{"step": 4}', b"\x00\x00\n", b"[]\n", b'{"no": 1}\n', b""])
def test_a_line_that_a_kill_left_unfinished_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    _log(path, range(1, 4), 0)
    with path.open("ab") as file:
        file.write(tail)

    _log(path, range(4, 6), 100)

    assert _lines(path) == [1, 2, 3, 4, 5]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _log(path, range(1, 4), 0)

    _log(path, range(1, 2), 0)

    assert _lines(path) == [1]


def test_a_loss_that_is_off_is_null() -> None:
    line = metric_line(3, 0, 1e-6, [2.5, 1.5, math.nan, 1.0, math.nan])

    expected = {"step": 3, "epoch": 0, "lr": 1e-6, "loss": 2.5, "loss_token": 1.5, "loss_feature": None}
    assert line == expected | {"loss_patch": 1.0}
    assert list(line)[:4] == ["step", "epoch", "lr", "loss"]


def test_a_run_with_checkpoints_is_only_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00001200").mkdir(parents=True)

    with pytest.raises(UsageError, match=r"holds checkpoints \(the newest is of step 1,200\); go on with --resume"):
        check_run_folder(tmp_path, resume=False)
    check_run_folder(tmp_path, resume=True)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()

    with pytest.raises(UsageError, match=r"is a cache \(it holds manifest.json\); give --out a new or empty folder"):
        check_run_folder(tmp_path, resume=True)
    with pytest.raises(UsageError, match="is a file"):
        check_run_folder(tmp_path / "manifest.json", resume=False)
    check_run_folder(tmp_path / "new", resume=False)


def test_what_a_start_would_replace_is_listed(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()

    assert files_to_replace(tmp_path, resume=False) == ["config.yaml", "metrics.jsonl"]
    assert files_to_replace(tmp_path, resume=True) == []
    assert files_to_replace(tmp_path / "new", resume=False) == []


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    for name in (".student.safetensors.12.ab", "student.safetensors", "metrics.jsonl", ".mine"):
        (tmp_path / name).touch()

    clear_leftovers(tmp_path, is_new=False)
    after_resume = sorted(path.name for path in tmp_path.iterdir())
    clear_leftovers(tmp_path, is_new=True)

    assert after_resume == [".mine", "metrics.jsonl", "student.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "metrics.jsonl"]
