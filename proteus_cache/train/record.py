"""What the first process of a run writes down: logs while it goes on, the student when it is finished."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Self

from proteus_cache.pack.reader import Pack
from proteus_cache.students.registry import student_metadata
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.progress import Rates
from proteus_cache.train.run_folder import (
    EMA,
    HEADS,
    METRICS,
    STUDENT,
    TENSORBOARD,
    TIMINGS,
    StepLog,
    metric_line,
    write_config,
)
from proteus_cache.train.state import TrainingState
from proteus_cache.train.tensors import replace_tensors

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LIBRARIES = ("proteus-cache", "torch", "timm", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What is known of a step without asking the device."""

    step: int
    """Counted from 1."""
    epoch: int
    """Counted from 0."""
    lr: float


class RunRecord:
    """The logs of a run, opened behind `first_step` (later lines of an earlier start are cut off)."""

    def __init__(self, config: TrainConfig, pack: Pack, precision: str, first_step: int) -> None:
        self._config = config
        self._pack = pack
        write_config(config.out, _sections(config, pack, precision))
        self._metrics = StepLog(config.out / METRICS, first_step)
        self._timings = StepLog(config.out / TIMINGS, first_step)
        self._board = _open_board(config, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._timings.close()
        self._board.close()

    def write(self, results: Sequence[StepResult], rows: Sequence[Sequence[float]], rates: Rates) -> None:
        """Log steps.

        Args:
            results: of the steps, in order.
            rows: (loss, token, feature, patch) of each; NaN for a loss of weight 0.
            rates: over these steps.
        """
        lines = [
            metric_line(result.step, result.epoch, result.lr, row) for result, row in zip(results, rows, strict=True)
        ]
        self._metrics.write(lines)
        if not lines:
            return
        last = results[-1].step
        self._timings.write([{"step": last, "n_steps": len(lines), **rates.to_mapping()}])
        for line, result in zip(lines, results, strict=True):
            for name, value in line.items():
                if name not in ("step", "epoch") and value is not None:
                    self._board.add_scalar(f"train/{name}", value, result.step)
        for name, rate in rates.to_mapping().items():
            self._board.add_scalar(f"rates/{name}", rate, last)

    def sync(self) -> None:
        """Make the logs durable; a checkpoint must not know of steps that they do not."""
        self._metrics.sync()
        self._timings.sync()
        self._board.flush()

    def write_student(self, state: TrainingState, step: int) -> None:
        """Write `student`, `heads` and `ema.safetensors` of a finished run."""
        config, teacher = self._config, self._pack.teacher
        shape = student_metadata(
            config.student,
            size_px=self._pack.side_px,
            patch_px=teacher.patch_px,
            mean=teacher.mean,
            std=teacher.std,
        )
        common = {
            "student": config.student,
            "teacher": teacher.name,
            "steps": str(step),
            "seed": str(config.seed),
            "cache_id": self._pack.cache_id,
            "pack_digest": self._pack.digest,
        }
        share = repr(config.ema_decay**step)
        average = {"weights": "ema", "ema_decay": repr(config.ema_decay), "initialisation_share": share}
        bare = state.bare
        replace_tensors(config.out / STUDENT, bare.student.state_dict(), shape | common | {"weights": "raw"})
        replace_tensors(config.out / HEADS, bare.head_tensors(), common | {"weights": "raw"})
        replace_tensors(config.out / EMA, state.ema.module.state_dict(), shape | common | average)


def _sections(config: TrainConfig, pack: Pack, precision: str) -> dict[str, object]:
    """What `config.yaml` holds. `train` alone makes the run again from this pack."""
    versions = {name: metadata.version(name) for name in _LIBRARIES if _is_installed(name)}
    return {
        "train": config.to_mapping()
        | {"batch_size": config.global_batch, "lr": config.peak_lr, "precision": precision},
        "pack": {
            "cache_id": pack.cache_id,
            "pack_digest": pack.digest,
            "teacher": pack.teacher.name,
            "teacher_weights_sha256": pack.teacher.weights_sha256,
            "views": len(pack.views),
            "targets": {target.name: target.codec.name for target in pack.targets},
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _open_board(config: TrainConfig, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(config.out / TENSORBOARD), purge_step=first_step + 1)
