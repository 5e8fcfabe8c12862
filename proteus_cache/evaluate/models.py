"""The models of an evaluation: a run's student, its average, the student as it began, and a teacher.

A student's file describes itself, as a file for the teacher `vit` does, so every model here is one frozen ViT
with one way from uint8 views to features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from proteus_cache import storage, stores
from proteus_cache.errors import DamageError, FormatError, StorageError, UsageError
from proteus_cache.next_steps import resume_training
from proteus_cache.students.registry import build_student
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.teachers.weights import read_metadata, state_digest
from proteus_cache.train.run_folder import CONFIG, EMA, START, STUDENT
from proteus_cache.train.tensors import check_tensors
from proteus_cache.yaml_text import MAX_BYTES, read_yaml

STUDENT_MODEL: Final = "student"
EMA_MODEL: Final = "ema"
TEACHER_MODEL: Final = "teacher"
UNTRAINED_MODEL: Final = "untrained"
"""The student as a run without `init` began: random."""
START_MODEL: Final = "start"
"""The student as a run with `init` began: with the weights of that file."""


@dataclass(frozen=True, slots=True)
class RunModels:
    """The three models that a finished run gives."""

    by_name: dict[str, Teacher]
    """`student`, `ema` and the one that `began` names, on the CPU."""
    began: str
    """How the run began: `untrained`, or `start` where it was given start weights."""
    student: str
    """Name of the student's size."""
    size_px: int
    """Side of the views that the student was trained on."""
    steps: int
    """Training steps."""
    initialisation_share: float
    """How much of the weights that the run began with is still in `ema`, 0 to 1."""
    teacher: str
    """Name of the teacher that the run learned from."""
    teacher_sha256: str
    """Digest of that teacher's weights."""


def load_run(run: Path, home: Path) -> RunModels:
    """Load the models of a finished training run.

    The untrained student is built again from the seed that the run recorded, by the same code that began the
    run. A run that was given start weights kept them.

    Args:
        run: the RUN folder.
        home: the folder PROTEUS_HOME.

    Raises:
        UsageError: not a run, one that is not finished, or one that lost its start weights.
        WeightsError: a file is damaged.
    """
    _check_finished(run)
    raw, average = run / STUDENT, run / EMA
    for file in (raw, average):
        _check_whole(file, "run the same training with --resume, which writes it anew")
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
    began = START_MODEL if "init_sha256" in metadata else UNTRAINED_MODEL
    models[began] = _start(run, home) if began == START_MODEL else _untrained(student, name, seed)
    taught_by, teacher_sha256 = _recorded_teacher(run / CONFIG)
    return RunModels(models, began, name, student.identity.size_px, steps, share, taught_by, teacher_sha256)


def _check_finished(run: Path) -> None:
    if stores.kind_of(run) != "run":
        raise UsageError(stores.wrong_folder(run, "run"))
    for name in (STUDENT, EMA):
        if not (run / name).is_file():
            raise UsageError(f"{run}: holds no {name} yet; finish the run first: " + resume_training(run))


def _check_whole(weights: Path, remedy: str) -> None:
    try:
        check_tensors(weights)
    except DamageError as error:
        raise type(error)(f"{error}; {remedy}") from error


def _recorded_teacher(config: Path) -> tuple[str, str]:
    """Name and weights digest of the teacher in a run's `config.yaml`."""
    try:
        recorded = read_yaml(storage.read_bytes(config, MAX_BYTES), str(config))
        source = recorded["live"] if "live" in recorded else recorded["pack"]
        return str(source["teacher"]), str(source["teacher_weights_sha256"])
    except (FormatError, StorageError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{config}: does not say which pack or live teacher the run was trained on ({reason}); give a run's own "
            "folder"
        ) from error


def _start(run: Path, home: Path) -> Teacher:
    """The start weights that a run kept."""
    if not (run / START).is_file():
        raise UsageError(f"{run}: holds no {START}, the weights that it began with; bring that file back")
    _check_whole(run / START, "bring the file back that the run began with")
    return load_teacher("vit", weights=str(run / START), home=home, size_px=None)


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
