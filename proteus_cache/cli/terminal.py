"""What a person sees: plans, progress and advice on stderr, results on stdout, errors as one line.

With `--json` the result is one JSON object on stdout. With `--quiet` stderr holds errors and warnings only.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, NoReturn, ParamSpec, Self, TypeAlias, TypeVar

import typer

from proteus_cache.cli import forget_interruption, look
from proteus_cache.cli.progress import Update as Update
from proteus_cache.cli.progress import phases as phases
from proteus_cache.cli.progress import progress as progress
from proteus_cache.cli.progress import say
from proteus_cache.errors import ProteusCacheError, StorageError, UsageError
from proteus_cache.next_steps import command_line
from proteus_cache.text import printable

P = ParamSpec("P")
R = TypeVar("R")

OUTPUT = "Output"
"""Panel of the options that every command has."""
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=OUTPUT)
]
Quiet: TypeAlias = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No plan, progress or advice: errors and the result.", rich_help_panel=OUTPUT),
]
"""Every command takes it as `quiet`; `command` acts on it."""

_JUST_NOW_S = 10.0
INTERRUPTED = 130
"""Exit code of a rank that was interrupted."""

_LOST_OTHERS = ("DistBackendError", "DistNetworkError")
"""What torch.distributed raises; its other back end, gloo, raises a bare RuntimeError."""

_arguments: ContextVar[tuple[str, ...] | None] = ContextVar("arguments", default=None)
_is_stage: ContextVar[bool] = ContextVar("is_stage", default=False)


@contextmanager
def started_with(arguments: Sequence[str]) -> Iterator[None]:
    """Inside, `again_command` knows how this process was called."""
    token = _arguments.set(tuple(arguments))
    try:
        yield
    finally:
        _arguments.reset(token)


@contextmanager
def as_stage() -> Iterator[None]:
    """Inside, a command is a stage of a pipeline, which says itself how to go on after an interruption."""
    token = _is_stage.set(True)
    try:
        yield
    finally:
        _is_stage.reset(token)


def is_stage() -> bool:
    """Whether a pipeline started this command."""
    return _is_stage.get()


def again_command(*flags: str, without: str | None = None) -> str | None:
    """This command as it was typed, with `flags` added; None where a launcher or another program started it.

    Args:
        flags: that it needs, unless they stand there already.
        without: a flag to leave out.
    """
    from proteus_cache.processes import worker_from_environment

    arguments = _arguments.get()
    if arguments is None or worker_from_environment() is not None:
        return None
    kept = [argument for argument in arguments if argument != without]
    return command_line(*kept, *(flag for flag in flags if flag not in kept))


def command(again: str | None, *, go_on: tuple[str, ...] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn errors of a command into one line and its exit code; a stack trace is left to our own bugs.

    Args:
        again: what to say after Ctrl-C or SIGTERM; None in a process whose parent says it.
        go_on: flags that the same command needs then; `again` ends where the whole command can follow.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            _start_logging()
            with _Signals() as signals, look.quiet(bool(kwargs.get("quiet"))):
                try:
                    return function(*args, **kwargs)
                except typer.Exit:
                    raise
                except KeyboardInterrupt:
                    _leave_interrupted(again, go_on)
                except Exception as error:
                    if signals.came_just_now:  # some imports swallow an interruption, and break further on
                        _leave_interrupted(again, go_on)
                    _explain(error)
                    raise

        return run

    return decorate


class _Signals:
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, and are remembered.

    A second one that meets a finaliser, while the first one unwinds the work, prints no stack trace.
    """

    def __init__(self) -> None:
        self._came_at = -math.inf

    @property
    def came_just_now(self) -> bool:
        """Whether one of them came in the last seconds."""
        return time.monotonic() - self._came_at < _JUST_NOW_S

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        self._print_ignored, sys.unraisablehook = sys.unraisablehook, self._pass_interruption
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._print_ignored
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._hear:  # the last words of a command leave SIGINT to the system
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        self._came_at = time.monotonic()
        raise KeyboardInterrupt

    def _pass_interruption(self, ignored: sys.UnraisableHookArgs) -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            self._print_ignored(ignored)


def _leave_interrupted(again: str | None, go_on: tuple[str, ...] | None) -> NoReturn:
    forget_interruption()
    _end_children()
    if again is None or is_stage():
        raise typer.Exit(INTERRUPTED) from None
    fail(f"interrupted; {again}{_how_to_go_on(go_on)}", 1)


def _how_to_go_on(go_on: tuple[str, ...] | None) -> str:
    if go_on is None:
        return ""
    same = again_command(*go_on)
    added = f" with {' '.join(go_on)}" if go_on else ""
    return f": {same}" if same else f", run the same command again{added}"


def _explain(error: Exception) -> None:
    """Print what a user can make or meet, and leave; return for anything else: that is a bug of ours."""
    if isinstance(error, ProteusCacheError):
        fail(_with_notes(error), error.exit_code)
    if isinstance(error, OSError):
        fail(_where_and_why(error), 1)
    if (remedy := _memory_remedy(error)) is not None:
        fail(remedy, 1)
    if _has_lost_others(error):
        fail("another process of this run ended, so this one stops too; that one has said why, here or in its log", 1)


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


def _has_lost_others(error: Exception) -> bool:
    """Whether a sum over all processes failed, as it does when one of them is gone."""
    return type(error).__name__ in _LOST_OTHERS or (
        isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)
    )


def _where_and_why(error: OSError) -> str:
    """What an error of the operating system says, without its number."""
    if error.filename is None or error.strerror is None:
        return _with_notes(error)
    where = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return f"{where}: {error.strerror}; check that the path is right and that this user may use it"


def _memory_remedy(error: Exception) -> str | None:
    """What to say when memory ran out where nobody could tell what would fit; None for any other error."""
    if type(error).__name__ == "OutOfMemoryError":
        from proteus_cache.devices import gpu_memory

        return f"the GPU is out of memory ({gpu_memory()}); free some there, or run again with a smaller --batch-size"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the machine is out of memory; run again with a smaller --batch-size or fewer --workers"
    return None


def fail(message: str, exit_code: int) -> NoReturn:
    """Print one error line and leave."""
    complain(message)
    raise typer.Exit(exit_code)


def complain(message: str) -> None:
    """Print one error line."""
    _speak(message, is_error=True)


def _speak(message: str, *, is_error: bool) -> None:
    say(look.marked("proteus-cache:", sys.stderr, is_error=is_error) + " " + printable(message))


class _StderrHandler(logging.Handler):
    """Log lines on whatever stderr is at the moment, so that a progress line is not torn."""

    def emit(self, record: logging.LogRecord) -> None:
        _speak(self.format(record), is_error=record.levelno >= logging.ERROR)


def _start_logging() -> None:
    """Show our own warnings; the hub client's are about retries, and what comes of them is said once, by us."""
    ours = logging.getLogger("proteus_cache")
    if not ours.handlers:
        ours.addHandler(_StderrHandler(logging.WARNING))
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its parent's level is set on import


def note(lines: str | Iterable[str]) -> None:
    """Say something on stderr, unless `--quiet` is given."""
    if look.is_quiet():
        return
    for line in [lines] if isinstance(lines, str) else lines:
        say(look.dressed(printable(line), sys.stderr))


def result(as_json: bool, value: dict[str, Any], lines: Iterable[str], next_step: str | None = None) -> None:
    """The outcome on stdout: a JSON object, or lines for people.

    Args:
        as_json: which of the two.
        value: the object.
        lines: the lines; a line break in one, which can only come from a name, is escaped.
        next_step: what to do now, a command if it can be; the last line, which neither JSON nor `--quiet` have.

    Raises:
        StorageError: stdout takes no more, for example because it is a file on a full disk.
    """
    if as_json:
        text = json.dumps(value, sort_keys=True, allow_nan=False, default=str)
    else:
        advice = [f"next: {next_step}"] if next_step and not look.is_quiet() else []
        text = "\n".join(look.dressed(printable(line), sys.stdout) for line in [*lines, *advice])
    try:
        typer.echo(text)
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
