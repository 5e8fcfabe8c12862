"""Asking a run to stop: Ctrl-C, SIGTERM and SIGUSR1 are heard at the next step border."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens while it is open; the handlers that were there before come back afterwards.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows no
    handlers, nothing is heard.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def name(self) -> str | None:
        """The signal that was heard, such as SIGTERM, or None."""
        return None if self._signal is None else signal.Signals(self._signal).name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with suppress(RuntimeError):  # stderr may be in the middle of a line of ours
                log.warning("stopping after this step, with a checkpoint; a second Ctrl-C leaves at once")
        self._signal = number
