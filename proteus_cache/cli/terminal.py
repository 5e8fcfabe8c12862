"""What a person sees: plans and progress on stderr, results on stdout, errors as one line.

Progress shows only where stderr is a terminal. With `--json` the result is one JSON object on stdout.
"""

from __future__ import annotations

import functools
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer

from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.plan import human_bytes

P = ParamSpec("P")
R = TypeVar("R")


def command(again: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn errors of a command into one line and its exit code; a stack trace is left to our own bugs.

    Args:
        again: what to say after Ctrl-C or SIGTERM.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            _start_logging()
            previous = signal.signal(signal.SIGTERM, _interrupt)
            try:
                return function(*args, **kwargs)
            except ProteusCacheError as error:
                fail(str(error), error.exit_code)
            except KeyboardInterrupt:
                fail(f"interrupted; {again}", 1)
            except BrokenPipeError:
                sys.stderr.close()
                raise typer.Exit(1) from None
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                fail("the GPU is out of memory; run again with a smaller --batch-size", 1)
            finally:
                signal.signal(signal.SIGTERM, previous)
            raise AssertionError("unreachable")

        return run

    return decorate


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def fail(message: str, exit_code: int) -> None:
    """Print one error line and leave."""
    typer.echo(f"proteus-cache: {printable(message)}", err=True)
    raise typer.Exit(exit_code)


def printable(text: str) -> str:
    """`text` with control characters escaped: names of files may hold any."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _start_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="proteus-cache: %(message)s", stream=sys.stderr)


def note(lines: str | Iterable[str]) -> None:
    """Say something on stderr."""
    for line in [lines] if isinstance(lines, str) else lines:
        typer.echo(printable(line), err=True)


def result(as_json: bool, value: dict[str, Any], lines: Iterable[str]) -> None:
    """The outcome on stdout: a JSON object, or lines for people."""
    if as_json:
        typer.echo(json.dumps(value, sort_keys=True, allow_nan=False, default=str))
    else:
        for line in lines:
            typer.echo(printable(line))


def confirm(question: str, yes: bool) -> None:
    """Ask before something is removed or replaced.

    Raises:
        UsageError: the answer is no, or there is no terminal to ask on and no `--yes`.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} There is no terminal to ask on: add --yes to agree")
    if not typer.confirm(printable(question), err=True):
        raise UsageError("nothing was changed")


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[float, float, int], None]]:
    """A progress line with rate and time left.

    Yields:
        Call it with (done, all, bytes so far; 0 where none are counted).
    """
    if not sys.stderr.isatty():
        yield lambda done, total, n_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )
    started = time.monotonic()
    first: float | None = None
    with bar:
        task = bar.add_task(label, total=1, rate="")

        def update(done: float, total: float, n_bytes: int) -> None:
            nonlocal first
            if first is None:
                first = done
            seconds = max(time.monotonic() - started, 1e-6)
            rate = f"{(done - first) / seconds:,.1f} {unit}/s"
            if n_bytes:
                rate += f", {human_bytes(n_bytes / seconds)}/s"
            bar.update(task, completed=done, total=total, rate=rate)

        yield update
