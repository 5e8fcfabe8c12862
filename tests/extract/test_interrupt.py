"""Ctrl-C and SIGTERM through the command line: one line, exit code 1, nobody left, and the next start goes on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from proteus_cache import open_cache
from proteus_cache.cache.verify import verify_cache
from tests.makers import make_config, run_extract


def processes_of_session(session: int) -> list[str]:
    """Command lines of all living processes of a session, read from /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append((folder / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


@pytest.mark.parametrize(
    ("number", "whom", "processes"),
    [(signal.SIGINT, "group", 1), (signal.SIGTERM, "group", 1), (signal.SIGINT, "one", 2)],
)
def test_an_interrupted_extraction_ends_cleanly(
    tmp_path: Path, number: signal.Signals, whom: str, processes: int
) -> None:
    config = make_config(tmp_path, n_images=40, workers=1)
    command = [
        *(sys.executable, "-m", "proteus_cache", "extract", "--teacher", "vit", "--weights", str(config.weights)),
        *("--images", str(config.images), "--out", str(config.out), "--device", "cpu", "--gpus", str(processes)),
        *("--shard-size", "4", "--batch-size", "3", "--views", "400", "--workers", "1"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as running:
        try:
            while not list(config.out.glob("receipts/v000/*.json")):
                assert running.poll() is None, running.stderr.read() if running.stderr else ""
                with suppress(subprocess.TimeoutExpired):
                    running.wait(0.05)

            (os.killpg if whom == "group" else os.kill)(running.pid, number)
            out, errors = running.communicate(timeout=60)

            deadline = time.monotonic() + 2
            while (left := processes_of_session(running.pid)) and time.monotonic() < deadline:
                os.sched_yield()
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)

    said = [line for line in errors.decode().splitlines() if line.startswith("proteus-cache:")]
    assert (running.returncode, out, left) == (1, b"", [])
    stopping = ["stopping 2 processes" in line for line in said]
    assert stopping == ([True, False] if processes == 2 else [False]), said
    assert "interrupted; finished units are kept; to go on: proteus-cache extract --teacher vit" in said[-1]
    assert b"Traceback" not in errors
    assert b"Error" not in errors
    done = sum(len(open_cache(config.out).units(view)) for view in ("v000", "v001"))
    assert run_extract(make_config(tmp_path, shard_size=4, workers=0, views=2)).units_committed == 20 - done
    assert verify_cache(config.out, read_data=True) == []
