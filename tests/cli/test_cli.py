"""The command line as a user meets it: results, exit codes, one line for every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from proteus_cache.cli.app import app
from tests.makers import make_images, make_teacher


def run(*arguments: object, code: int = 0) -> Any:
    """Run a command in this process; the result's stdout and stderr are kept apart."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, outcome.output + str(outcome.exception)
    assert "Traceback" not in outcome.output
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher, and everything that the commands make of them."""
    folder = tmp_path_factory.mktemp("work")
    make_images(folder / "images", 24)
    make_teacher(folder / "teacher.safetensors")
    run(*extract_arguments(folder))
    run("pack", folder / "cache", "--out", folder / "pack")
    run(*train_arguments(folder), "--out", folder / "run")
    return folder


def extract_arguments(folder: Path) -> list[object]:
    return [
        *("extract", "--teacher", "vit", "--weights", folder / "teacher.safetensors", "--images", folder / "images"),
        *("--out", folder / "cache", "--views", 2, "--shard-size", 8, "--workers", 0, "--device", "cpu"),
    ]


def train_arguments(folder: Path) -> list[object]:
    return [
        *("train", "--student", "vit_ti14", "--data", folder / "pack", "--max-steps", 2, "--batch-size", 8),
        *("--workers", 0, "--device", "cpu"),
    ]


def test_help_imports_neither_torch_nor_zarr() -> None:
    code = (
        "import sys; from proteus_cache.cli.app import app; "
        "print([name for name in ('torch', 'zarr', 'numpy', 'pyarrow', 'timm') if name in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def test_every_command_has_help_with_an_example() -> None:
    for name in ("extract", "pack", "train", "eval", "info", "verify", "fetch"):
        text = " ".join(run(name, "--help").stdout.split())
        assert f"Example: proteus-cache {name}" in text


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
    assert "run the same extract again" in outcome.stdout


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
    assert "GB/s keep the device busy" in first.stderr
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


MISTAKES: list[tuple[list[str], str]] = [
    (["extract", "--images", "{images}"], "no teacher"),
    (["extract", "--teacher", "dinov2_vits4", "--images", "{images}"], "did you mean dinov2_vits14"),
    (["extract", "--teacher", "vit", "--weights", "{weights}", "--images", "{tmp}/none"], "no such folder or list"),
    (["extract", "--teacher", "dinov2_vits14"], "PROTEUS_IMAGES"),
    (["extract", "--config", "{tmp}/none.yaml"], "cannot read the config"),
    (["extract", "--teacher", "vit", "--weights", "{weights}", "--images", "{images}", "--codec", "zip"], "zip"),
    (["extract", "--teacher", "vit", "--weights", "{weights}", "--images", "{images}", "--gpus", "0"], "--gpus"),
    (
        [
            "extract",
            "--teacher",
            "vit",
            "--weights",
            "{weights}",
            "--images",
            "{images}",
            "--out",
            "{cache}",
            "--seed",
            "9",
        ],
        "--seed",
    ),
    (["pack", "{pack}", "--out", "{tmp}/p"], "this is a pack"),
    (["pack", "{cache}", "--out", "{images}"], "holds something else"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--views", "v009"], "v009"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--targets", "block.3"], "block.3"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--codec", "zip"], "zip"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--move"], "--yes"),
    (["train", "--data", "{pack}"], "no student"),
    (["train", "--student", "vit_s", "--data", "{pack}"], "vit_s14"),
    (["train", "--student", "vit_ti14"], "nothing to train from"),
    (["train", "--student", "vit_ti14", "--data", "{images}"], "neither a pack nor a cache"),
    (["train", "--student", "vit_ti14", "--data", "{tmp}/none"], "no such folder"),
    (["train", "--student", "vit_ti14", "--data", "{pack}", "--out", "{run}"], "--resume"),
    (["train", "--student", "vit_ti14", "--data", "{pack}", "--batch-size", "4096"], "4,?096"),
    (["train", "--student", "vit_ti14", "--data", "{pack}", "--precision", "fp8"], "precision"),
    (["eval", "{pack}", "--images", "{images}"], "config.yaml"),
    (["eval", "{run}", "--images", "{tmp}/none"], "none"),
    (["eval", "{run}", "--images", "{images}", "--protocol", "lasso"], "knn"),
    (["info", "{images}"], "no cache"),
    (["verify", "{tmp}/none"], "no such folder"),
    (["fetch", "resnet50"], "resnet50"),
    (["extrct"], "'extract'"),
    (["extract", "--teachr", "vit"], "--teacher.*see proteus-cache extract --help"),
    (["extract", "--views", "two"], "--views"),
    (["extract", "--views"], "--views"),
    (["extract", "--teacher", "vit", "--weights", "{weights}", "--images", "{images}", "--targets", ""], "--targets"),
    (["extract", "--config", "{images}"], "cannot read the config"),
    (["pack"], "cache"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--views", "0"], "--views must be from 1"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--targets", ","], "--targets names nothing"),
    (["pack", "{cache}", "--out", "{tmp}/p", "--workers", "0"], "--workers"),
    (["train", "--student", "vit_ti14", "--data", "{weights}"], "is a file"),
    (
        ["train", "--student", "vit_ti14", "--data", "{pack}", "--batch-size", "2", "--device", "cpu", "--gpus", "3"],
        "batch of 2 cannot be shared by 3",
    ),
    (["info", "{weights}"], "is a file"),
    (["info", "{pack}", "{cache}"], "unexpected extra argument"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=[" ".join(m[0][:4]) + f" {i}" for i, m in enumerate(MISTAKES)]
)
def test_a_mistake_is_one_line_and_exit_2(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    import re

    places = {name: folder / name for name in ("images", "cache", "pack", "run")}
    places |= {"tmp": tmp_path, "weights": folder / "teacher.safetensors"}

    outcome = run(*[argument.format(**places) for argument in arguments], code=2)

    lines = [line for line in outcome.stderr.splitlines() if line.startswith("proteus-cache: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("extract", "teacher: vit\nimages: 5\n", "--images must be a path, got 5"),
        ("extract", "teacher: vit\ntargets: 5\n", "--targets must be a list of names, got 5"),
        ("extract", "teacher: vit\ngpus: many\n", "--gpus must be a whole number"),
        ("extract", "# nothing but a comment\n", "no teacher"),
        ("train", "train: 5\n", "`train:` must hold"),
        ("train", "train:\n  student: vit_ti14\nepochs: 3\n", "'epochs' stands beside the section"),
        ("train", "student: vit_ti14\ndata: 5\n", "--data must be a path, got 5"),
        ("train", "student: vit_ti14\nema_dcay: 0.9\n", "did you mean ema_decay"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_and_exit_2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, text: str, message: str
) -> None:
    monkeypatch.setenv("PROTEUS_IMAGES", str(folder / "images"))
    (tmp_path / "settings.yaml").write_text(text)

    outcome = run(command, "--config", tmp_path / "settings.yaml", code=2)

    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr


def test_a_number_of_processes_may_stand_on_the_command_line_and_in_the_config_file(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.yaml").write_text("gpus: 2\nout: [a list]\n")

    run(*train_arguments(folder), "--config", tmp_path / "train.yaml", "--gpus", 1, "--out", tmp_path / "run")

    assert (tmp_path / "run" / "student.safetensors").is_file()


def test_train_lists_what_it_could_train_from(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path))
    shutil.copytree(folder / "cache", tmp_path / "caches" / "one")
    run(*extract_arguments(folder), "--out", tmp_path / "caches" / "two", "--views", 1, "--seed", 3)

    outcome = run("train", "--student", "vit_ti14", code=2)

    assert "caches/one" in outcome.stderr
    assert "caches/two" in outcome.stderr
    assert "--data" in outcome.stderr


def test_train_takes_the_pack_that_a_cache_was_moved_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path))
    shutil.copytree(folder / "cache", tmp_path / "caches" / "vit")
    run("pack", tmp_path / "caches" / "vit", "--move", "--yes")

    outcome = run("train", "--student", "vit_ti14", "--max-steps", 1, "--batch-size", 8, "--workers", 0, "--json")

    assert json.loads(outcome.stdout)["last"]["step"] == 1


def test_a_damaged_config_of_a_run_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(": [")

    outcome = run("info", tmp_path, code=1)

    assert outcome.stderr.startswith(f"proteus-cache: {tmp_path / 'config.yaml'}: not valid YAML")


def test_a_pickle_with_code_as_weights_is_refused_without_running_it(folder: Path, tmp_path: Path) -> None:
    import os
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"cls_token": Payload()}))

    outcome = run(
        *("extract", "--teacher", "dinov2_vits14", "--weights", tmp_path / "bad.pth", "--images", folder / "images"),
        *("--out", tmp_path / "cache"),
        code=1,
    )

    assert "bad.pth" in outcome.stderr
    assert not (tmp_path / "ran").exists()


def test_a_pack_without_patch_targets_cannot_train(folder: Path, tmp_path: Path) -> None:
    run("pack", folder / "cache", "--out", tmp_path / "cls_only", "--targets", "cls")

    outcome = run("train", "--student", "vit_ti14", "--data", tmp_path / "cls_only", "--batch-size", 8, code=2)

    assert "patch" in outcome.stderr
