"""What a person sees: the progress line, the last words after a signal, a stdout that takes no more."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
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

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_SLEEPER = """
import multiprocessing, sys, time, typer
from proteus_cache.cli import terminal

@terminal.command("run it again")
def sleeper():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    while child.is_alive():  # a signal that comes right before a wait without end is seen only after it
        child.join(0.1)

try:
    sleeper()
except typer.Exit as leaving:
    sys.exit(leaving.exit_code)
"""


def in_terminal(code: str, columns: int = 100, **environment: str) -> str:
    """What Python code writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    outside = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=outside | {"TERM": "xterm-256color"} | environment,
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
    assert "views/s, " in written
    assert "KB/s" in written
    assert " left" in written
    assert written.rstrip().endswith("\x1b[2K"), "the line is erased"


@pytest.mark.parametrize("columns", [100, 40, 20, 8])
def test_the_progress_line_is_one_line_at_every_width(columns: int) -> None:
    painted = re.split(r"\r\x1b\[2K|\r\n", in_terminal(_PROGRESS, columns))
    lines = [_ESCAPES.sub("", line).rstrip() for line in painted]

    assert any(line.startswith("work"[:columns]) for line in lines)
    assert max(map(len, lines)) < columns
    assert any("100 %" in line or "4/4" in line for line in lines) or columns < 10


def test_a_note_below_a_progress_line_starts_a_line_of_its_own() -> None:
    code = """
from proteus_cache.cli import terminal
with terminal.progress("work", "views") as update:
    update(1, 4)
    import time; time.sleep(0.3)
    terminal.note("targets   cls")
    terminal.complain("bad")
    time.sleep(0.3)
"""
    lines = re.split(r"[\r\n]+", _ESCAPES.sub("", in_terminal(code)))

    assert "targets   cls" in lines
    assert "proteus-cache: bad" in lines


def test_a_log_gets_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    with terminal.progress("extract", "views") as update:
        for done in range(1001):
            now = 3.0 * done  # 3 s a view: a tenth takes 5 min
            update(done, 1000, done * 4000)

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "extract: 100/1,000 views (10 %), 0.333 views/s, 1.33 KB/s, 45 min left"
    assert lines[-1] == "extract: 1,000/1,000 views (100 %), 0.333 views/s, 1.33 KB/s"


def test_a_log_shows_life_however_slow_the_work_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    with terminal.progress("train", "steps") as update:
        for step in range(1, 361):
            now = 20.0 * step
            update(step, 100_000, detail="51 views/s, loss 3.21")

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12  # two hours
    assert lines[0] == "train: 30/100,000 steps (0 %), 51 views/s, loss 3.21, 555 h left"


def test_quiet_leaves_errors_and_results(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    @terminal.command("run it again")
    def work(quiet: bool) -> None:
        nonlocal now
        terminal.note("views     4")
        with terminal.progress("work", "views") as update:
            for now in (0.0, 1000.0, 2000.0):
                update(now, 2000)
        terminal.result(False, {}, ["done"], "rest")
        terminal.complain("but")

    work(quiet=True)
    quiet, now = capsys.readouterr(), 0.0
    work(quiet=False)
    loud = capsys.readouterr()

    assert (quiet.out, quiet.err) == ("done\n", "proteus-cache: but\n")
    assert loud.out == "done\nnext: rest\n"
    assert "views     4" in loud.err
    assert "work: 1,000/2,000 views (50 %)" in loud.err


_DRESSED = """
from proteus_cache.cli import terminal
terminal.note(["views     " + "four " * 12, "to do     nothing", "no label here"])
terminal.complain("gone")
terminal.result(False, {}, ["pack      here"], "proteus-cache info 'a b'")
"""


def test_labels_are_dim_the_next_step_bold_and_errors_red() -> None:
    written = in_terminal(_DRESSED)

    assert "\x1b[2mto do     \x1b[0mnothing" in written
    assert "\x1b[2mpack      \x1b[0mhere" in written
    assert "\x1b[1mnext: proteus-cache info 'a b'\x1b[0m" in written
    assert "\x1b[31m\x1b[1mproteus-cache:\x1b[0m gone" in written


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_none_is_wanted(name: str, value: str) -> None:
    written = in_terminal(_DRESSED, 100, **{name: value})

    assert not re.search(r"\x1b\[[0-9;]*m", written)
    assert "to do     nothing" in written
    assert name == "NO_COLOR" or "\x1b" not in written


def test_text_goes_on_below_itself_in_a_narrow_terminal() -> None:
    lines = _ESCAPES.sub("", in_terminal(_DRESSED, columns=40)).replace("\r", "").splitlines()

    assert lines[:3] == ["views     " + "four " * 5 + "four", " " * 10 + "four " * 5 + "four", "to do     nothing"]


def test_a_pipe_gets_no_colour_and_no_wrapping() -> None:
    outcome = subprocess.run([sys.executable, "-c", _DRESSED], capture_output=True, text=True, check=True)

    assert "\x1b" not in outcome.stdout + outcome.stderr
    assert outcome.stderr.splitlines()[0] == "views     " + "four " * 12


def test_a_terminal_that_cannot_erase_gets_no_progress_of_short_work() -> None:
    assert in_terminal(_PROGRESS, TERM="dumb") == ""


def test_a_pipe_gets_no_progress_of_short_work() -> None:
    outcome = subprocess.run([sys.executable, "-c", _PROGRESS], capture_output=True, check=True)

    assert (outcome.stdout, outcome.stderr) == (b"", b"")


def _is_gone(process: int) -> bool:
    """Whether a process ends within seconds: one that was killed has a number until its new parent asks for it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


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
    assert _is_gone(child)


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


def test_an_interruption_that_an_import_swallowed_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    @terminal.command("go on")
    def interrupted_import() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except BaseException:  # as numpy and others guard optional imports
            raise RecursionError("maximum recursion depth exceeded") from None

    with pytest.raises(typer.Exit) as leaving:
        interrupted_import()

    assert leaving.value.exit_code == 1
    assert capsys.readouterr().err == "proteus-cache: interrupted; go on\n"


def test_a_second_signal_in_a_finaliser_prints_no_stack_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # not pytest's, which keeps it for later

    class Readers:
        def __del__(self) -> None:  # as a loader that waits for its processes
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    @terminal.command("go on")
    def interrupted_twice() -> None:
        readers = Readers()
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            del readers

    with pytest.raises(typer.Exit) as leaving:
        interrupted_twice()

    assert leaving.value.exit_code == 1
    assert capsys.readouterr().err == "proteus-cache: interrupted; go on\n"


def test_the_command_to_go_on_with_is_quoted_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    @terminal.command("checkpoints are kept; to go on", go_on=("--resume",))
    def train() -> None:
        raise KeyboardInterrupt

    for given in (["train", "--data", "my pack"], ["train", "--resume", "--data", "my pack"]):
        with terminal.started_with(given), pytest.raises(typer.Exit):
            train()

    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("checkpoints are kept; to go on: proteus-cache train --data 'my pack' --resume")
    assert second.endswith("checkpoints are kept; to go on: proteus-cache train --resume --data 'my pack'")


def test_under_a_launcher_no_command_is_made_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @terminal.command("checkpoints are kept; to go on", go_on=("--resume",))
    def train() -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with terminal.started_with(["train"]), pytest.raises(typer.Exit):
        train()

    assert capsys.readouterr().err.endswith("to go on, run the same command again with --resume\n")


@pytest.mark.parametrize("arguments", ["--help", "extract --help", "info {pack}", "info {pack}/none", "frobnicate"])
def test_a_reader_that_leaves_early_gets_no_stack_trace(folder: Path, arguments: str) -> None:
    command = f"{sys.executable} -m proteus_cache {arguments.format(pack=folder / 'pack')}"

    ways = (f"{command} | head -1", f"{command} 2>&1 | head -1", f"{command} 2>&1 | true")
    for way in ways:
        outcome = subprocess.run(["sh", "-c", way], capture_output=True, text=True, check=False)
        assert "Traceback" not in outcome.stdout + outcome.stderr
        assert "Exception ignored" not in outcome.stderr


def test_an_error_of_the_system_names_the_file_without_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    @terminal.command("")
    def work() -> None:
        raise PermissionError(13, "Permission denied", "/data/secret")

    with pytest.raises(typer.Exit):
        work()

    assert capsys.readouterr().err.startswith("proteus-cache: /data/secret: Permission denied; check that")


def test_an_interruption_of_code_from_a_string_keeps_the_status(tmp_path: Path) -> None:
    (tmp_path / "make_a_class.py").write_text(
        """
import sys, typer
from proteus_cache.cli import terminal

@terminal.command("go on")
def make_a_class():
    exec("raise KeyboardInterrupt")

try:
    make_a_class()
except typer.Exit as leaving:
    sys.exit(leaving.exit_code)
"""
    )

    outcome = subprocess.run(
        [sys.executable, "-m", "make_a_class"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (outcome.returncode, outcome.stderr) == (1, "proteus-cache: interrupted; go on\n")


def test_the_end_of_another_process_is_no_stack_trace_of_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    @terminal.command(None)
    def reduce() -> None:
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]")

    with pytest.raises(typer.Exit) as leaving:
        reduce()

    assert leaving.value.exit_code == 1
    assert "another process of this run ended, so this one stops too" in capsys.readouterr().err
