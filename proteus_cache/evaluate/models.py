"""The models of an evaluation: a run's student, its average, the same student untrained, and a teacher.

A student's file describes itself, as a file for the teacher `vit` does, so every model here is one frozen ViT
with one way from uint8 views to features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
import yaml

from proteus_cache import stores
from proteus_cache.errors import FormatError, UsageError
from proteus_cache.next_steps import resume_training
from proteus_cache.students.registry import build_student
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.teachers.weights import read_metadata, state_digest
from proteus_cache.train.run_folder import CONFIG, EMA, STUDENT

STUDENT_MODEL: Final = "student"
EMA_MODEL: Final = "ema"
TEACHER_MODEL: Final = "teacher"
UNTRAINED_MODEL: Final = "untrained"


@dataclass(frozen=True, slots=True)
class RunModels:
    """The three models that a finished run gives."""

    by_name: dict[str, Teacher]
    """`student`, `ema` and `untrained`, on the CPU."""
    student: str
    """Name of the student's size."""
    size_px: int
    """Side of the views that the student was trained on."""
    steps: int
    """Training steps."""
    initialisation_share: float
    """How much of the untrained weights is still in `ema`, 0 to 1."""
    teacher: str
    """Name of the teacher that the run learned from."""
    teacher_sha256: str
    """Digest of that teacher's weights."""


def load_run(run: Path, home: Path) -> RunModels:
    """Load the models of a finished training run.

    The untrained student is built again from the seed that the run recorded, by the same code that began the
    run.

    Args:
        run: the RUN folder.
        home: the folder PROTEUS_HOME.

    Raises:
        UsageError: not a run, or one that is not finished.
        WeightsError: a file is damaged.
    """
    _check_finished(run)
    raw, average = run / STUDENT, run / EMA
    metadata = read_metadata(raw)
    student = load_teacher("vit", weights=str(raw), home=home, size_px=None)
    models = {
        STUDENT_MODEL: student,
        EMA_MODEL: load_teacher("vit", weights=str(average), home=home, size_px=None),
    }
    try:
        name, seed, steps = metadata["student"], int(metadata["seed"]), int(metadata["steps"])
        share = float(read_metadata(average)["initialisation_share"])
    except (KeyError, ValueError) as error:
        raise FormatError(
            f"{run}: {STUDENT} or {EMA} lacks what training writes into its metadata ({error}); train again, "
            "or give the run's own files"
        ) from error
    models[UNTRAINED_MODEL] = _untrained(student, name, seed)
    taught_by, teacher_sha256 = _recorded_teacher(run / CONFIG)
    return RunModels(models, name, student.identity.size_px, steps, share, taught_by, teacher_sha256)


def _check_finished(run: Path) -> None:
    if stores.kind_of(run) != "run":
        raise UsageError(stores.wrong_folder(run, "run"))
    for name in (STUDENT, EMA):
        if not (run / name).is_file():
            raise UsageError(f"{run}: holds no {name} yet; finish the run first: " + resume_training(run))


def _recorded_teacher(config: Path) -> tuple[str, str]:
    """Name and weights digest of the teacher in a run's `config.yaml`."""
    try:
        pack = yaml.safe_load(config.read_text(encoding="utf-8"))["pack"]
        return str(pack["teacher"]), str(pack["teacher_weights_sha256"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{config}: does not say which pack the run was trained on ({reason}); give a run's own folder"
        ) from error


def _untrained(student: Teacher, name: str, seed: int) -> Teacher:
    """The student as its run began."""
    identity = student.identity
    model = build_student(
        name,
        size_px=identity.size_px,
        patch_px=identity.patch_px,
        mean=identity.mean,
        std=identity.std,
        seed=seed,
    )
    return Teacher(
        model,
        replace(
            identity,
            weights_source=f"initialisation, seed {seed}",
            weights_sha256=state_digest(model.state_dict()),
        ),
    )


def place(models: dict[str, Teacher], device: torch.device) -> None:
    """Move all models to the device; fp16 autocast on a GPU (as DINOv2 evaluates), fp32 on a CPU."""
    for model in models.values():
        model.to(device, "fp16" if device.type == "cuda" else "fp32")
