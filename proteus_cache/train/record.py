"""What the first process of a run writes down: logs while it goes on, the student when it is finished."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Self

from proteus_cache import storage
from proteus_cache.errors import ProteusCacheError, StorageError
from proteus_cache.students.registry import student_metadata
from proteus_cache.train.board import Board
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.data import TrainingData
from proteus_cache.train.finished import withdraw_finished, write_finished
from proteus_cache.train.progress import Rates
from proteus_cache.train.run_folder import (
    EMA,
    HEADS,
    LOSS_NAMES,
    METRICS,
    NOT_FINITE,
    START,
    STUDENT,
    TENSORBOARD,
    TIMINGS,
    StepLog,
    epoch_line,
    metric_line,
    write_config,
)
from proteus_cache.train.state import TrainingState
from proteus_cache.train.tensors import replace_tensors

_NAMED = 3
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

    def __init__(self, config: TrainConfig, data: TrainingData, precision: str, first_step: int) -> None:
        self._config = config
        self._data = data
        write_config(config.out, _sections(config, data, precision))
        self._metrics = StepLog(config.out / METRICS, first_step)
        self._timings = StepLog(config.out / TIMINGS, first_step)
        self._board = Board(config.out / TENSORBOARD, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in (self._metrics, self._timings, self._board):
            # What ended the run is told, and not that its logs cannot be closed on the same full disk.
            with suppress(StorageError) if error is not None else nullcontext():
                log.close()

    def write(self, results: Sequence[StepResult], rows: Sequence[Sequence[float]], rates: Rates) -> None:
        """Log steps.

        Args:
            results: of the steps, in order.
            rows: (loss, token, feature, patch, block) of each; NaN for a loss of weight 0.
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
            self._board.add(_tagged("train", line), result.step)
        self._board.add(_tagged("rates", rates.to_mapping()), last)

    def write_epoch(self, step: int, epoch: int, losses: Mapping[str, Sequence[float]]) -> None:
        """Log what was measured after an epoch.

        Args:
            step: the last of the epoch, counted from 1.
            epoch: counted from 0.
            losses: (loss, token, feature, patch, block) on `seen`, `probe` and `held_out` views, where there are any.
        """
        line = epoch_line(step, epoch, losses)
        self._metrics.write([line])
        self._board.add(_tagged("epoch", line), step)

    def write_not_finite(self, result: StepResult, losses: Sequence[float], scaler: Mapping[str, object] | None) -> str:
        """Write `not-finite.json`: what the step that ended the run was made of.

        Returns:
            What it shows, for the message.
        """
        path = self._config.out / NOT_FINITE
        try:
            samples = self._data.samples_of(result.step - 1)
        except ProteusCacheError as error:
            return f" (its samples cannot be read: {error})"
        document = {
            "step": result.step,
            "epoch": result.epoch,
            "lr": result.lr,
            "losses": {name: repr(value) for name, value in zip(LOSS_NAMES, losses, strict=True)},
            "loss_scaling": scaler,
            "samples": sorted(samples, key=lambda sample: (sample.get("is_finite") is not False, sample["position"])),
        }
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        try:
            storage.write_whole(path, text.encode)
        except StorageError as error:
            return f" (its samples cannot be written down: {error})"
        bad = [str(sample["key"]) for sample in samples if sample.get("is_finite") is False]
        if not bad:
            return f"; its {len(samples):,} samples are named in {path}"
        more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        return f"; the targets of {', '.join(bad[:_NAMED])}{more} are not finite ({path})"

    def sync(self) -> None:
        """Make the logs durable; a checkpoint must not know of steps that they do not."""
        self._metrics.sync()
        self._timings.sync()
        self._board.flush()

    def write_student(self, state: TrainingState, step: int) -> None:
        """Write `student`, `heads` and `ema.safetensors` of a finished run, and `finished.json`, which names them."""
        config = self._config
        withdraw_finished(config.out)
        shape, common = self._shape(), self._common(step)
        share = repr(config.ema_decay**step)
        average = {"weights": "ema", "ema_decay": repr(config.ema_decay), "initialisation_share": share}
        bare = state.bare
        raw = {"weights": "raw"}
        files = {
            STUDENT: replace_tensors(config.out / STUDENT, bare.student.state_dict(), shape | common | raw),
            HEADS: replace_tensors(config.out / HEADS, bare.head_tensors(self._data.bases), common | raw),
            EMA: replace_tensors(config.out / EMA, state.ema.module.state_dict(), shape | common | average),
        }
        if storage.size_of(config.out / START) is not None:
            files[START] = storage.Written(*storage.sha256_of(config.out / START))
        write_finished(config.out, step, files)

    def write_start(self, state: TrainingState) -> None:
        """Write `start.safetensors`, the student before its first step: what `eval` compares a run with `init` with."""
        metadata = self._shape() | self._common(0) | {"weights": "start"}
        replace_tensors(self._config.out / START, state.bare.student.state_dict(), metadata)

    def _shape(self) -> dict[str, str]:
        """Metadata that say how to build the student."""
        teacher = self._data.teacher
        return student_metadata(
            self._config.student,
            size_px=self._data.side_px,
            patch_px=teacher.patch_px,
            mean=teacher.mean,
            std=teacher.std,
        )

    def _common(self, step: int) -> dict[str, str]:
        """Metadata that say where weights come from."""
        config = self._config
        start = {}
        if config.init is not None and config.init_sha256 is not None:
            start = {"init": config.init.name, "init_sha256": config.init_sha256}
        return {
            "student": config.student,
            "teacher": self._data.teacher.name,
            "steps": str(step),
            "seed": str(config.seed),
            **start,
            **self._data.provenance,
        }


def _sections(config: TrainConfig, data: TrainingData, precision: str) -> dict[str, object]:
    """What `config.yaml` holds. `train` alone makes the run again from the same data."""
    versions = {name: metadata.version(name) for name in _LIBRARIES if _is_installed(name)}
    return {
        "train": config.to_mapping()
        | {"batch_size": config.global_batch, "lr": config.peak_lr, "precision": precision},
        **data.description,
        "versions": {"python": platform.python_version(), **versions},
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _tagged(group: str, line: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a line, by their tags on the board."""
    kept = {name: value for name, value in line.items() if name not in ("step", "epoch")}
    return {f"{group}/{name}": value for name, value in kept.items() if isinstance(value, int | float)}
