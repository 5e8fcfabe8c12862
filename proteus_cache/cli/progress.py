"""How far a long command is: one line that repaints itself in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from proteus_cache.cli import look
from proteus_cache.plan.human import human_bytes, human_rate, human_time

if TYPE_CHECKING:
    from rich.console import RenderableType

_RATE_PERIOD_S = 300.0
"""Rate and time left follow so many seconds: a step of a large student takes longer than a shorter look back."""
_SAMPLE_S = 1.0
_LINE_S = 30.0
"""A log gets no two lines within so many seconds ..."""
_PARTS = 10
"""... and one for each of so many parts of the work ..."""
_SILENCE_S = 600.0
"""... or where so much time has passed, so that a night's log shows life."""
_REPAINTS_PER_S = 8
_BAR_COLUMNS = (8, 40)
_FREE_COLUMNS = 3
"""Right of the line, for the ^C that a terminal prints: it must not wrap."""
_ERASE_LINE = "\r\x1b[2K"


class Update(Protocol):
    """Says how far the work is."""

    def __call__(self, done: float, total: float, n_bytes: int = 0, *, detail: str | None = None) -> None:
        """
        Args:
            done: units so far, those of earlier starts included.
            total: units in all.
            n_bytes: bytes so far; 0 where none are counted.
            detail: shown instead of the rates that follow from `done` and `n_bytes`.
        """


class _Meter:
    """Counts, rates over the last minutes, and time left; rates count from the first call."""

    def __init__(self, unit: str) -> None:
        self.done = self.total = 0.0
        self._unit = unit
        self._detail: str | None = None
        self._seen: deque[tuple[float, float, int]] = deque()

    def update(self, done: float, total: float, n_bytes: int = 0, *, detail: str | None = None) -> None:
        now = time.monotonic()
        self.done, self.total, self._detail = done, total, detail
        if len(self._seen) > 1 and now - self._seen[-2][0] < _SAMPLE_S:
            self._seen.pop()
        self._seen.append((now, done, n_bytes))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_PERIOD_S:
            self._seen.popleft()

    @property
    def share(self) -> float | None:
        """0 to 1, or None before anything is known."""
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def counts(self) -> str:
        return f"{self.done:,.0f}/{self.total:,.0f} {self._unit}" if self.total else ""

    @property
    def detail(self) -> str:
        """What was given, else units and bytes a second."""
        if self._detail is not None:
            return self._detail
        seconds, n_done, n_bytes = self._gone()
        if seconds <= 0 or n_done <= 0:
            return ""
        per_s = [] if self._unit == "MB" else [f"{human_rate(n_done / seconds)} {self._unit}/s"]
        n_bytes = round(n_done * 1e6) if self._unit == "MB" else n_bytes
        return ", ".join(per_s + ([f"{human_bytes(n_bytes / seconds)}/s"] if n_bytes > 0 else []))

    @property
    def left(self) -> str:
        """Time left at this rate, counted from the last call on."""
        seconds, n_done, _ = self._gone()
        if seconds <= 0 or n_done <= 0 or self.done >= self.total:
            return ""
        waited_s = time.monotonic() - self._seen[-1][0]
        return f"{human_time(max((self.total - self.done) * seconds / n_done - waited_s, 0))} left"

    def _gone(self) -> tuple[float, float, int]:
        """Seconds, units and bytes between the oldest call that is remembered and the last."""
        if len(self._seen) < 2:
            return 0.0, 0.0, 0
        (began, first, first_bytes), (now, last, last_bytes) = self._seen[0], self._seen[-1]
        return now - began, last - first, last_bytes - first_bytes


@contextmanager
def progress(label: str, unit: str, shown: bool = True) -> Iterator[Update]:
    """Show how far something is, with rate and time left.

    In a terminal one line is repainted and erased at the end. Elsewhere, and where TERM=dumb, a plain line is
    written every tenth of the work, at most one in 30 s and at least one in 10 min. `--quiet` shows nothing.

    Args:
        label: what goes on.
        unit: what is counted; "MB" for bytes in millions.
        shown: False in processes that leave the line to another one.

    Yields:
        What to call when something is done.
    """
    meter = _Meter(unit)
    if not shown or look.is_quiet():
        yield meter.update
    elif look.is_live(sys.stderr):
        with _painted(label, meter):
            yield meter.update
    else:
        yield _Log(label, meter).update


@contextmanager
def phases(shown: bool = True) -> Iterator[Callable[[str, str], Update]]:
    """As `progress`, for work in several phases: the line of one ends where the next begins.

    Args:
        shown: as in `progress`.

    Yields:
        From the label of a phase and what is counted in it to what to call when something is done.
    """
    with ExitStack() as line:
        at: tuple[str, Update] | None = None

        def phase(label: str, unit: str) -> Update:
            nonlocal at
            if at is None or at[0] != label:
                line.close()
                at = label, line.enter_context(progress(label, unit, shown))
            return at[1]

        yield phase


class _Log:
    """Plain lines, few of them."""

    def __init__(self, label: str, meter: _Meter) -> None:
        self._label = label
        self._meter = meter
        self._said_at = time.monotonic()
        self._said_part: int | None = None

    def update(self, done: float, total: float, n_bytes: int = 0, *, detail: str | None = None) -> None:
        self._meter.update(done, total, n_bytes, detail=detail)
        share, now = self._meter.share or 0.0, time.monotonic()
        part = int(share * _PARTS + 1e-9)
        if self._said_part is None:
            self._said_part = part
        silent_s = now - self._said_at
        if silent_s >= _SILENCE_S or (silent_s >= _LINE_S and part > self._said_part):
            self._said_at, self._said_part = now, part
            self._say(share)

    def _say(self, share: float) -> None:
        parts = [f"{self._meter.counts} ({round(100 * share)} %)" if self._meter.total else "", self._meter.detail]
        say(f"{self._label}: " + ", ".join(part for part in [*parts, self._meter.left] if part))


def say(line: str) -> None:
    """A line on stderr. One that nobody reads any more, as of `2>&1 | head`, stops no work."""
    # rich stands in for stderr while a line is painted; else another process may have painted one, or the terminal ^C.
    is_shared = look.is_live(sys.stderr) and sys.stderr is sys.__stderr__
    try:
        sys.stderr.write(f"{_ERASE_LINE if is_shared else ''}{line}\n")
        sys.stderr.flush()
    except OSError:
        pass


@contextmanager
def _painted(label: str, meter: _Meter) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Live(
        get_renderable=lambda: _line(label, meter, console.width - _FREE_COLUMNS),
        console=console,
        refresh_per_second=_REPAINTS_PER_S,
        transient=True,
        redirect_stdout=False,
    ):
        yield


def _line(label: str, meter: _Meter, columns: int) -> RenderableType:
    """The line at this width: what does not fit is left out, the bar first, then rates, time left and counts."""
    from rich.table import Table
    from rich.text import Text

    share, detail, left = meter.share, meter.detail, meter.left
    percent = "" if share is None else f"{round(100 * share)} %"
    ways: tuple[list[str], ...] = ([meter.counts, detail, left], [meter.counts, left], [percent, left], [percent], [])
    texts = [[label, *(text for text in way if text)] for way in ways]
    chosen = next((way for way in texts if len("  ".join(way)) <= columns), [label[: max(columns, 1)]])
    least, most = _BAR_COLUMNS
    room = min(columns - len("  ".join(chosen)) - 2, most)
    cells: list[RenderableType] = [Text(text, style="dim" if text == left else "") for text in chosen]
    if room >= least:
        cells.insert(1, _bar(share, room))
    line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in cells:
        line.add_column(no_wrap=True)
    line.add_row(*cells)
    return line


def _bar(share: float | None, columns: int) -> RenderableType:
    from rich.progress_bar import ProgressBar

    if share is None:  # nothing is counted yet: the bar moves to show life
        return ProgressBar(total=None, width=columns, pulse_style="cyan")
    return ProgressBar(total=1.0, completed=share, width=columns, complete_style="cyan", finished_style="cyan")
