"""The launch files, with a small cluster made of a few lines of shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from proteus_cache.cache.reader import open_cache
from proteus_cache.processes import free_port
from tests.makers import make_images
from tests.pipeline.test_run import wait_until_alone

LAUNCH: Final = Path(__file__).parents[2] / "pipelines" / "launch"
FILES: Final = sorted(LAUNCH.iterdir())

_SRUN = """#!/usr/bin/env bash
# Starts its tasks on this machine, passes signals on, and ends with the highest status.
while [[ $1 == --* ]]; do shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    while true; do
        wait "$pid"
        status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    if [ "$status" -gt "$highest" ]; then highest=$status; fi
done
exit "$highest"
"""
_SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; echo other; else echo "$@" >>"$PROTEUS_HOME/scontrol"; fi
"""
_COMMAND = f"""#!/bin/sh
exec "{sys.executable}" -m proteus_cache "$@"
"""


class Cluster:
    """A folder with the programs of a cluster, and jobs on it."""

    def __init__(self, folder: Path, program: list[str]) -> None:
        self.home = folder / "home"
        self._quick = Path(program[0]).parent
        self._programs = folder / "bin"
        self._programs.mkdir()
        self.home.mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("proteus-cache", _COMMAND)):
            (self._programs / name).write_text(text)
            (self._programs / name).chmod(0o755)

    def start(self, name: str, *, is_quick: bool = False, **environment: object) -> subprocess.Popen[str]:
        """Start a launch file as SLURM would; quick commands are not paid for their imports, and hear no signal."""
        programs = [*([self._quick] if is_quick else []), self._programs, Path(sys.executable).parent]
        path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
        given = {"PATH": path, "PROTEUS_HOME": self.home, "SLURM_JOB_ID": 7, "SLURM_NTASKS": 1, "SLURM_NNODES": 1}
        return subprocess.Popen(
            ["bash", str(LAUNCH / name)],
            env=os.environ | {key: str(value) for key, value in (given | environment).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, **environment: object) -> str:
        """Run a launch file to its good end, with quick commands; returns what it printed."""
        process = self.start(name, is_quick=True, **environment)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        assert "Traceback" not in printed
        return printed


@pytest.fixture
def cluster(tmp_path: Path, program: list[str]) -> Cluster:
    return Cluster(tmp_path, program)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pack. Not to be changed."""
    from tests.cli.running import run
    from tests.makers import make_cache

    cache = make_cache(tmp_path_factory.mktemp("cache"), 24)
    run("pack", cache.path, "--out", cache.path.parent / "pack", "--workers", 1)
    return cache.path.parent / "pack"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_every_file_is_valid_shell(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    checker = shutil.which("shellcheck")
    if checker is not None:
        subprocess.run([checker, str(file)], check=True)
    assert max(map(len, file.read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", ["extract_array.sbatch", "train_nodes.sbatch"])
def test_a_job_asks_for_a_signal_and_to_be_requeued(name: str) -> None:
    options = [line for line in (LAUNCH / name).read_text().splitlines() if line.startswith("#SBATCH ")]

    asked = {line.removeprefix("#SBATCH --").partition("=")[0] for line in options}
    assert {"signal", "requeue", "time", "output", "open-mode"} <= asked
    assert any("--signal=B:USR1@" in line for line in options)


@pytest.mark.slow
def test_tasks_of_an_array_extract_disjoint_units_of_one_cache(cluster: Cluster, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 16)
    environment: dict[str, object] = {
        "TEACHER": "demo",
        "VIEWS": 2,
        "EXTRACT_FLAGS": f"--images {images} --shard-size 2 --device cpu --workers 0",
        "SLURM_ARRAY_TASK_COUNT": 2,
        "SLURM_ARRAY_TASK_MIN": 4,
        "SLURM_NTASKS": 2,
    }

    first = cluster.run("extract_array.sbatch", **environment, SLURM_ARRAY_TASK_ID=4)
    cache = open_cache(cluster.home / "caches" / "demo")
    done = {(view, shard) for view in ("v000", "v001") for shard in cache.units(view)}
    stamps = {path: path.stat().st_mtime_ns for path in cache.path.glob("receipts/*/*.json")}
    cluster.run("extract_array.sbatch", **environment, SLURM_ARRAY_TASK_ID=5)

    # 16 units, 4 processes; those of the first task are processes 0 and 1.
    assert done == {(f"v00{number // 8}", number % 8) for number in range(16) if number % 4 in (0, 1)}
    assert cache.complete_views() == ["v000", "v001"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert first.count("teacher   demo") == 1  # one process of a task speaks


@pytest.mark.slow
def test_a_task_whose_time_is_up_goes_back_into_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 300)
    process = cluster.start(
        "extract_array.sbatch",
        TEACHER="demo",
        VIEWS=50,
        EXTRACT_FLAGS=f"--images {images} --shard-size 2 --device cpu --workers 0",
        SLURM_ARRAY_TASK_ID=0,
        SLURM_ARRAY_TASK_COUNT=1,
    )
    receipts = cluster.home / "caches" / "demo" / "receipts"
    _wait_for(process, lambda: any(receipts.glob("*/*.json")))

    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=300)

    assert process.returncode == 0, printed
    assert "the time is up: back into the queue" in printed
    assert (cluster.home / "scontrol").read_text() == "requeue 7\n"
    wait_until_alone(process.pid)


def _wait_for(process: subprocess.Popen[str], is_so: object) -> None:
    assert callable(is_so)
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_training_on_nodes_saves_a_checkpoint_when_its_time_is_up_and_goes_on(cluster: Cluster, pack: Path) -> None:
    run = cluster.home / "runs" / "r"
    environment: dict[str, object] = {
        "STUDENT": "vit_demo",
        "PACK": pack,
        "RUN": run,
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": free_port() - 20_000,  # the port follows from it
    }
    flags = "--device cpu --workers 0 --batch-size 8 --epochs 1000"
    process = cluster.start("train_nodes.sbatch", is_quick=False, **environment, TRAIN_FLAGS=flags)
    metrics = run / "metrics.jsonl"
    _wait_for(process, lambda: metrics.is_file() and metrics.stat().st_size > 0)

    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=300)
    saved = sorted((run / "checkpoints").glob("step-*"))
    steps = _steps(metrics)
    again = cluster.run("train_nodes.sbatch", **environment, TRAIN_FLAGS=f"{flags} --max-steps {steps + 2}")

    assert process.returncode == 0, printed
    assert "stopped by SIGUSR1; the checkpoint of step" in printed
    assert (cluster.home / "scontrol").read_text().startswith("requeue ")
    assert len(saved) == 1
    assert _steps(metrics) == steps + 2
    assert "resumes   after step" in again
    assert (run / "student.safetensors").is_file()


def _steps(metrics: Path) -> int:
    return max(int(json.loads(line).get("step", 0)) for line in metrics.read_text().splitlines())


@pytest.mark.slow
def test_one_machine_makes_cache_pack_and_students_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 16)
    environment: dict[str, object] = {
        "TEACHER": "demo",
        "VIEWS": 1,
        "STUDENTS": "vit_demo",
        "GPUS": 1,  # several processes are started by other tests
        "EXTRACT_FLAGS": f"--images {images} --shard-size 4 --device cpu --workers 0",
        "TRAIN_FLAGS": "--device cpu --workers 0 --batch-size 8 --max-steps 2",
    }

    first = cluster.run("one_machine.sh", **environment)
    again = cluster.run("one_machine.sh", **environment)

    assert "steps     2 of 8 views" in first
    assert len(re.findall(r"proteus-cache (extract|train) .*--gpus 1 ", first)) == 2
    assert (cluster.home / "runs" / "demo-vit_demo" / "student.safetensors").is_file()
    assert "to do     nothing: all 4 units are there" in again
    assert "to do     nothing: the pack is there" in again
    assert "resumes   after step 2" in again
    assert first in (cluster.home / "logs" / "one_machine.log").read_text()


@pytest.mark.slow
def test_torchrun_trains_on_one_node(cluster: Cluster, pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--student", "vit_demo", "--data", pack, "--out", out, "--device", "cpu", "--workers", 0]

    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
            *("-m", "proteus_cache", "train", *map(str, arguments), "--batch-size", "8", "--max-steps", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 processes" in done.stderr
    assert done.stdout.count("step 2, loss") == 1
    assert (out / "student.safetensors").is_file()
