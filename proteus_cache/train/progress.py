"""What a run tells while it goes on: one `Progress` each time losses are fetched, and the rates behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int
    """Steps done."""
    n_steps: int
    """Steps at which this start ends."""
    epoch: int
    """Of the last step, 0-based."""
    lr: float
    loss: float
    rates: Rates
    after_epoch: Mapping[str, float]
    """Losses after the last epoch, by `seen`, `probe` and `held_out`; empty before, and where there are none."""
    time_left_s: float


ReportProgress = Callable[[Progress], None]


class RateMeter:
    """Views and bytes a second since the last reading.

    Args:
        views_per_step: of all processes.
    """

    def __init__(self, views_per_step: int) -> None:
        self._views = views_per_step
        self._began = time.perf_counter()
        self._bytes = 0
        self._waited_s = 0.0
        self.seconds_per_step = 0.0
        """Smoothed over readings."""

    def restart(self) -> None:
        """Leave out the time since the last reading (a checkpoint was written)."""
        self._began = time.perf_counter()

    def read(self, n_steps: int, busy_s: float, bytes_read: int, waited_s: float) -> Rates:
        """Rates of the last `n_steps`.

        Args:
            n_steps: since the last reading.
            busy_s: how long the device computed for them.
            bytes_read: by all processes since the run started.
            waited_s: how long this process waited for its reader since the run started.
        """
        now = time.perf_counter()
        wall_s = max(now - self._began, 1e-9)
        n_bytes, waited = bytes_read - self._bytes, waited_s - self._waited_s
        self._began, self._bytes, self._waited_s = now, bytes_read, waited_s
        busy_s = min(max(busy_s, 1e-9), wall_s)
        old = self.seconds_per_step or wall_s / n_steps
        self.seconds_per_step = old + min(1.0, n_steps / 50) * (wall_s / n_steps - old)
        return Rates(
            seconds_per_step=wall_s / n_steps,
            views_per_s=n_steps * self._views / wall_s,
            gb_per_s_needed=n_bytes / busy_s / 1e9,
            gb_per_s_got=n_bytes / wall_s / 1e9,
            waiting=min(1 - busy_s / wall_s, max(waited, 0.0) / wall_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """One reading of a `RateMeter`."""

    seconds_per_step: float
    views_per_s: float
    gb_per_s_needed: float
    """What the reader would have to deliver for the device never to wait, over all processes."""
    gb_per_s_got: float
    """What it delivered."""
    waiting: float
    """Share of the time that the device stood still while the reader was waited for."""

    def to_mapping(self) -> dict[str, float]:
        """Plain values, six digits."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}
