"""Commands to run next, as text that can be pasted into a shell: quoted, and of a kind that will work.

Built from the summaries that `report.summary` gives, so that nothing is read twice. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from proteus_cache.students.registry import STUDENTS, student_size

_SUGGESTED: Final = ("vit_s14", "vit_ti14", "vit_demo")
"""Students to begin with, the largest first; the one that is no wider than half the teacher is suggested."""
_STEPS_AN_EPOCH: Final = 4
"""At least so many where the published batch is too large for the images."""


def command_line(*arguments: object) -> str:
    """`proteus-cache` with these arguments, quoted for a shell."""
    return shlex.join(["proteus-cache", *map(str, arguments)])


def after(summary: Mapping[str, Any]) -> str | None:
    """What to do with a cache, pack or run as `report.summary.summarise` describes it; None when nothing follows."""
    kind = summary["kind"]
    if kind == "run":
        return after_training(summary)
    if kind == "cache" and summary["cache_id"] is None:
        return (
            f"the same `proteus-cache extract` again: no view index of {summary['path']} is complete here (or, where "
            "`pack --move` was stopped, that again)"
        )
    return train_on(summary)


def train_on(summary: Mapping[str, Any]) -> str | None:
    """The training of a student from a cache or pack; None where the standard losses lack a target or images."""
    if not {"cls", "patch"} <= summary["targets"].keys():
        return None
    student = suggested_student(summary["teacher"]["name"], summary["teacher"]["width"])
    batch = _batch_that_fits(student, _trained_images(summary))
    if batch is None:
        return None
    smaller = [] if batch == student_size(student).batch_size else ["--batch-size", batch]
    return command_line("train", "--student", student, "--data", summary["path"], *smaller)


def suggested_student(teacher: str, width: int) -> str:
    """A student to begin with: small enough to be one."""
    if teacher == "demo":
        return "vit_demo"
    fitting = (name for name in _SUGGESTED if name in STUDENTS and 2 * STUDENTS[name].width <= width)
    return next(fitting, _SUGGESTED[-1])


def after_training(summary: Mapping[str, Any]) -> str | None:
    """The evaluation of a finished run, or how to go on with one that is not."""
    path = Path(summary["path"])
    if "student.safetensors" in summary["weights"]:
        return f"{command_line('eval', path, '--images')} DIR"
    return resume_training(path)


def resume_training(run: Path) -> str:
    """Goes on with a run that was stopped, with all of its settings; a copied or moved run with itself."""
    return command_line("train", "--config", run / "config.yaml", "--resume", "--out", run)


def _trained_images(summary: Mapping[str, Any]) -> int:
    """Images that an epoch draws from, about."""
    images = summary.get("images") or summary
    held_out = images["held_out"]
    n_bad = int(summary.get("n_quarantined", 0))
    return int(images["n_images"]) - n_bad - len(held_out) * int(summary["shard_size"])


def _batch_that_fits(student: str, n_images: int) -> int | None:
    published = student_size(student).batch_size
    if n_images >= published:
        return published
    fitting = 2
    while 2 * fitting * _STEPS_AN_EPOCH <= n_images:
        fitting *= 2
    return fitting if fitting <= n_images else None
