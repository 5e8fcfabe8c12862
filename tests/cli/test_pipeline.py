"""`proteus-cache pipeline` as a user meets it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import run
from tests.cli.test_complete import complete
from tests.cli.test_interrupt import proposed, started
from tests.pipeline.makers import small, write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_dry_run_prints_commands_and_numbers_and_makes_nothing(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path / "p.yaml", small())

    outcome = run("pipeline", file, "--dry-run")

    lines = outcome.stdout.splitlines()
    assert f"proteus-cache pack {home}/caches/c --out {home}/packs/c-float16 --workers 1" in lines
    assert f"proteus-cache train --config {home}/runs/r.yaml --resume" in lines
    assert any(line.startswith("#   steps     6 of 4 views, 3 in an epoch") for line in lines)
    assert any(line.startswith("#   views     12 images x 2; 0 of 3 shards held out") for line in lines)
    assert outcome.stderr == ""
    assert not home.exists()


def test_the_commands_of_a_dry_run_have_options_that_there_are(tmp_path: Path, home: Path) -> None:
    document = small()
    document["pack"]["c-float16"] |= {"views": ["v001"], "targets": "cls,patch", "codec": "int8"}
    document["eval"]["knn"] |= {"teacher": "demo", "seed": 1, "batch_size": 8, "protocol": "knn"}
    document["extract"]["c"] |= {
        **{"augment": "none", "view_format": "png", "seed": 3, "limit": 10, "probe_images": 2, "precision": "fp32"},
        **{"size": 56, "gpus": 1, "batch_size": 2, "targets": ["cls", "patch"]},
    }

    plan = json.loads(run("pipeline", write(tmp_path / "p.yaml", document), "--dry-run", "--json").stdout)

    from typer.main import get_command

    from proteus_cache.cli.app import app

    commands: Any = get_command(app)
    for stage in plan["stages"]:
        if stage["stage"] == "draw":
            continue
        _, name, *words = shlex.split(stage["command"].partition(" > ")[0])
        options = {option for parameter in commands.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
    assert [stage["plan"].get("steps") for stage in plan["stages"]][-2] == 6


def test_the_outcome_is_one_object_on_stdout(tmp_path: Path, home: Path) -> None:
    document = {"version": 1, "draw": {"a": {"per_class": 1}}}
    file = write(tmp_path / "p.yaml", document)

    first = run("pipeline", file, "--json")
    again = run("pipeline", file, "--quiet")

    found = json.loads(first.stdout)
    assert found["pipeline"] == str(file)
    assert [(stage["status"], stage["result"]) for stage in found["stages"]] == [("done", {"images": 6})]
    assert "[1/1] draw a" in first.stderr
    assert again.stderr == ""
    assert again.stdout.splitlines()[-1] == "nothing to do: all 1 stages were finished"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nextrakt: {}\n", "unknown key 'extrakt'; did you mean extract?"),
        ("version: 1\nextract: {c: {teacher: 3}}\n", "extract.c.teacher must be a text, got 3"),
        ("version: one\n", "version must be 1, got 'one'"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_wrong_file_is_one_line_and_exit_2(
    tmp_path: Path, home: Path, text: str, message: str, flags: list[str]
) -> None:
    (tmp_path / "p.yaml").write_text(text)

    outcome = run("pipeline", tmp_path / "p.yaml", *flags, code=2)

    assert outcome.stdout == ""
    assert outcome.stderr == f"proteus-cache: {tmp_path}/p.yaml: {message}\n"
    assert not home.exists()


def test_a_missing_file_is_one_line_and_exit_2(tmp_path: Path) -> None:
    outcome = run("pipeline", tmp_path / "p.yaml", code=2)

    assert (
        outcome.stderr == f"proteus-cache: {tmp_path}/p.yaml: no such file; give the YAML file of a pipeline, as in "
        "docs/pipelines.md\n"
    )


def test_files_of_the_folder_pipelines_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "mine.yaml").touch()
    (tmp_path / "pipelines" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)

    assert complete("proteus-cache pipeline ") == ["pipelines/mine.yaml"]
    assert complete("proteus-cache pipeline /") == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["caches/c/receipts/v000/*.json", "runs/r/metrics.jsonl"])
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path, home: Path, moment: str) -> None:
    document = small()
    document["extract"]["c"] |= {"views": 40, "shard_size": 2}
    document["train"]["r"]["max_steps"] = None
    if "runs" in moment:
        document["extract"]["c"]["views"] = 1
    file = write(tmp_path / "my p.yaml", document)

    with started("pipeline", file) as command:
        command.wait_until(lambda: any(path.stat().st_size for path in home.glob(moment)))
        command.press_ctrl_c()
        status, out, errors = command.end()

    last = errors.splitlines()[-1]
    assert (status, out) == (1, "")
    assert last.startswith("proteus-cache: interrupted; what is finished is kept; to go on: proteus-cache pipeline ")
    assert proposed(last) == ["pipeline", str(file)]
    assert "to go on: proteus-cache extract" not in errors
    if "runs" in moment:
        assert list((home / "runs" / "r" / "checkpoints").glob("step-*"))
