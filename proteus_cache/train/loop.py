"""Training from a pack: the joint of loader, student, losses, schedule, checkpoints and logs.

What a step computes depends on the config, the pack and the step alone, so a run that was stopped and resumed ends
with the same bytes as one that was not (on a CPU; GPUs add in an order of their own).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from proteus_cache import storage
from proteus_cache.errors import StorageError, UsageError
from proteus_cache.plan.training import TrainPlan
from proteus_cache.processes import usable_cores
from proteus_cache.students.registry import build_student
from proteus_cache.train.checkpoint import (
    CheckpointState,
    checkpoint_steps,
    clear_unfinished,
    load_checkpoint,
    newest_checkpoint,
)
from proteus_cache.train.config import Precision, TrainConfig
from proteus_cache.train.data import BatchReader, TrainingData
from proteus_cache.train.devices import end_run, make_accelerator, ranks_here, resolve_device, resolve_precision
from proteus_cache.train.fresh import open_fresh
from proteus_cache.train.gaps import Gaps
from proteus_cache.train.model import build_distillation
from proteus_cache.train.planning import check_space, plan_for_data
from proteus_cache.train.progress import ReportProgress
from proteus_cache.train.record import RunRecord
from proteus_cache.train.run_folder import CHECKPOINTS, check_run_folder, clear_leftovers, files_to_replace
from proteus_cache.train.source import student_blocks
from proteus_cache.train.start import with_init_digest
from proteus_cache.train.state import make_state, restore
from proteus_cache.train.steps import Run, Steps
from proteus_cache.train.stopping import StopRequest
from proteus_cache.train.stored import open_stored

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


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    replace: bool = False,
    home: Path = Path("proteus"),
    on_plan: Callable[[TrainPlan], None] | None = None,
    progress: ReportProgress | None = None,
) -> TrainResult:
    """Train a student, or go on training it.

    One process of a run: a launcher's environment (RANK, WORLD_SIZE, ...) says which. Ctrl-C, SIGTERM or
    SIGUSR1 end it at the next step border with a checkpoint.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in `config.out` that verifies, or start when there is none.
        replace: allow a start to replace the logs of a run that never reached a checkpoint.
        home: PROTEUS_HOME, where the weights of a live teacher are kept.
        on_plan: called in the first process with what the run will take, before it starts.
        progress: called in the first process each time losses are fetched.

    Raises:
        UsageError: pack, folder and config do not go together; nothing was changed.
        SpaceError: the checkpoints would not fit; nothing was changed.
        DamageError: the pack, or every checkpoint, is damaged.
        StorageError: a file could not be written; the last checkpoint stands.
        ProteusCacheError: the loss is not finite.
    """
    check_run_folder(config.out, resume=resume)
    config = with_init_digest(config)
    replaced = files_to_replace(config.out, resume=resume)
    if replaced and not replace:
        raise UsageError(
            f"{config.out}: starting here replaces {', '.join(replaced)}; give --yes, or choose another --out"
        )
    data = open_data(config, home)
    device = resolve_device(config)
    precision = resolve_precision(config, device)
    accelerator = make_accelerator(device, precision)
    try:
        plan = plan_for_data(config, data, accelerator.num_processes)
        check_space(config, plan)
        if on_plan is not None and accelerator.is_main_process:
            on_plan(plan)
        run = prepare_run(config, data, accelerator, precision)
        first_step = _resume(run) if resume else 0
        accelerator.wait_for_everyone()
        result = _train(run, first_step, progress)
        accelerator.wait_for_everyone()
    except BaseException:
        # After a failure the others may be gone, and taking the process group apart could wait for them for ever.
        if accelerator.num_processes == 1:
            accelerator.end_training()
        raise
    end_run(accelerator)
    return result


def open_data(config: TrainConfig, home: Path) -> TrainingData:
    """What a run learns from.

    Args:
        config: the run.
        home: PROTEUS_HOME, where a live teacher's weights are kept.

    Raises:
        UsageError: data and config do not go together.
        DamageError: the pack is damaged.
        WeightsError: the weights of a live teacher cannot be had.
    """
    return open_stored(config, home) if config.images is None else open_fresh(config, home)


def prepare_run(config: TrainConfig, data: TrainingData, accelerator: Accelerator, precision: Precision) -> Run:
    """Build the student and all that trains it, on the accelerator's device; nothing is written."""
    teacher = data.teacher
    mean, std = tuple(teacher.mean), tuple(teacher.std)
    student = build_student(
        config.student, size_px=data.side_px, patch_px=teacher.patch_px, mean=mean, std=std, seed=config.seed
    )
    blocks = student_blocks(data, config)
    bare = build_distillation(config, student, teacher_width=teacher.width, mean=mean, std=std, blocks=blocks)
    state = make_state(bare, config, accelerator)
    data.to(accelerator.device, precision)
    return Run(config, accelerator, precision, data, state, config.n_steps(data.order.steps_per_epoch))


def _resume(run: Run) -> int:
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


def _check_identity(run: Run, state: CheckpointState) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        UsageError: names the first setting that differs.
    """
    now = run.config.identity() | {"precision": run.precision, **run.data.identity}
    then = state.config | {"precision": state.precision, **state.data}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise UsageError(
                f"{run.config.out}: its checkpoint was made with {name} {then.get(name)}, and now it is "
                f"{now.get(name)}; resume with the same settings, or choose another --out"
            )
    if state.world_size != run.accelerator.num_processes and run.accelerator.is_main_process:
        log.warning(
            "resumed with processes=%d instead of %d: the same batches, but sums in another order, so last bits differ",
            run.accelerator.num_processes,
            state.world_size,
        )


def _train(run: Run, first_step: int, progress: ReportProgress | None) -> TrainResult:
    """All steps that are left, then the files of the finished student."""
    config, accelerator = run.config, run.accelerator
    is_main = accelerator.is_main_process
    with ExitStack() as stack:
        if is_main:
            stack.enter_context(_says_what_is_kept(config))
        stop = stack.enter_context(StopRequest())
        record = None
        if is_main:
            storage.make_folder(config.out)
            clear_unfinished(config.out / CHECKPOINTS, first_step, keep=config.keep_checkpoints)
            clear_leftovers(config.out, is_new=first_step == 0)
            record = stack.enter_context(RunRecord(config, run.data, run.precision, first_step))
            if first_step == 0 and config.init is not None:
                record.write_start(run.state)
        loader = stack.enter_context(_open_loader(run, first_step))
        steps = Steps(run, loader, _gaps(run), record, progress, stop, first_step)
        done, losses = steps.run(first_step)
        if is_main and record is not None and done >= run.n_steps:
            record.write_student(run.state, done)
    stopped_by = None if done >= run.n_steps else stop.name or "a signal to another process"
    if is_main and stopped_by is not None:
        log.info("stopped by %s after step=%d; go on with --resume", stopped_by, done)
    elif is_main:
        log.info("finished steps=%d out=%s", done, config.out)
    return TrainResult(config.out, first_step, done, run.n_steps, stopped_by, losses)


@contextmanager
def _says_what_is_kept(config: TrainConfig) -> Iterator[None]:
    """Add to an error of the disk which checkpoint is there to go on from."""
    try:
        yield
    except StorageError as error:
        with suppress(StorageError):
            steps = checkpoint_steps(config.out / CHECKPOINTS)
            kept = f"is of step {steps[-1]:,}; go on with --resume" if steps else "is still to come"
            error.add_note(f"the newest checkpoint {kept}")
        raise


def _gaps(run: Run) -> Gaps | None:
    """Measures the losses after epochs; None where there is nothing to tell apart, or it is not wanted."""
    config, accelerator = run.config, run.accelerator
    if config.evaluate_every is None or not run.data.evaluation_orders:
        return None
    n_epochs = config.epochs + config.cooldown_epochs
    workers = n_readers(config, ranks_here(accelerator))
    return Gaps(config, accelerator, run.data, run.state, n_epochs, workers)


def _open_loader(run: Run, first_step: int) -> BatchReader:
    """The reader of this process's share of every batch that is left."""
    accelerator = run.accelerator
    return run.data.open(
        run.data.order,
        range(first_step, max(first_step, run.n_steps)),
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
