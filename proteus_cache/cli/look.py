"""The look of what a person reads: colour, dim labels, bold next steps, and whether anything but results is wanted.

Everything here asks the stream it writes to: a pipe, a file, `NO_COLOR` or `TERM=dumb` get plain text.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

import typer

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_LABEL = re.compile(r"[a-z](?=.{9})[a-z0-9 ]{0,7} {2,}(?=\S)")
_LABEL_WIDTH = 10
_NEXT = "next: "
_NARROW = 40
"""In fewer columns the text beside a label goes on below it."""


@contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Inside, only errors, warnings and results are shown; a command that calls another one keeps its choice."""
    token = _quiet.set(_quiet.get() or is_quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether plans, progress and advice are unwanted."""
    return _quiet.get()


def is_live(stream: TextIO) -> bool:
    """Whether a line on this stream can be erased and written anew."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colour(stream: TextIO) -> bool:
    """Whether to colour text on this stream (https://no-color.org)."""
    return is_live(stream) and not os.environ.get("NO_COLOR")


def dressed(line: str, stream: TextIO) -> str:
    """A line of a plan or result as it is written to `stream`: label dim, next step bold, wrapped under its label."""
    if not is_live(stream):
        return line
    if line.startswith(_NEXT):
        return typer.style(line, bold=True) if has_colour(stream) else line
    label = _LABEL.match(line)
    if label is None or label.end() != _LABEL_WIDTH:
        return line
    shown = label[0] if shutil.get_terminal_size().columns >= _NARROW else f"{label[0].rstrip()}  "
    indent = " " * len(label[0]) if shown == label[0] else "  "
    text = textwrap.fill(
        line[_LABEL_WIDTH:],
        shutil.get_terminal_size().columns,
        initial_indent=" " * len(shown),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return (typer.style(shown, dim=True) if has_colour(stream) else shown) + text[len(shown) :]


def marked(prefix: str, stream: TextIO, *, is_error: bool) -> str:
    """The prefix of an error (red) or a warning (yellow)."""
    return typer.style(prefix, fg="red" if is_error else "yellow", bold=True) if has_colour(stream) else prefix
