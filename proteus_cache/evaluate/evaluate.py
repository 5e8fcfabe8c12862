"""Evaluate a run: the joint of models, images and protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from proteus_cache.choices import unknown
from proteus_cache.devices import best_device
from proteus_cache.errors import UsageError
from proteus_cache.evaluate.features import extract_features
from proteus_cache.evaluate.knn import K_NEIGHBOURS, TEMPERATURE, knn_scores
from proteus_cache.evaluate.labelled import LabelledImages, find_labelled_images
from proteus_cache.evaluate.models import (
    EMA_MODEL,
    STUDENT_MODEL,
    TEACHER_MODEL,
    RunModels,
    load_run,
    place,
)
from proteus_cache.evaluate.probe import check_can_probe, probe_length, run_probe
from proteus_cache.evaluate.report import EvalReport, KnnSettings, ModelScores, Protocol
from proteus_cache.evaluate.task import Outcome, Task
from proteus_cache.processes import usable_cores
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher

log = logging.getLogger(__name__)

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
    probe_steps: int | None = None,
    probe_batch: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Score a run's student, its average, the student as it began and, if named, a teacher.

    Args:
        run: the RUN folder of a finished training.
        images: labelled images: `train` and `test` (or `val`) with class folders, class folders alone, or a
            text list.
        protocol: `knn` or `linear`, both DINOv2's.
        teacher: a teacher to compare with, at the student's size.
        weights: of the teacher; None for the published ones.
        home: the folder PROTEUS_HOME.
        seed: of the split, for images that come without parts, and of all that a linear probe draws.
        probe_steps: of a linear probe; None: by the number of training images (`probe.probe_length`).
        probe_batch: images in a step of a linear probe; None: likewise.
        batch_size: images in one forward.
        workers: threads that read images; None: all usable cores.
        device: `cpu`, `cuda` or `cuda:N`; None: the GPU when there is one.
        progress: called with images done and in all.

    Raises:
        UsageError: not a finished run, images without labels, or a value that cannot be; nothing was
            computed.
        ProteusCacheError: too many bad images, weights that cannot be used, or a file that cannot be read.
    """
    _check_options(protocol, teacher, weights, seed, probe_steps, probe_batch, batch_size, workers)
    place_on = best_device(device)
    trained = load_run(run, home)
    labelled = find_labelled_images(images, seed)
    length = None
    if protocol == "linear":
        check_can_probe(labelled, images)
        length = probe_length(len(labelled.train), probe_steps, probe_batch)
    models = _models(trained, teacher, weights, home)
    place(models, place_on)
    counter = _Counter(progress)
    task = Task(
        models=models,
        labelled=labelled,
        size_px=trained.size_px,
        batch_size=batch_size,
        n_threads=workers or usable_cores(),
        seed=seed,
        device=place_on,
        start=counter.start,
        count=counter.count,
    )
    found = run_knn(task) if length is None else run_probe(task, length)
    if not len(found.train_labels):
        raise UsageError(f"{images}: no training image can be used; the first: {found.bad_images[0]}")
    return EvalReport(
        protocol=protocol,
        run=run,
        student=trained.student,
        steps=trained.steps,
        images=images,
        split=labelled.split,
        seed=seed,
        size_px=trained.size_px,
        settings=found.settings,
        n_classes=len(labelled.classes),
        n_train=len(found.train_labels),
        n_test=len(found.test_labels),
        device=str(place_on),
        models=tuple(_scores_of(name, model, found) for name, model in models.items()),
        n_bad_images=len(found.bad_images),
        bad_images=found.bad_images[:_NAMED],
        notes=tuple(_notes(trained, models, labelled, found)),
    )


def _check_options(
    protocol: str,
    teacher: str | None,
    weights: str | None,
    seed: int,
    probe_steps: int | None,
    probe_batch: int | None,
    batch_size: int,
    workers: int | None,
) -> None:
    if protocol not in get_args(Protocol):
        raise UsageError(unknown("protocol", protocol, get_args(Protocol)))
    if weights is not None and teacher is None:
        raise UsageError("--weights names the weights of a teacher; give --teacher with it")
    for name, value in (("--batch-size", batch_size), ("--workers", workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be from 0 to 2**63 - 1, got {seed}")
    for name, value in (("--probe-steps", probe_steps), ("--probe-batch", probe_batch)):
        if value is not None and protocol != "linear":
            raise UsageError(f"{name} is of a linear probe; give --protocol linear with it")


class _Counter:
    """Counts images towards a total that the protocol names."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._done = self._total = 0

    def start(self, total: int) -> None:
        """Begin to count."""
        self._total = total
        self.count(0)

    def count(self, n_images: int) -> None:
        """So many more are done."""
        self._done += n_images
        if self._progress is not None:
            self._progress(self._done, self._total)


def _models(trained: RunModels, teacher: str | None, weights: str | None, home: Path) -> dict[str, Teacher]:
    """Every model by name, in the order of the report."""
    models = {STUDENT_MODEL: trained.by_name[STUDENT_MODEL], EMA_MODEL: trained.by_name[EMA_MODEL]}
    if teacher is not None:
        models[TEACHER_MODEL] = load_teacher(teacher, weights=weights, home=home, size_px=trained.size_px)
    models[trained.began] = trained.by_name[trained.began]
    return models


def run_knn(task: Task) -> Outcome:
    """Score every model by k nearest neighbours.

    Raises:
        StorageError: an image cannot be read.
        ProteusCacheError: too many bad images, damaged weights, or too little memory.
    """
    labelled = task.labelled
    task.start(len(labelled.train) + len(labelled.test))
    train, test = (
        extract_features(
            task.models,
            part,
            size_px=task.size_px,
            batch_size=task.batch_size,
            n_threads=task.n_threads,
            progress=task.count,
        )
        for part in (labelled.train, labelled.test)
    )
    scores = {}
    for name in task.models if len(train.labels) else ():
        log.info("searching model=%s train=%d test=%d", name, len(train.labels), len(test.labels))
        scores[name] = knn_scores(
            train.by_model[name],
            train.labels,
            test.by_model[name],
            test.labels,
            n_classes=len(labelled.classes),
            device=task.device,
        )
    few = [k for k in K_NEIGHBOURS if k > len(train.labels)]
    asked = ", ".join(str(k) for k in few)
    return Outcome(
        settings=KnnSettings(temperature=TEMPERATURE),
        scores=scores,
        train_labels=train.labels,
        test_labels=test.labels,
        bad_images=(*train.bad_images, *test.bad_images),
        notes=(f"all {len(train.labels):,} training images vote for k = {asked}, there are no more",) if few else (),
    )


def _scores_of(name: str, model: Teacher, found: Outcome) -> ModelScores:
    return ModelScores(
        model=name,
        weights=model.identity.weights_source,
        weights_sha256=model.identity.weights_sha256,
        width=model.identity.width,
        precision=model.precision,
        scores=found.scores[name],
        heads=found.heads.get(name, ()),
    )


def _notes(
    trained: RunModels,
    models: Mapping[str, Teacher],
    labelled: LabelledImages,
    found: Outcome,
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
    notes += _notes_on_labels(labelled, found.train_labels, found.test_labels)
    notes += found.notes
    if trained.initialisation_share > _MOSTLY_INITIAL:
        notes.append(
            f"ema still holds {trained.initialisation_share:.1%} of the {trained.began} weights: the run was short "
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


def _notes_on_labels(labelled: LabelledImages, train: Tensor, test: Tensor) -> list[str]:
    if not len(test):
        return ["there is no test image, so there is nothing to score; every class needs two images or more"]
    if len(labelled.classes) == 1:
        return ["there is one class only, so every answer is right"]
    lacking = ~torch.isin(test, train)
    n_lacking = int(lacking.sum())
    if not n_lacking:
        return []
    n_classes = len(set(test[lacking].tolist()))
    if n_lacking == len(test):
        return ["no test image can be right: the train part has no image of any class that is asked"]
    return [
        f"{n_lacking:,} of {len(test):,} test images cannot be right: the train part has no image of "
        f"their {n_classes:,} classes"
    ]
