"""Evaluate a run: the joint of models, images and protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from proteus_cache.choices import unknown
from proteus_cache.devices import best_device
from proteus_cache.errors import UsageError
from proteus_cache.evaluate.features import Features, extract_features
from proteus_cache.evaluate.knn import K_NEIGHBOURS, TEMPERATURE, knn_scores
from proteus_cache.evaluate.labelled import LabelledImages, find_labelled_images
from proteus_cache.evaluate.models import (
    EMA_MODEL,
    STUDENT_MODEL,
    TEACHER_MODEL,
    UNTRAINED_MODEL,
    RunModels,
    load_run,
    place,
)
from proteus_cache.evaluate.report import EvalReport, ModelScores
from proteus_cache.processes import usable_cores
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher

log = logging.getLogger(__name__)

Protocol = Literal["knn"]

_NAMED = 10
"""Classes and bad images that are named; of more, the number is given."""
_MOSTLY_INITIAL = 0.05


def evaluate(
    run: Path,
    images: Path,
    *,
    protocol: Protocol = "knn",
    teacher: str | None = None,
    weights: str | None = None,
    home: Path,
    seed: int = 0,
    batch_size: int = 256,
    workers: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Score a run's student, its average, the untrained student and, if named, a teacher.

    Args:
        run: the RUN folder of a finished training.
        images: labelled images: `train` and `test` (or `val`) with class folders, class folders alone, or a
            text list.
        protocol: `knn`, DINOv2's.
        teacher: a teacher to compare with, at the student's size.
        weights: of the teacher; None for the published ones.
        home: the folder PROTEUS_HOME.
        seed: of the split, for images that come without parts.
        batch_size: images in one forward.
        workers: threads that read images; None: all usable cores.
        device: `cpu`, `cuda` or `cuda:N`; None: the GPU when there is one.
        progress: called with images done and in all.

    Raises:
        UsageError: not a finished run, images without labels, or a value that cannot be; nothing was
            computed.
        ProteusCacheError: too many bad images, weights that cannot be used, or a file that cannot be read.
    """
    if protocol not in get_args(Protocol):
        raise UsageError(unknown("protocol", protocol, get_args(Protocol)))
    if weights is not None and teacher is None:
        raise UsageError("--weights names the weights of a teacher; give --teacher with it")
    for name, value in (("--batch-size", batch_size), ("--workers", workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    place_on = best_device(device)
    trained = load_run(run, home)
    labelled = find_labelled_images(images, seed)
    models = _models(trained, teacher, weights, home)
    place(models, place_on)

    done, total = 0, len(labelled.train) + len(labelled.test)

    def count(n_images: int) -> None:
        nonlocal done
        done += n_images
        if progress is not None:
            progress(done, total)

    train, test = (
        extract_features(
            models,
            part,
            size_px=trained.size_px,
            batch_size=batch_size,
            n_threads=workers or usable_cores(),
            progress=count,
        )
        for part in (labelled.train, labelled.test)
    )
    if not len(train.labels):
        raise UsageError(f"{images}: no training image can be used; the first: {train.bad_images[0]}")
    bad_images = (*train.bad_images, *test.bad_images)
    return EvalReport(
        protocol=protocol,
        run=run,
        student=trained.student,
        steps=trained.steps,
        images=images,
        split=labelled.split,
        seed=seed,
        size_px=trained.size_px,
        temperature=TEMPERATURE,
        n_classes=len(labelled.classes),
        n_train=len(train.labels),
        n_test=len(test.labels),
        device=str(place_on),
        models=tuple(
            _score(name, model, train, test, len(labelled.classes), place_on) for name, model in models.items()
        ),
        n_bad_images=len(bad_images),
        bad_images=bad_images[:_NAMED],
        notes=tuple(_notes(trained, models, labelled, train, test)),
    )


def _models(trained: RunModels, teacher: str | None, weights: str | None, home: Path) -> dict[str, Teacher]:
    """Every model by name, in the order of the report."""
    models = {STUDENT_MODEL: trained.by_name[STUDENT_MODEL], EMA_MODEL: trained.by_name[EMA_MODEL]}
    if teacher is not None:
        models[TEACHER_MODEL] = load_teacher(teacher, weights=weights, home=home, size_px=trained.size_px)
    models[UNTRAINED_MODEL] = trained.by_name[UNTRAINED_MODEL]
    return models


def _score(
    name: str, model: Teacher, train: Features, test: Features, n_classes: int, device: torch.device
) -> ModelScores:
    log.info("searching model=%s train=%d test=%d", name, len(train.labels), len(test.labels))
    return ModelScores(
        model=name,
        weights=model.identity.weights_source,
        weights_sha256=model.identity.weights_sha256,
        width=model.identity.width,
        precision=model.precision,
        scores=knn_scores(
            train.by_model[name],
            train.labels,
            test.by_model[name],
            test.labels,
            n_classes=n_classes,
            device=device,
        ),
    )


def _notes(
    trained: RunModels,
    models: Mapping[str, Teacher],
    labelled: LabelledImages,
    train: Features,
    test: Features,
) -> list[str]:
    """What the numbers do not say by themselves."""
    notes = []
    if labelled.single_classes:
        names = labelled.single_classes
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        notes.append(
            f"{len(names):,} of {len(labelled.classes):,} classes have one image, which only trains: "
            f"{', '.join(names[:_NAMED])}{more}"
        )
    notes += _notes_on_labels(labelled, train, test)
    few = [k for k in K_NEIGHBOURS if k > len(train.labels)]
    if few:
        asked = ", ".join(str(k) for k in few)
        notes.append(f"all {len(train.labels):,} training images vote for k = {asked}, there are no more")
    if trained.initialisation_share > _MOSTLY_INITIAL:
        notes.append(
            f"ema still holds {trained.initialisation_share:.1%} of the untrained weights: the run was short "
            "for its decay"
        )
    if TEACHER_MODEL in models:
        used = models[TEACHER_MODEL].identity
        if trained.teacher_sha256 != used.weights_sha256:
            notes.append(
                f"this teacher ({used.name}, weights {used.weights_sha256[:12]}) is not the one that taught "
                f"the run ({trained.teacher}, weights {trained.teacher_sha256[:12]})"
            )
    return notes


def _notes_on_labels(labelled: LabelledImages, train: Features, test: Features) -> list[str]:
    if not len(test.labels):
        return ["there is no test image, so there is nothing to score; every class needs two images or more"]
    if len(labelled.classes) == 1:
        return ["there is one class only, so every answer is right"]
    lacking = ~torch.isin(test.labels, train.labels)
    n_lacking = int(lacking.sum())
    if not n_lacking:
        return []
    n_classes = len(set(test.labels[lacking].tolist()))
    if n_lacking == len(test.labels):
        return ["no test image can be right: the train part has no image of any class that is asked"]
    return [
        f"{n_lacking:,} of {len(test.labels):,} test images cannot be right: the train part has no image of "
        f"their {n_classes:,} classes"
    ]
