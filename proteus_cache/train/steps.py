"""The steps of a run: compute, fetch losses, write them down, save.

Nothing in a step waits for the GPU: batches, masks and losses move asynchronously, and losses are fetched
`log_every` steps at a time (on a CPU after each). Several processes agree to stop where they fetch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from proteus_cache.devices import or_explain
from proteus_cache.errors import ProteusCacheError
from proteus_cache.train.checkpoint import CheckpointState, write_checkpoint
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.data import BatchReader, TrainingData
from proteus_cache.train.feed import DeviceBatch, DeviceClock, DeviceFeed, cut
from proteus_cache.train.gaps import Gaps
from proteus_cache.train.masking import n_masked_images
from proteus_cache.train.memory import dry_step, smaller_parts
from proteus_cache.train.progress import Progress, RateMeter, ReportProgress
from proteus_cache.train.record import RunRecord, StepResult
from proteus_cache.train.run_folder import CHECKPOINTS, LOSS_NAMES, epoch_losses
from proteus_cache.train.schedule import learning_rate
from proteus_cache.train.source import n_patches
from proteus_cache.train.state import TrainingState, scaler_of, tensors_of
from proteus_cache.train.stopping import StopRequest
from proteus_cache.train.targets import Target


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same through a run."""

    config: TrainConfig
    accelerator: Accelerator
    precision: str
    data: TrainingData
    state: TrainingState
    n_steps: int

    @property
    def counts(self) -> tuple[float, float]:
        """Views and masked views that this process's means run over: its share of the global batch's."""
        ranks = self.accelerator.num_processes
        return self.config.global_batch / ranks, n_masked_images(self.config.global_batch) / ranks


class StepContext(Protocol):
    """What a step needs of a run."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def state(self) -> TrainingState: ...
    @property
    def counts(self) -> tuple[float, float]: ...


def take_step(
    run: StepContext, batch: DeviceBatch, targets_of: Callable[[DeviceBatch], Mapping[str, Target]]
) -> Tensor:
    """One optimiser step.

    Args:
        run: its state changes.
        batch: this process's share of a global batch, on the device.
        targets_of: what the teacher says of the views of a part of the batch, by target name.

    Returns:
        (5,) losses as `Distillation.forward` gives them, still on the device.
    """
    accelerator, state = run.accelerator, run.state
    for group in state.adamw.param_groups:
        group["lr"] = learning_rate(run.config, batch.epoch)
    parts = list(cut(batch, run.config.accumulate))
    total: Tensor | None = None
    for number, part in enumerate(parts, start=1):
        is_last = number == len(parts)
        with nullcontext() if is_last else accelerator.no_sync(state.model):
            losses: Tensor = state.model(
                part.views, targets_of(part), part.masked_MK, part.first_odd, run.counts, part.kept
            )
            accelerator.backward(losses[0])
        total = losses.detach() if total is None else total + losses.detach()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.bare.student)
    assert total is not None
    return total


class Steps:
    """The inner loop with what it counts; one for each start of a run."""

    def __init__(
        self,
        run: Run,
        loader: BatchReader,
        gaps: Gaps | None,
        record: RunRecord | None,
        progress: ReportProgress | None,
        stop: StopRequest,
        first_step: int,
    ) -> None:
        self._run = run
        self._loader = loader
        self._gaps = gaps
        self._record = record
        self._progress = progress
        self._stop = stop
        self._waiting: list[tuple[StepResult, Tensor]] = []
        self._clock = DeviceClock(run.accelerator.device)
        self._meter = RateMeter(run.config.global_batch)
        self._last: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._saved = first_step

    def run(self, first_step: int) -> tuple[int, dict[str, float]]:
        """Steps from `first_step` on; returns how many are done in all, and the losses of the last."""
        run, done = self._run, first_step
        feed = DeviceFeed(self._loader, run.config, n_patches(run.data), run.accelerator.device)
        for batch in feed:
            self._clock.begin()
            losses = self._step_or_explain(batch)
            self._clock.end()
            done = batch.step + 1
            self._waiting.append((StepResult(done, batch.epoch, learning_rate(run.config, batch.epoch)), losses))
            must_save = done % run.config.checkpoint_every == 0 or done == run.n_steps
            must_measure = self._gaps is not None and self._gaps.is_due(done)
            is_border = (
                must_save or must_measure or run.accelerator.device.type == "cpu" or done % run.config.log_every == 0
            )
            must_stop = self._fetch() if is_border else self._stops_alone()
            if must_stop and not is_border:
                self._fetch()
            if must_measure:
                self._measure(done, batch.epoch)
            if must_save or must_stop:
                self._save(done)
            if must_stop:
                break
        return done, self._last

    def _step_or_explain(self, batch: DeviceBatch) -> Tensor:
        run, n_views = self._run, len(batch.views)

        def losses_of(part: DeviceBatch) -> Tensor:
            with run.accelerator.autocast():
                targets = run.data.targets_of(part)
                losses: Tensor = run.state.bare(
                    part.views, targets, part.masked_MK, part.first_odd, run.counts, part.kept
                )
                return losses

        return or_explain(
            lambda: take_step(run, batch, run.data.targets_of),
            -(-n_views // run.config.accumulate),
            lambda n: dry_step(run.state, batch, n, losses_of),
            smaller_parts(run.config, n_views),
        )

    def _measure(self, done: int, epoch: int) -> None:
        """The losses after an epoch, on views of every kind; all processes take part."""
        assert self._gaps is not None
        losses = self._gaps.measure()
        bad = [kind for kind, values in losses.items() if not math.isfinite(values[0])]
        if bad:
            raise ProteusCacheError(
                f"after epoch {epoch} (step {done:,}) the loss on {bad[0].replace('_', '-')} views is not finite: "
                f"the student has diverged; {self._newest(done)}. Start again with a lower --lr or with --precision "
                "fp32, in another --out"
            )
        self._totals = {kind: values[0] for kind, values in losses.items()}
        if self._record is not None:
            self._record.write_epoch(done, epoch, losses)
        if self._run.accelerator.is_main_process:
            self._gaps.warn(epoch_losses(losses))
        self._meter.restart()

    def _stops_alone(self) -> bool:
        """Whether a single process was asked to stop; several agree only where they meet anyway."""
        return self._run.accelerator.num_processes == 1 and self._stop.name is not None

    def _fetch(self) -> bool:
        """Bring the losses that wait to the host and write them down.

        Returns:
            Whether a process was asked to stop.

        Raises:
            ProteusCacheError: a loss is not finite.
        """
        accelerator = self._run.accelerator
        results = [result for result, _ in self._waiting]
        is_asked = self._stop.name is not None
        table = torch.stack([losses for _, losses in self._waiting])
        self._waiting.clear()
        if accelerator.num_processes > 1:
            asked = torch.full_like(table[:1], float(is_asked))
            table = accelerator.reduce(torch.cat((table, asked)), reduction="mean")
        rows: list[list[float]] = table.tolist()
        if accelerator.num_processes > 1:
            is_asked = rows.pop()[0] > 0
        self._write(results, rows)
        return is_asked

    def _write(self, results: list[StepResult], rows: list[list[float]]) -> None:
        """Log fetched losses; a loss that is not finite ends the run."""
        good = next((n for n, row in enumerate(rows) if not math.isfinite(row[0])), len(rows))
        run, last = self._run, results[-1]
        rates = self._meter.read(
            len(rows),
            self._clock.take(),
            run.accelerator.num_processes * self._loader.bytes_read,
            self._loader.waited_s,
        )
        if self._record is not None:
            self._record.write(results[:good], rows[:good], rates)
        if good < len(rows):
            self._end_not_finite(results[good], rows[good])
        self._last = dict(zip(LOSS_NAMES, rows[-1], strict=True))
        if self._progress is not None and run.accelerator.is_main_process:
            self._progress(
                Progress(
                    step=last.step,
                    n_steps=run.n_steps,
                    epoch=last.epoch,
                    lr=last.lr,
                    loss=rows[-1][0],
                    rates=rates,
                    after_epoch=self._totals,
                    time_left_s=(run.n_steps - last.step) * self._meter.seconds_per_step,
                )
            )

    def _end_not_finite(self, result: StepResult, losses: list[float]) -> NoReturn:
        """Keep what there is to look at, and end the run; all processes wait until it is kept."""
        run = self._run
        parts = zip(LOSS_NAMES[1:], losses[1:], run.config.loss_weights, strict=True)
        stated = ", ".join(f"{name.removeprefix('loss_')} {value:g}" for name, value, weight in parts if weight > 0)
        suspects = [""]
        if self._record is not None:
            suspects = [self._record.write_not_finite(result, losses, scaler_of(run.state))]
        if run.accelerator.num_processes > 1:
            broadcast_object_list(suspects)
        raise ProteusCacheError(
            f"the loss of step {result.step:,} is not finite ({stated}){suspects[0]}; {self._newest(result.step - 1)}. "
            "Start again with a lower --lr or with --precision fp32, in another --out"
        )

    def _newest(self, step: int) -> str:
        """What there is to go on from, when the weights after a step gave a loss that is not finite."""
        if not self._saved:
            return "there is no checkpoint yet"
        newest = f"the newest checkpoint is of step {self._saved:,}"
        return f"{newest}, whose weights gave it" if self._saved == step else newest

    def _save(self, done: int) -> None:
        """Write a checkpoint of the steps done, and make the logs up to it durable."""
        run = self._run
        if self._record is not None and done > self._saved:
            self._record.sync()
            state = CheckpointState(
                step=done,
                config=run.config.identity(),
                data=dict(run.data.identity),
                precision=run.precision,
                world_size=run.accelerator.num_processes,
                scaler=scaler_of(run.state),
                files={},
            )
            write_checkpoint(
                run.config.out / CHECKPOINTS,
                state,
                tensors_of(run.state),
                keep=run.config.keep_checkpoints,
                after=self._saved,
            )
        self._saved = done
        self._meter.restart()
