"""The RUN folder: what a training run leaves on disk, and how its logs are cut back on resume.

    config.yaml              settings, the pack trained from, versions
    metrics.jsonl            one line for every step and, behind the last step of an epoch, one for the epoch, with the
                             losses on `seen`, `probe` and `held_out` views; nothing that depends on the clock
    timings.jsonl            rates and times, for people
    tensorboard/             the same numbers as TensorBoard events
    checkpoints/             see checkpoint.py
    student.safetensors      raw weights, strictly loadable into timm's VisionTransformer
    heads.safetensors        mask token and heads
    ema.safetensors          average weights and the share of the initialisation in them
    start.safetensors        the student as it began, of a run that was given start weights
    finished.json            see finished.py; of a finished run
    not-finite.json          samples and losses of the step that ended a run whose loss was not finite

Steps are counted from 1 here: the line of step 4 is what the fourth step computed, and the checkpoint of step
4 holds its result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path

import yaml

from proteus_cache import storage, stores
from proteus_cache.errors import UsageError
from proteus_cache.train.checkpoint import checkpoint_steps

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
STUDENT = "student.safetensors"
HEADS = "heads.safetensors"
EMA = "ema.safetensors"
START = "start.safetensors"
FINISHED = "finished.json"
NOT_FINITE = "not-finite.json"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOSS_NAMES = ("loss", "loss_token", "loss_feature", "loss_patch", "loss_block")
"""Losses of a step, in the order they are computed."""
VIEW_KINDS = ("seen", "probe", "held_out")
"""Stored views that were trained on; never-trained views of the same images; views of images that are held out."""
_OPTIONAL_LOSS = "loss_block"
"""Left out of a line of metrics where it is off, for Proteus has no such loss."""
_RESULTS = frozenset({STUDENT, HEADS, EMA, START, FINISHED, NOT_FINITE})
_OURS = _RESULTS | {CONFIG, METRICS, TIMINGS, TENSORBOARD, CHECKPOINTS}


def check_run_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that a run must not be written to.

    Raises:
        UsageError: `out` is a file or holds something else, or holds checkpoints and the run is not to be
            resumed.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; --out names the folder of a run")
    foreign = [name for name in storage.list_folder(out) if name not in _OURS and not name.startswith(".")]
    if foreign:
        raise UsageError(stores.occupied(out, foreign))
    steps = checkpoint_steps(out / CHECKPOINTS)
    if steps and not resume:
        raise UsageError(
            f"{out}: holds checkpoints (the newest is of step {steps[-1]:,}); go on with --resume, "
            "or choose another --out"
        )


def files_to_replace(out: Path, *, resume: bool) -> list[str]:
    """What a start would replace: the logs of a run that was stopped before its first checkpoint.

    With `resume` such a run is started again as a matter of course, and nothing needs to be asked.
    """
    if resume or not out.is_dir():
        return []
    return [name for name in storage.list_folder(out) if name in _OURS and name != CHECKPOINTS]


def clear_leftovers(out: Path, *, is_new: bool) -> None:
    """Remove unfinished files of killed writers and, for a new run, the results of another one."""
    for name in storage.list_folder(out):
        is_unfinished = name.startswith(".") and any(name.startswith(f".{ours}.") for ours in _OURS)
        if is_unfinished or (is_new and name in _RESULTS):
            storage.remove(out / name)


def write_config(out: Path, sections: Mapping[str, object]) -> None:
    """Write `config.yaml`; given to `train --config`, its `train` section makes the run again."""
    text = yaml.safe_dump(dict(sections), sort_keys=False, allow_unicode=True, width=110)
    storage.write_whole(out / CONFIG, text.encode)


class StepLog:
    """A file with one JSON object a line, in the order of steps.

    Args:
        path: of the file, made when missing.
        first_step: lines of steps after this one are cut off, and so is a line that a kill left unfinished.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        with storage.reported("write", path):
            self._file = _open_cut(path, first_step)

    def write(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Append objects and hand them to the operating system; the next start cuts off what is half written."""
        data = b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)
        with storage.reported("write", self._path):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Make what was written durable."""
        with storage.reported("sync", self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with storage.reported("close", self._path):
            self._file.close()


def _open_cut(path: Path, first_step: int) -> FileIO:
    """Open for appending after the last whole line whose step is at most `first_step`; nothing is buffered."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    end = 0
    with open(descriptor, "rb", closefd=False) as lines:
        for line in lines:
            if not line.endswith(b"\n") or _step_of(line) > first_step:
                break
            end += len(line)
    file = FileIO(descriptor, "r+b")
    file.seek(end)
    file.truncate()
    return file


def _step_of(line: bytes) -> float:
    """The step of a log line; infinite when it is damaged, so that it is cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def metric_line(step: int, epoch: int, lr: float, losses: Sequence[float]) -> dict[str, object]:
    """A line of `metrics.jsonl`.

    Args:
        step: counted from 1.
        epoch: counted from 0.
        lr: of this step.
        losses: sum, token, feature, patch, block; NaN for a loss of weight 0, which becomes null. The block loss
            has no place in a line then.
    """
    values = {name: None if math.isnan(value) else value for name, value in zip(LOSS_NAMES, losses, strict=True)}
    if values[_OPTIONAL_LOSS] is None:
        del values[_OPTIONAL_LOSS]
    return {"step": step, "epoch": epoch, "lr": lr, **values}


def epoch_line(step: int, epoch: int, losses: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """A line of `metrics.jsonl` behind the last step of an epoch.

    Args:
        step: counted from 1.
        epoch: counted from 0.
        losses: as `epoch_losses` takes them.
    """
    return {"step": step, "epoch": epoch, **epoch_losses(losses)}


def epoch_losses(losses: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """What was measured after an epoch, by name.

    Args:
        losses: sum, token, feature, patch, block on each kind of views; NaN for a loss of weight 0.

    Returns:
        `seen`, `probe` and `held_out`: the sum, null for views that there are none of; and each loss that is on, as
        `seen_token`, ... One that is not finite is null, or left out.
    """
    named: dict[str, float | None] = dict.fromkeys(VIEW_KINDS)
    for kind, values in losses.items():
        for name, value in zip(LOSS_NAMES, values, strict=True):
            if math.isfinite(value):
                named[kind + name.removeprefix("loss")] = value
    return named
