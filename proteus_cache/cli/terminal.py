"""What a person sees: plans and progress on stderr, results on stdout, errors as one line.

Progress shows only where stderr is a terminal. With `--json` the result is one JSON object on stdout.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from proteus_cache.errors import ProteusCacheError, StorageError, UsageError
from proteus_cache.plan import human_bytes

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
"""Exit code of a rank that was interrupted."""
_RATE_PERIOD_S = 300.0
"""The time left follows the rate of so many seconds: a step of a large student takes longer than rich's 30."""


def command(again: str | None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn errors of a command into one line and its exit code; a stack trace is left to our own bugs.

    Args:
        again: what to say after Ctrl-C or SIGTERM; None in a process whose parent says it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            _start_logging()
            previous = signal.signal(signal.SIGTERM, _interrupt)
            try:
                return function(*args, **kwargs)
            except ProteusCacheError as error:
                fail(_with_notes(error), error.exit_code)
            except KeyboardInterrupt:
                _leave_interrupted(again)
            except OSError as error:
                fail(_with_notes(error), 1)
            except (RuntimeError, MemoryError) as error:
                remedy = _memory_remedy(error)
                if _is_interruption(error):
                    _leave_interrupted(again)
                if remedy is None:
                    raise
                fail(remedy, 1)
            finally:
                signal.signal(signal.SIGTERM, previous)
            raise AssertionError("unreachable")

        return run

    return decorate


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _leave_interrupted(again: str | None) -> NoReturn:
    _end_children()
    if again is None:
        raise typer.Exit(INTERRUPTED) from None
    fail(f"interrupted; {again}", 1)


def _is_interruption(error: BaseException) -> bool:
    """Whether an interruption is at the root: Python wraps one that hits while a class is made, as in an import."""
    cause = error.__cause__ or error.__context__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or _is_interruption(cause))


def _end_children() -> None:
    """Kill the worker processes: they hold nothing that is not on disk, and waiting for them takes seconds.

    A second Ctrl-C ends this process at once instead of cutting its last words short.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def _with_notes(error: Exception) -> str:
    """The message and where it happened, in one line."""
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return " ".join([str(error), *(f"({note})" for note in notes)])


def _memory_remedy(error: Exception) -> str | None:
    """What to say when memory ran out; None for any other error."""
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU is out of memory; run again with a smaller --batch-size"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the machine is out of memory; run again with a smaller --batch-size or fewer --workers"
    return None


def fail(message: str, exit_code: int) -> NoReturn:
    """Print one error line and leave."""
    complain(message)
    raise typer.Exit(exit_code)


def complain(message: str) -> None:
    """Print one error line."""
    typer.echo(f"proteus-cache: {printable(message)}", err=True)


def printable(text: str) -> str:
    """`text` with control characters escaped: names of files may hold any."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


class _StderrHandler(logging.Handler):
    """Log lines on whatever stderr is at the moment, so that a progress line is not torn."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(self.format(record))


def _start_logging() -> None:
    """Show our own warnings; the hub client's are about retries, and what comes of them is said once, by us."""
    ours = logging.getLogger("proteus_cache")
    if not ours.handlers:
        ours.addHandler(_StderrHandler(logging.WARNING))
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its parent's level is set on import


def note(lines: str | Iterable[str]) -> None:
    """Say something on stderr."""
    for line in [lines] if isinstance(lines, str) else lines:
        typer.echo(printable(line), err=True)


def result(as_json: bool, value: dict[str, Any], lines: Iterable[str]) -> None:
    """The outcome on stdout: a JSON object, or lines for people.

    Raises:
        StorageError: stdout takes no more, for example because it is a file on a full disk.
    """
    text = json.dumps(value, sort_keys=True, allow_nan=False, default=str) if as_json else "\n".join(lines)
    try:
        typer.echo(printable(text))
    except OSError as error:
        # What is still buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(1) from None
        raise StorageError(f"standard output: cannot write: {error.strerror}") from error


def confirm(question: str, yes: bool) -> None:
    """Ask before something is removed or replaced.

    Raises:
        UsageError: there is no terminal to ask on and no `--yes`.
        ProteusCacheError: the answer is no, or none.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} There is no terminal to ask on: add --yes to agree")
    try:
        agreed = typer.confirm(printable(question), err=True)
    except typer.Abort:
        typer.echo(err=True)
        agreed = False
    if not agreed:
        raise ProteusCacheError("nothing was changed")


@contextmanager
def progress(label: str, unit: str, shown: bool = True) -> Iterator[Callable[[float, float, int], None]]:
    """A progress line with rate and time left; rates count from the first call.

    Args:
        label: what goes on.
        unit: what is counted.
        shown: False in processes that leave the line to another one.

    Yields:
        Call it with (done, all, bytes so far; 0 where none are counted).
    """
    if not (shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
        yield lambda done, total, n_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[counts]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        expand=True,
        speed_estimate_period=_RATE_PERIOD_S,
    )
    first: tuple[float, float, int] | None = None
    with bar:
        task = bar.add_task(label, total=None, counts="", rate="")

        def update(done: float, total: float, n_bytes: int) -> None:
            nonlocal first
            now = time.monotonic()
            if first is None:
                first = (now, done, n_bytes)
            seconds, n_done = now - first[0], done - first[1]
            rate = ""
            if n_done > 0 and seconds > 0:
                per_s = n_done / seconds
                rate = f"{per_s:,.0f} {unit}/s" if per_s >= 100 else f"{per_s:.2g} {unit}/s"
                if n_bytes:
                    rate += f", {human_bytes((n_bytes - first[2]) / seconds)}/s"
            bar.update(task, completed=done, total=total, counts=f"{done:,.0f}/{total:,.0f} {unit}", rate=rate)

        yield update
