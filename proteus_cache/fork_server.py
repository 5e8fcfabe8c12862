"""Imported by the fork server of the rendering processes and by nothing else: it keeps them silent when they lose
their parent.

When a run ends early, a worker may just be starting or handing over a batch, and finds that pipes and semaphores are
gone. The parent knows; a stack trace for each worker tells its user nothing. An error in the work itself never
comes here: the loader catches it and sends it to the parent.
"""

from __future__ import annotations

import sys
from types import TracebackType


def report_unless_lost(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a stack trace, unless the error says that the other side of a pipe, file or semaphore is gone."""
    if not issubclass(kind, OSError | EOFError):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report_unless_lost
