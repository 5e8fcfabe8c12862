"""The command line as a user meets it: results, exit codes, one line for every mistake."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proteus_cache.cli.app import app
from proteus_cache.stores import repair_command
from tests.cli.running import extract_arguments, run, train_arguments


def test_help_imports_neither_torch_nor_zarr() -> None:
    code = (
        "import sys; from proteus_cache.cli.app import app; "
        "print([name for name in ('torch', 'zarr', 'numpy', 'pyarrow', 'timm') if name in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


COMMANDS = (
    "demo",
    "plan",
    "extract",
    "pack",
    "train",
    "eval",
    "pipeline",
    "info",
    "verify",
    "repair",
    "fidelity",
    "fetch",
)


def test_the_commands_are_these_in_the_order_of_the_work() -> None:
    assert tuple(command.name for command in app.registered_commands) == COMMANDS


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))

    lines = run(name, "--help").stdout.splitlines()

    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= columns
    assert f"Example: proteus-cache {name}" in text
    if columns == 80:
        example = text.partition("Example: ")[2].partition("╭")[0]
        assert all(f" {word} " in text.partition("╭")[2] for word in example.split() if word.startswith("--"))
        assert all(flag in text for flag in ("--json", "--quiet", "-q"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("extract --out {tmp}/cache --views 1", "1 view index"),
        ("pack {cache} --out {tmp}/pack", "48 views"),
        ("train --data {pack} --out {tmp}/run", "step 2"),
        ("eval {run} --images {images} --device cpu", "k-NN"),
        ("info {pack}", "pack"),
        ("verify {cache}", "whole"),
    ],
)
def test_quiet_leaves_the_result_and_nothing_else(folder: Path, tmp_path: Path, arguments: str, words: str) -> None:
    places = {name: folder / name for name in ("images", "cache", "pack", "run")}
    name, *others = [word.format(**places, tmp=tmp_path) for word in arguments.split()]
    given = {"extract": extract_arguments(folder), "train": train_arguments(folder)}.get(name, [name])

    outcome = run(*given, *others, "--quiet")

    assert words in outcome.stdout
    assert "next:" not in outcome.stdout
    assert outcome.stderr == ""


def test_every_suggested_step_works_as_it_is_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path / "my home"))
    monkeypatch.setenv("PROTEUS_IMAGES", str(folder / "images"))

    planned = run(*extract_arguments(folder), "--out", tmp_path / "my cache", "--plan-only")
    extracted = run(*next_step(planned))
    trained = run(*next_step(extracted), "--max-steps", 1, "--workers", 0, "--device", "cpu")
    scored = run(*[word for word in next_step(trained) if word not in ("--images", "DIR")], "--device", "cpu")
    looked = run("info", tmp_path / "my cache")
    checked = run(*next_step(run("verify", tmp_path / "my cache")))

    assert "--plan-only" not in next_step(planned)
    assert "vit_demo after 1 steps" in scored.stdout
    assert next_step(looked) == next_step(extracted)
    assert "whole; checked every digest" in checked.stdout


def next_step(outcome: Any) -> list[str]:
    """The arguments of the command that an outcome suggests."""
    *_, last = outcome.stdout.splitlines()
    assert last.startswith("next: proteus-cache ")
    return shlex.split(last)[2:]


def test_extract_says_what_it_made_and_resumes(folder: Path) -> None:
    outcome = run(*extract_arguments(folder), "--json")

    summary = json.loads(outcome.stdout)
    assert (summary["n_stored_views"], summary["units_committed"], summary["is_complete"]) == (48, 0, True)
    assert "nothing: all 6 units are there" in outcome.stderr


def test_plan_only_writes_the_manifest_and_no_unit(folder: Path, tmp_path: Path) -> None:
    outcome = run(*extract_arguments(folder), "--out", tmp_path / "planned", "--plan-only", "--json")

    plan = json.loads(outcome.stdout)
    assert plan["plan"]["views_todo"] == 48
    assert (tmp_path / "planned" / "manifest.json").is_file()
    assert not (tmp_path / "planned" / "receipts").exists()


@pytest.mark.parametrize(("name", "kind"), [("cache", "cache"), ("pack", "pack"), ("run", "run")])
def test_info_tells_what_a_folder_is(folder: Path, name: str, kind: str) -> None:
    assert json.loads(run("info", folder / name, "--json").stdout)["kind"] == kind
    assert run("info", folder / name).stdout.startswith(kind)


@pytest.mark.parametrize("name", ["cache", "pack", "run"])
@pytest.mark.parametrize("flags", [[], ["--read-data"]])
def test_verify_passes_what_is_whole(folder: Path, name: str, flags: list[str]) -> None:
    assert json.loads(run("verify", folder / name, *flags, "--json").stdout)["is_whole"]


def test_verify_ends_with_1_and_names_the_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "views" / "v001" / "s00002.tar").write_bytes(b"")

    outcome = run("verify", tmp_path / "cache", code=1)

    assert "views/v001/s00002.tar: 0 bytes instead of" in outcome.stdout
    assert f"run `{repair_command(tmp_path / 'cache')}`: it redoes this unit" in outcome.stdout


def test_eval_scores_student_average_and_untrained_student(folder: Path) -> None:
    arguments = ["eval", folder / "run", "--images", folder / "images", "--device", "cpu", "--workers", 1]

    report = json.loads(run(*arguments, "--json").stdout)
    with_teacher = run(*arguments, "--teacher", "vit", "--weights", folder / "teacher.safetensors")

    assert [model["model"] for model in report["models"]] == ["student", "ema", "untrained"]
    assert report["n_test"] > 0
    assert "teacher" in with_teacher.stdout


def test_train_takes_the_only_cache_in_home_and_packs_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path))
    monkeypatch.setenv("PROTEUS_IMAGES", str(folder / "images"))
    run("extract", "--teacher", "vit", "--weights", folder / "teacher.safetensors", "--views", 1, "--workers", 0)

    first = run("train", "--student", "vit_ti14", "--max-steps", 1, "--batch-size", 8, "--workers", 0)
    second = run("train", "--student", "vit_ti14", "--max-steps", 2, "--batch-size", 8, "--workers", 0, "--resume")

    assert "packing" in first.stderr
    assert "packing" not in second.stderr
    assert "B/s keep the device busy" in first.stderr
    assert "resumes   after step 1" in second.stderr
    assert "step 2" in second.stdout
    assert (tmp_path / "runs" / "vit_ti14" / "student.safetensors").is_file()
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [
        json.loads(run("info", tmp_path / "caches" / "vit", "--json").stdout)["cache_id"][:16]
    ]


def test_settings_come_from_flag_then_config_then_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTEUS_IMAGES", str(tmp_path / "nowhere"))
    config = tmp_path / "extract.yaml"
    config.write_text(
        f"teacher: vit\nweights: {folder / 'teacher.safetensors'}\nimages: {folder / 'images'}\n"
        f"views: 7\nshard-size: 8\nout: {folder / 'cache'}\ntargets: [cls, patch]\n"
    )

    outcome = run("extract", "--config", config, "--views", 2, "--json")

    assert json.loads(outcome.stdout)["n_stored_views"] == 48


def test_a_number_of_processes_may_stand_on_the_command_line_and_in_the_config_file(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.yaml").write_text("gpus: 2\nout: [a list]\n")

    run(*train_arguments(folder), "--config", tmp_path / "train.yaml", "--gpus", 1, "--out", tmp_path / "run")

    assert (tmp_path / "run" / "student.safetensors").is_file()


def test_train_takes_the_pack_that_a_cache_was_moved_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path))
    shutil.copytree(folder / "cache", tmp_path / "caches" / "vit")
    run("pack", tmp_path / "caches" / "vit", "--move", "--yes")

    outcome = run("train", "--student", "vit_ti14", "--max-steps", 1, "--batch-size", 8, "--workers", 0, "--json")

    assert json.loads(outcome.stdout)["last"]["step"] == 1
