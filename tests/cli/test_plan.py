"""`proteus-cache plan` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from proteus_cache.cli.app import app
from tests.makers import make_images, make_teacher


def run(*arguments: object, code: int = 0) -> Any:
    """Run the command in this process; stdout and stderr are kept apart."""
    outcome = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert outcome.exit_code == code, outcome.output + str(outcome.exception)
    assert "Traceback" not in outcome.output
    return outcome


def test_it_needs_no_argument(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path / "home"))

    outcome = run()

    assert outcome.stdout.startswith("teacher   dinov2_vitg14, views of 224 px, 599 GFLOP each\n")
    assert "1,281,167 images x 4" in outcome.stdout
    assert "dinov2_vitg14:" in outcome.stdout
    assert outcome.stderr == ""
    assert not (tmp_path / "home").exists()


def test_nothing_is_downloaded_and_nothing_is_written(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **keywords): raise AssertionError('a plan went to the network')\n"
        "socket.socket.connect = refuse\n"
        "from proteus_cache.cli import main\n"
        "sys.argv = ['proteus-cache', 'plan', '--teacher', 'timm:vit_small_patch14_dinov2', '--json']\n"
        "main()\n"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)

    assert json.loads(found.stdout)["teacher"]["name"] == "timm:vit_small_patch14_dinov2"
    assert list(tmp_path.iterdir()) == []


def test_json_has_every_number_and_is_alone_on_stdout() -> None:
    outcome = run("--gpu-kind", "a100", "--gpus", 8, "--student", "vit_s14", "--student", "vit_l14", "--json")

    plan = json.loads(outcome.stdout)
    assert plan["cache"]["code_bytes"] == 396_800
    assert plan["gpu"] == {"kind": "a100", "count": 8, "why": "as asked for"}
    assert [student["student"] for student in plan["students"]] == ["vit_s14", "vit_l14"]
    assert plan["students"][0]["break_even_students"] == pytest.approx(0.0135, rel=0.01)
    assert plan["measured"] is None


def test_quiet_leaves_the_plan_and_drops_the_advice(tmp_path: Path) -> None:
    arguments = ["--teacher", "demo", "--n-images", 100, "--out", tmp_path / "cache"]

    assert run(*arguments).stdout.splitlines()[-1].startswith("next: proteus-cache extract --teacher demo --limit 100")
    assert "next:" not in run(*arguments, "--quiet").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "dinov2_vitg"], "did you mean dinov2_vitg14"),
        (["--teacher", "timm:vit_smal_patch14_dinov2"], "did you mean vit_small_patch14_dinov2"),
        (["--teacher", "vit"], "needs --weights"),
        (["--student", "vit_s"], "did you mean vit_s14"),
        (["--codec", "int9"], "int8"),
        (["--n-images", "0"], "--n-images must be"),
        (["--n-images", "many"], "'--n-images'|--n-images"),
        (["--targets", "cls,pach"], "no target 'pach'"),
        (["--gpu-kind", "a10"], "did you mean a100"),
        (["--images", "/nowhere"], "/nowhere"),
        (["--measure", "--gpu-kind", "h200"], "leave --gpu-kind out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    import re

    outcome = run(*arguments, code=2)

    assert outcome.stdout == ""
    assert outcome.stderr.startswith("proteus-cache: ")
    assert outcome.stderr.count("\n") == 1
    assert re.search(message, outcome.stderr)


def test_a_teacher_of_the_user_s_own_is_planned_from_its_file(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 12)
    weights = make_teacher(tmp_path / "teacher.safetensors")

    outcome = run("--teacher", "vit", "--weights", weights, "--images", tmp_path / "images", "--out", tmp_path / "c")

    assert "views     12 images x 4" in outcome.stdout
    assert "targets   cls 24 float16, patch 16x24 int8" in outcome.stdout
    assert "(of your images)" in outcome.stdout
    assert f"--weights {weights}" in outcome.stdout.splitlines()[-1]


@pytest.mark.slow
def test_measure_says_what_it_does_and_measures_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_cache.plan import measure, measure_host

    for module, name, value in (
        (measure, "_TEACHER_S", 0.5),
        (measure, "_STUDENTS_S", 0.5),
        (measure_host, "_RENDER_S", 0.3),
        (measure_host, "_DISK_S", 0.1),
    ):
        monkeypatch.setattr(module, name, value)

    outcome = run("--teacher", "demo", "--n-images", 200, "--measure", "--out", tmp_path / "cache")

    assert outcome.stderr.splitlines()[0].startswith("measures  writing beside")
    assert "measured here" in outcome.stdout
    assert "decided by the" in outcome.stdout
    assert list(tmp_path.iterdir()) == []
