"""What a person sees: the progress line, the last words after a signal, a stdout that takes no more."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from proteus_cache.cli import ranks, terminal

_PROGRESS = """
from proteus_cache.cli import terminal
with terminal.progress("work", "views") as update:
    for done in range(1, 5):
        update(done, 4, done * 1000)
        import time; time.sleep(0.15)
"""

_SLEEPER = """
import multiprocessing, sys, time, typer
from proteus_cache.cli import terminal

@terminal.command("run it again")
def sleeper():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    child.join()

try:
    sleeper()
except typer.Exit as leaving:
    sys.exit(leaving.exit_code)
"""


def in_terminal(code: str, **environment: str) -> str:
    """What Python code writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"} | environment,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


def test_progress_shows_count_and_rate_and_is_gone_at_the_end() -> None:
    written = in_terminal(_PROGRESS)

    assert "4/4 views" in written
    assert "views/s" in written
    assert "KB/s" in written
    assert written.rstrip().endswith("\x1b[2K"), "the line is erased"


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}])
def test_a_terminal_that_cannot_erase_gets_no_progress(environment: dict[str, str]) -> None:
    assert in_terminal(_PROGRESS, **environment) == ""


def test_a_pipe_gets_no_progress() -> None:
    outcome = subprocess.run([sys.executable, "-c", _PROGRESS], capture_output=True, check=True)

    assert (outcome.stdout, outcome.stderr) == (b"", b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_one_line_and_exit_1_and_leaves_no_child(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())

    process.send_signal(number)
    _, errors = process.communicate(timeout=20)

    assert (process.returncode, errors) == (1, "proteus-cache: interrupted; run it again\n")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_takes_no_more_is_one_line() -> None:
    code = "from proteus_cache.cli import terminal; terminal.command('')(terminal.result)(True, {}, [])"
    with open("/dev/full", "w") as full:
        outcome = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)

    assert outcome.stderr.startswith("proteus-cache: standard output: cannot write: No space left on device\n")


def test_a_killed_rank_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as leaving:
        ranks.start(2, end_rank, signal.SIGKILL)

    assert leaving.value.exit_code == 1
    assert "one of 2 processes was killed by signal 9" in capsys.readouterr().err


def end_rank(number: int) -> None:
    """Runs in a rank."""
    os.kill(os.getpid(), number)


def test_an_interruption_that_python_wrapped_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    @terminal.command("go on")
    def interrupted_import() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    with pytest.raises(typer.Exit) as leaving:
        interrupted_import()

    assert leaving.value.exit_code == 1
    assert capsys.readouterr().err == "proteus-cache: interrupted; go on\n"
