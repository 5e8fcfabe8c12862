"""What a training run reads, how long it takes where that is known, and the plan that it opens with."""

from __future__ import annotations

from dataclasses import dataclass

from proteus_cache.plan.human import human_bytes, human_rate, human_time
from proteus_cache.plan.rates import Rate
from proteus_cache.storage import Free


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSize:
    """A run from its first step to its last."""

    views_per_epoch: int
    """That an epoch draws from; what does not fill a batch is dropped."""
    batch_size: int
    """Over all processes."""
    n_steps: int
    bytes_per_view: float
    """Of a sample in its tar: codes, view, document, headers."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.views_per_epoch // self.batch_size

    @property
    def n_views(self) -> int:
        """Views that pass through the student."""
        return self.n_steps * self.batch_size

    @property
    def bytes_per_step(self) -> int:
        """Read for one batch, on average."""
        return round(self.batch_size * self.bytes_per_view)

    @property
    def bytes_to_read(self) -> int:
        """Over all steps."""
        return self.n_steps * self.bytes_per_step

    def seconds(self, views_per_s: float) -> float:
        """Of all steps at this rate."""
        return self.n_views / views_per_s

    def bytes_per_s(self, views_per_s: float) -> float:
        """That the reader must deliver at this rate."""
        return self.bytes_per_view * views_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """A run that is about to start."""

    student: str
    parameters: int
    """Of the student, without heads."""
    views: int | None
    """Stored views in the pack, the probe left out; None for fresh views."""
    size: TrainingSize
    checkpoint_bytes: int
    bytes_to_write: int
    """Largest at any time: the checkpoints that are kept, one more while it is written, and the results."""
    free: Free
    processes: int
    gpu: str | None
    """Title of the GPUs that it runs on, where their rates are known."""
    rate: Rate | None
    """Of one of them; None where nothing is known of the device."""

    def lines(self) -> list[str]:
        """For people."""
        inodes = "" if self.free.inodes is None else f", {self.free.inodes:,} inodes"
        share = "" if self.processes == 1 else f" on {self.processes} processes"
        size = self.size
        views = "fresh views of every image" if self.views is None else f"{self.views:,} views"
        return [
            f"student   {self.student}, {self.parameters / 1e6:.2f} M parameters",
            f"data      {views}, {size.views_per_epoch:,} in an epoch",
            f"steps     {size.n_steps:,} of {size.batch_size:,} views{share}, {size.steps_per_epoch:,} in an epoch",
            f"reads     {human_bytes(size.bytes_per_step)} a step, {human_bytes(size.bytes_to_read)} in all",
            *self._rate_lines(),
            f"writes    {human_bytes(self.bytes_to_write)}, {human_bytes(self.checkpoint_bytes)} a checkpoint",
            f"free      {human_bytes(self.free.bytes)}{inodes}",
        ]

    def _rate_lines(self) -> list[str]:
        """What these GPUs need from the reader and how long they take, where that is known."""
        if self.rate is None or self.rate.views_per_s is None:
            return []
        views_per_s = self.processes * self.rate.views_per_s
        needed = human_bytes(self.size.bytes_per_s(views_per_s))
        return [
            f"needs     {needed}/s from the reader to keep {self.processes} x {self.gpu} busy "
            f"({human_rate(views_per_s)} views/s)",
            f"time      {human_time(self.size.seconds(views_per_s))} then; {self.rate.source}",
        ]
