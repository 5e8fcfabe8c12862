"""Training from a pack: the loop that joins loader, student, losses, schedule, checkpoints and logs.

Nothing in a step waits for the GPU: batches, masks and losses move asynchronously, and losses are fetched
`log_every` steps at a time. What a step computes depends on the config, the pack and the step alone, so a run
that was stopped and resumed ends with the same bytes as one that was not (on a CPU; GPUs add in an order of
their own).
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from proteus_cache import storage
from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.pack.loader import Loader, open_loader
from proteus_cache.pack.order import TrainingOrder
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.processes import usable_cores
from proteus_cache.students.registry import build_student
from proteus_cache.train.checkpoint import (
    CheckpointState,
    clear_unfinished,
    load_checkpoint,
    newest_checkpoint,
    write_checkpoint,
)
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.devices import make_accelerator, ranks_here, resolve_device, resolve_precision
from proteus_cache.train.feed import DeviceBatch, DeviceClock, DeviceFeed, cut
from proteus_cache.train.masking import n_masked_images
from proteus_cache.train.model import build_distillation
from proteus_cache.train.progress import Progress, RateMeter, ReportProgress
from proteus_cache.train.record import RunRecord, StepResult
from proteus_cache.train.run_folder import CHECKPOINTS, check_run_folder, clear_leftovers, files_to_replace
from proteus_cache.train.schedule import learning_rate
from proteus_cache.train.source import check_targets, n_patches, target_decoder
from proteus_cache.train.state import TrainingState, make_state, restore, scaler_of, tensors_of
from proteus_cache.train.stopping import StopRequest
from proteus_cache.train.targets import TargetDecoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a start of a run ended."""

    out: Path
    first_step: int
    """Steps that were done before this start."""
    steps: int
    """Steps done now."""
    n_steps: int
    """Steps at which the run is finished."""
    stopped_by: str | None
    """The signal that stopped it, or None when it is finished."""
    losses: dict[str, float]
    """Of the last step of this start; empty when none was left to do."""

    @property
    def is_finished(self) -> bool:
        """Whether the student's files are written."""
        return self.steps >= self.n_steps


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays the same through a run."""

    config: TrainConfig
    accelerator: Accelerator
    precision: str
    pack: Pack
    order: TrainingOrder
    decoder: TargetDecoder
    state: TrainingState
    n_steps: int

    @property
    def counts(self) -> tuple[float, float]:
        """Views and masked views that this process's means run over: its share of the global batch's."""
        ranks = self.accelerator.num_processes
        return self.config.global_batch / ranks, n_masked_images(self.config.global_batch) / ranks


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: ReportProgress | None = None,
) -> TrainResult:
    """Train a student, or go on training it.

    One process of a run: a launcher's environment (RANK, WORLD_SIZE, ...) says which. Ctrl-C, SIGTERM or
    SIGUSR1 end it at the next step border with a checkpoint.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in `config.out` that verifies, or start when there is none.
        replace: allow a start to replace the logs of a run that never reached a checkpoint.
        progress: called in the first process each time losses are fetched.

    Raises:
        UsageError: pack, folder and config do not go together; nothing was changed.
        DamageError: the pack, or every checkpoint, is damaged.
        StorageError: a file could not be written; the last checkpoint stands.
        ProteusCacheError: the loss is not finite.
    """
    check_run_folder(config.out, resume=resume)
    replaced = files_to_replace(config.out, resume=resume)
    if replaced and not replace:
        raise UsageError(
            f"{config.out}: starting here replaces {', '.join(replaced)}; give --yes, or choose another --out"
        )
    pack = open_pack(config.data)
    check_targets(pack, config)
    order = pack.training_order(seed=config.seed, batch_size=config.global_batch)
    device = resolve_device(config)
    precision = resolve_precision(config, device)
    accelerator = make_accelerator(device, precision)
    try:
        run = _prepare(config, pack, order, accelerator, precision)
        first_step = _resume(run) if resume else 0
        accelerator.wait_for_everyone()
        return _train(run, first_step, progress)
    finally:
        accelerator.end_training()


def _prepare(
    config: TrainConfig, pack: Pack, order: TrainingOrder, accelerator: Accelerator, precision: str
) -> _Run:
    """Build the student and all that trains it."""
    teacher = pack.teacher
    mean, std = tuple(teacher.mean), tuple(teacher.std)
    student = build_student(
        config.student, size_px=pack.side_px, patch_px=teacher.patch_px, mean=mean, std=std, seed=config.seed
    )
    bare = build_distillation(config, student, teacher_width=teacher.width, mean=mean, std=std)
    state = make_state(bare, config, accelerator)
    decoder = target_decoder(pack, config).to(accelerator.device)
    n_steps = min(config.epochs * order.steps_per_epoch, config.max_steps or math.inf)
    return _Run(config, accelerator, precision, pack, order, decoder, state, int(n_steps))


def _resume(run: _Run) -> int:
    """Load the newest good checkpoint; the first process chooses it.

    Returns:
        Steps done, 0 when there is no checkpoint.
    """
    folder = run.config.out / CHECKPOINTS
    found = newest_checkpoint(folder) if run.accelerator.is_main_process else None
    chosen: list[int | None] = [found.state.step if found else None]
    if run.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    if chosen[0] is None:
        log.info("nothing to resume in out=%s, starting", run.config.out)
        return 0
    checkpoint = found or load_checkpoint(folder, chosen[0])
    _check_identity(run, checkpoint.state)
    restore(run.state, checkpoint)
    log.info("resumed checkpoint=%s step=%d", checkpoint.path, chosen[0])
    return chosen[0]


def _check_identity(run: _Run, state: CheckpointState) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        UsageError: names the first setting that differs.
    """
    now = run.config.identity() | {"precision": run.precision, "pack digest": run.pack.digest}
    then = state.config | {"precision": state.precision, "pack digest": state.pack_digest}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise UsageError(
                f"{run.config.out}: its checkpoint was made with {name} {then.get(name)}, and now it is "
                f"{now.get(name)}; resume with the same settings, or choose another --out"
            )
    if state.world_size != run.accelerator.num_processes:
        log.warning(
            "resumed with processes=%d instead of %d: the same batches, but sums in another order, so last "
            "bits differ",
            run.accelerator.num_processes,
            state.world_size,
        )


def _train(run: _Run, first_step: int, progress: ReportProgress | None) -> TrainResult:
    """All steps that are left, then the files of the finished student."""
    config, accelerator = run.config, run.accelerator
    is_main = accelerator.is_main_process
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        record = None
        if is_main:
            storage.make_folder(config.out)
            clear_unfinished(config.out / CHECKPOINTS)
            clear_leftovers(config.out, is_new=first_step == 0)
            record = stack.enter_context(RunRecord(config, run.pack, run.precision, first_step))
        loader = stack.enter_context(_open_loader(run, first_step))
        steps = _Steps(run, loader, record, progress, stop, first_step)
        done, losses = steps.run(first_step)
        if is_main and record is not None and done >= run.n_steps:
            record.write_student(run.state, done)
    if done < run.n_steps:
        log.warning("stopped by %s after step=%d; go on with --resume", stop.name, done)
    else:
        log.info("finished steps=%d out=%s", done, config.out)
    return TrainResult(
        config.out, first_step, done, run.n_steps, stop.name if done < run.n_steps else None, losses
    )


def _open_loader(run: _Run, first_step: int) -> Loader:
    """The reader of this process's share of every batch that is left."""
    accelerator = run.accelerator
    return open_loader(
        run.pack,
        run.order,
        first_step=first_step,
        last_step=max(first_step, run.n_steps),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        n_workers=n_readers(run.config, ranks_here(accelerator)),
        pin=accelerator.device.type == "cuda",
    )


def n_readers(config: TrainConfig, n_ranks: int) -> int:
    """Reader processes of each rank of a machine: as asked for, or its share of the cores less one."""
    if config.workers is not None:
        return config.workers
    return max(1, usable_cores() // n_ranks - 1)


class _Steps:
    """The inner loop with what it counts."""

    def __init__(
        self,
        run: _Run,
        loader: Loader,
        record: RunRecord | None,
        progress: ReportProgress | None,
        stop: StopRequest,
        first_step: int,
    ) -> None:
        self._run = run
        self._loader = loader
        self._record = record
        self._progress = progress
        self._stop = stop
        self._waiting: list[tuple[StepResult, Tensor]] = []
        self._clock = DeviceClock(run.accelerator.device)
        self._meter = RateMeter(run.config.global_batch)
        self._last: dict[str, float] = {}
        self._saved = first_step

    def run(self, first_step: int) -> tuple[int, dict[str, float]]:
        """Steps from `first_step` on; returns how many are done in all, and the losses of the last."""
        run, done = self._run, first_step
        feed = DeviceFeed(self._loader, run.config, n_patches(run.pack), run.accelerator.device)
        for batch in feed:
            self._clock.begin()
            losses = self._step(batch)
            self._clock.end()
            done = batch.step + 1
            self._waiting.append(
                (StepResult(done, batch.epoch, learning_rate(run.config, batch.epoch)), losses)
            )
            must_save = done % run.config.checkpoint_every == 0 or done == run.n_steps
            is_border = must_save or run.accelerator.device.type == "cpu" or done % run.config.log_every == 0
            must_stop = self._fetch() if is_border else self._stops_alone()
            if must_stop and not is_border:
                self._fetch()
            if must_save or must_stop:
                self._save(done)
            if must_stop:
                break
        return done, self._last

    def _step(self, batch: DeviceBatch) -> Tensor:
        """One optimiser step; returns its four losses, still on the device."""
        run = self._run
        accelerator, state = run.accelerator, run.state
        for group in state.adamw.param_groups:
            group["lr"] = learning_rate(run.config, batch.epoch)
        parts = list(cut(batch, run.config.accumulate))
        total: Tensor | None = None
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            with nullcontext() if is_last else accelerator.no_sync(state.model):
                targets = run.decoder(part.codes)
                losses: Tensor = state.model(part.views, targets, part.masked_MK, part.first_odd, run.counts)
                accelerator.backward(losses[0])
            total = losses.detach() if total is None else total + losses.detach()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.bare.student)
        assert total is not None
        return total

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
            raise ProteusCacheError(self._not_finite(results[good].step, rows[good]))
        self._last = dict(zip(("loss", "loss_token", "loss_feature", "loss_patch"), rows[-1], strict=True))
        if self._progress is not None and run.accelerator.is_main_process:
            self._progress(
                Progress(
                    step=last.step,
                    n_steps=run.n_steps,
                    epoch=last.epoch,
                    lr=last.lr,
                    loss=rows[-1][0],
                    rates=rates,
                    time_left_s=(run.n_steps - last.step) * self._meter.seconds_per_step,
                )
            )

    def _not_finite(self, step: int, losses: list[float]) -> str:
        parts = zip(("token", "feature", "patch"), losses[1:], strict=True)
        stated = ", ".join(f"{name} {value:g}" for name, value in parts)
        saved = (
            f"the checkpoint of step {self._saved:,} is good" if self._saved else "there is no checkpoint yet"
        )
        return (
            f"the loss of step {step:,} is not finite ({stated}); {saved}. Start again with a lower --lr "
            "or with --precision fp32, in another --out"
        )

    def _save(self, done: int) -> None:
        """Write a checkpoint of the steps done, and make the logs up to it durable."""
        run = self._run
        if self._record is not None and done > self._saved:
            self._record.sync()
            state = CheckpointState(
                step=done,
                config=run.config.identity(),
                cache_id=run.pack.cache_id,
                pack_digest=run.pack.digest,
                precision=run.precision,
                world_size=run.accelerator.num_processes,
                scaler=scaler_of(run.state),
                files={},
            )
            write_checkpoint(
                run.config.out / CHECKPOINTS, state, tensors_of(run.state), keep=run.config.keep_checkpoints
            )
        self._saved = done
        self._meter.restart()
