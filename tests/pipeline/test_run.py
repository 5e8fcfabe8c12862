"""A pipeline from its file to scores: whole, again, killed, and by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proteus_cache.cache.reader import open_cache
from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.pack.reader import open_pack
from proteus_cache.pipeline.dry_run import plan_pipeline
from proteus_cache.pipeline.finished import is_finished
from proteus_cache.pipeline.run import Done, lines_of
from tests.extract.test_interrupt import processes_of_session
from tests.pipeline.makers import run_stages, small, stages, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, program: list[str]) -> tuple[Path, list[Done]]:
    """The small pipeline, run once without an interruption. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    done, _ = run_stages(write(folder / "p.yaml", small()), folder / "home", program)
    return folder, done


def _student(folder: Path) -> bytes:
    return (folder / "home" / "runs" / "r" / "student.safetensors").read_bytes()


def test_every_stage_makes_what_its_command_makes(finished: tuple[Path, list[Done]]) -> None:
    folder, done = finished

    home = folder / "home"
    titles = ["draw scenes/train", "draw scenes/test", "extract c", "pack c-float16", "train r", "eval r.knn"]
    assert [one.stage.title for one in done] == titles
    assert not any(one.is_skipped for one in done)
    assert len(list((home / "images").rglob("*.jpg"))) == 18
    cache, pack = open_cache(home / "caches" / "c"), open_pack(home / "packs" / "c-float16")
    assert cache.complete_views() == ["v000", "v001"]
    assert pack.cache_id == cache.cache_id()
    metrics = (home / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in metrics) == 6
    report = json.loads((home / "runs" / "r.knn.json").read_text())
    assert (report["protocol"], report["n_test"], report["student"]) == ("knn", 6, "vit_demo")
    assert lines_of(done)[-1].startswith("stages    6: 6 done in ")
    assert "; knn, best k: student " in lines_of(done)[-2]


def test_a_finished_pipeline_does_nothing_and_says_so(finished: tuple[Path, list[Done]]) -> None:
    folder, _ = finished
    before = _stamps(folder)

    done, shown = run_stages(folder / "p.yaml", folder / "home", ["/bin/false"])

    assert all(one.is_skipped for one in done)
    assert lines_of(done)[-1] == "nothing to do: all 6 stages were finished"
    assert "; knn, best k: student " in lines_of(done)[-2]
    assert all(": finished, " in line for line in shown.lines)
    assert _stamps(folder) == before


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_student_is_all_that_a_longer_file_adds(
    finished: tuple[Path, list[Done]], tmp_path: Path, program: list[str]
) -> None:
    folder, _ = finished
    home = _copy(folder / "home", tmp_path / "home")
    document = small()
    document["train"]["again"] = document["train"]["r"] | {"seed": 1, "max_steps": 1}
    document["eval"]["knn"]["run"] = "r"

    done, _ = run_stages(write(tmp_path / "p.yaml", document), home, program)

    assert [one.stage.title for one in done if not one.is_skipped] == ["eval r.knn", "train again"]
    assert (home / "runs" / "again" / "student.safetensors").is_file()


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_a_score_belongs_to_the_weights_it_was_made_with(finished: tuple[Path, list[Done]], tmp_path: Path) -> None:
    folder, _ = finished
    home = folder / "home"
    found = stages(folder / "p.yaml", home)
    score = found[-1]
    assert is_finished(score, found)
    weights = home / "runs" / "r" / "student.safetensors"
    stamp = weights.stat().st_mtime_ns

    os.utime(weights, ns=(stamp, score.out.stat().st_mtime_ns + 1))
    try:
        assert not is_finished(score, found)
    finally:
        os.utime(weights, ns=(stamp, stamp))


@pytest.mark.parametrize(
    ("path", "value", "title", "message"),
    [
        (("extract", "c", "shard_size"), 8, "extract c", "--shard-size is 4 there and 8 here"),
        (("pack", "c-float16", "codec"), "int8", "pack c-float16", "holds another pack"),
    ],
)
def test_what_was_made_with_other_settings_is_refused(
    finished: tuple[Path, list[Done]], tmp_path: Path, path: tuple[str, ...], value: object, title: str, message: str
) -> None:
    folder, _ = finished
    document: dict[str, Any] = small()
    document[path[0]][path[1]][path[2]] = value

    with pytest.raises(UsageError, match=message):
        run_stages(write(tmp_path / "p.yaml", document), folder / "home", ["/bin/false"])


def test_a_run_with_other_settings_is_refused_by_its_command(
    finished: tuple[Path, list[Done]], tmp_path: Path, program: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    home = _copy(folder / "home", tmp_path / "home")
    document = small()
    document["train"]["r"]["lr"] = 2.0e-3

    with pytest.raises(UsageError, match="train r failed, and has said why above; what is finished is kept"):
        run_stages(write(tmp_path / "p.yaml", document), home, program)

    assert "made with lr 0.001, and now it is 0.002" in capfd.readouterr().err


def test_more_steps_go_on_from_the_finished_run(
    finished: tuple[Path, list[Done]], tmp_path: Path, program: list[str]
) -> None:
    folder, _ = finished
    home = _copy(folder / "home", tmp_path / "home")
    document = small()
    document["train"]["r"]["max_steps"] = 8

    done, _ = run_stages(write(tmp_path / "p.yaml", document), home, program)

    assert [one.stage.title for one in done if not one.is_skipped] == ["train r", "eval r.knn"]
    lines = (home / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in lines) == 8


def test_missing_files_are_named_before_anything_is_made(tmp_path: Path) -> None:
    document = small()
    document["eval"]["knn"]["images"] = str(tmp_path / "nowhere")

    with pytest.raises(UsageError, match=r"nowhere: no such file or folder; eval r.knn needs it"):
        run_stages(write(tmp_path / "p.yaml", document), tmp_path / "home", ["/bin/false"])

    assert not (tmp_path / "home").exists()


def test_a_failed_stage_ends_the_pipeline(tmp_path: Path) -> None:
    file = write(tmp_path / "p.yaml", small())
    killed = ["/bin/sh", "-c", "kill -9 $$"]

    with pytest.raises(ProteusCacheError, match="extract c failed, and has said why above") as failed:
        run_stages(file, tmp_path / "home", ["/bin/false"])
    with pytest.raises(ProteusCacheError, match="extract c was killed by signal 9"):
        run_stages(file, tmp_path / "home", killed)

    assert failed.value.exit_code == 1
    assert not (tmp_path / "home" / "packs").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "8"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "8"},
    ],
)
def test_inside_a_launcher_of_several_processes_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UsageError, match="this is process 2 of 8 of a launcher"):
        run_stages(write(tmp_path / "p.yaml", small()), tmp_path / "home", ["/bin/false"])


def test_the_lines_of_a_dry_run_do_the_same_in_a_shell(
    finished: tuple[Path, list[Done]], tmp_path: Path, program: list[str]
) -> None:
    folder, _ = finished
    plan = plan_pipeline(write(tmp_path / "p.yaml", small()), tmp_path / "home")
    assert not (tmp_path / "home").exists()
    environment = os.environ | {
        "PATH": f"{Path(program[0]).parent}{os.pathsep}{os.environ['PATH']}",
        "PROTEUS_HOME": str(tmp_path / "home"),
    }

    subprocess.run(["bash", "-euc", "\n".join(plan.lines())], env=environment, cwd=tmp_path, check=True)

    assert _student(tmp_path) == _student(folder)
    report = json.loads((tmp_path / "home" / "runs" / "r.knn.json").read_text())
    assert report["protocol"] == "knn"


def test_moved_units_are_not_extracted_again(tmp_path: Path, program: list[str]) -> None:
    document = small()
    document["pack"]["c-float16"]["move"] = True
    document["train"]["r"]["max_steps"] = 1
    del document["eval"]
    file = write(tmp_path / "p.yaml", document)
    run_stages(file, tmp_path / "home", program)
    assert open_cache(tmp_path / "home" / "caches" / "c").units("v000") == []

    done, _ = run_stages(file, tmp_path / "home", ["/bin/false"])

    assert all(one.is_skipped for one in done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "moment"),
    [
        ([], "caches/c/receipts/v000/*.json"),
        (["images", "caches", "packs"], "runs/r/checkpoints/step-*"),
        (["images", "caches", "packs"], "runs/r/student.*"),
    ],
)
def test_killed_in_any_stage_and_run_again_it_gives_the_same_student(
    finished: tuple[Path, list[Done]], tmp_path: Path, program: list[str], kept: list[str], moment: str
) -> None:
    folder, _ = finished
    file, home = write(tmp_path / "p.yaml", small()), tmp_path / "home"
    for name in kept:
        _copy(folder / "home" / name, home / name)

    _kill_when(file, home, lambda: any(home.glob(moment)))
    done, _ = run_stages(file, home, program)

    assert _student(tmp_path) == _student(folder)
    assert sum(one.is_skipped for one in done) >= 2
    assert not done[-1].is_skipped


def _kill_when(file: Path, home: Path, is_so: Callable[[], bool]) -> None:
    """Run the command, kill it without warning when something is so, and see its stage end too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "proteus_cache", "pipeline", str(file), "--quiet"],
        env=os.environ | {"PROTEUS_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not is_so():
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until_alone(process.pid)


def wait_until_alone(session: int) -> None:
    """Nobody of a session is left, in a few seconds at the latest."""
    deadline = time.monotonic() + 10
    while processes_of_session(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of_session(session) == []
