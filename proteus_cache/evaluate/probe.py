"""DINOv2's linear probe: 52 linear heads on frozen features, trained at once on random crops of the training images.

Every batch is read once and goes through every model; nothing is stored of an image, so memory does not grow with the
folder. All draws are keyed by (seed, pass, image): the order, the crops and the initial weights are the same for any
number of threads.

The published number is the best head on the test images themselves, which is optimistic. Beside it stands an honest
one: each head has a twin that starts and learns alike but never sees one training image in five; the settings whose
twin is best on those held-out images are chosen, and the head with these settings, which saw all, is scored.

Source: DINOv2 eval/linear.py, as Proteus ran it. Deviations: docs/evaluation.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.devices import gpu_memory, is_out_of_memory
from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.evaluate.features import LAST_BLOCKS, last_block_features, n_last_blocks
from proteus_cache.evaluate.heads import BASE_LRS, HEADS, Head, HeadGrid, Tally, cosine
from proteus_cache.evaluate.labelled import LabelledImages, Part, rows_to_ask
from proteus_cache.evaluate.models import UNTRAINED_MODEL
from proteus_cache.evaluate.reading import BadImages, Request, in_order, read_views
from proteus_cache.evaluate.report import ChosenOn, HeadScore, ProbeScore, ProbeSettings
from proteus_cache.evaluate.task import Outcome, Task
from proteus_cache.pack.order import permutation
from proteus_cache.teachers.teacher import Teacher

PASSES: Final = 10
"""Passes over the training images, as published: 10 x 2,502 steps of 512 images on ImageNet-1K."""
PASSES_OF_FEW: Final = 5
"""Over fewer than `MANY` images: more gave no better scores (docs/evaluation.md)."""
MANY: Final = 100_000
LARGEST_BATCH: Final = 512
"""The published batch."""
SMALLEST_BATCH: Final = 16
LEAST_STEPS: Final = 200
"""The batch is halved, and at the smallest one there are more passes, so that there are so many steps."""
_MOST_PASSES = 100_000


@dataclass(frozen=True, slots=True)
class ProbeLength:
    """How long a probe trains."""

    n_steps: int
    batch_size: int


def probe_length(n_train: int, n_steps: int | None, batch_size: int | None) -> ProbeLength:
    """The length for so many training images: the published rule for many, fewer and smaller steps for few.

    Args:
        n_train: training images.
        n_steps: None for 10 passes over many images and 5 over few, but at least 200 steps.
        batch_size: None for 512, halved down to 16 while these passes are fewer than 200 steps.

    Raises:
        UsageError: a value that cannot be.
    """
    for name, value in (("--probe-steps", n_steps), ("--probe-batch", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    passes = PASSES if n_train >= MANY else PASSES_OF_FEW
    if batch_size is None:
        batch_size = LARGEST_BATCH
        while batch_size > SMALLEST_BATCH and passes * (n_train // batch_size) < LEAST_STEPS:
            batch_size //= 2
        batch_size = min(batch_size, n_train)
    if batch_size > n_train:
        raise UsageError(
            f"--probe-batch {batch_size:,} is larger than the {n_train:,} training images; choose a smaller one"
        )
    if n_steps is None:
        n_steps = max(passes * (n_train // batch_size), LEAST_STEPS)
    if n_steps * batch_size > _MOST_PASSES * n_train:
        raise UsageError(
            f"--probe-steps {n_steps:,}: more than {_MOST_PASSES:,} passes over {n_train:,} images; choose fewer"
        )
    return ProbeLength(n_steps, batch_size)


def check_can_probe(labelled: LabelledImages, images: Path) -> None:
    """Refuse what no linear probe can learn or be asked.

    Raises:
        UsageError: training images of one class only, or no test image.
    """
    if len(np.unique(labelled.train.labels)) < 2:
        raise UsageError(
            f"{images}: the training images are of one class only; a linear probe needs two or more to tell apart"
        )
    if not len(labelled.test):
        raise UsageError(f"{images}: every class has one image, which only trains; a linear probe needs two of each")


class _Probe:
    """The heads of one model and their twins."""

    def __init__(self, model: Teacher, n_classes: int, batch_size: int, seed: int, device: torch.device) -> None:
        width, n_blocks = model.identity.width, n_last_blocks(model)
        self._heads, self._twins = (
            HeadGrid(width, n_blocks, n_classes, batch_size=batch_size, seed=seed, device=device) for _ in range(2)
        )
        self.test, self.held_out = Tally(), Tally()

    def step(self, features: Tensor, labels: Tensor, kept: Tensor, share: float) -> None:
        """One step of every head on the whole batch, and of its twin on the rows `kept`."""
        self._heads.step(features, labels, share)
        if len(kept):
            self._twins.step(features[kept], labels[kept], share)

    def ask(self, features: Tensor, labels: Tensor) -> None:
        """Count what the heads say of test images."""
        self.test.add(self._heads.logits(features), labels)

    def ask_twins(self, features: Tensor, labels: Tensor) -> None:
        """Count what the twins say of held-out images."""
        self.held_out.add(self._twins.logits(features), labels)

    def scores(self) -> tuple[ProbeScore, ProbeScore]:
        """The head that is best on the test images, and the one that was chosen on held-out images."""
        return (
            self._score("test", self.test.best() if self.test.n else None),
            self._score("held_out", self.held_out.best() if self.held_out.n else None),
        )

    def _score(self, chosen_on: ChosenOn, head: int | None) -> ProbeScore:
        if head is None:
            return ProbeScore(chosen_on=chosen_on, head=None, top1=None, top5=None, held_out_top1=None)
        return ProbeScore(
            chosen_on=chosen_on,
            head=HEADS[head],
            top1=self.test.top1(head),
            top5=self.test.top5(head),
            held_out_top1=self.held_out.top1(head),
        )

    def every_head(self) -> tuple[HeadScore, ...]:
        """What each of the 52 scored."""
        return tuple(
            HeadScore(
                head=head,
                top1=self.test.top1(number),
                top5=self.test.top5(number),
                held_out_top1=self.held_out.top1(number),
            )
            for number, head in enumerate(HEADS)
        )


def run_probe(task: Task, length: ProbeLength) -> Outcome:
    """Train and score the heads of every model.

    Raises:
        StorageError: an image cannot be read.
        ProteusCacheError: too many bad images, damaged weights, or too little memory.
    """
    train, test = task.labelled.train, task.labelled.test
    is_held_out = rows_to_ask(train.keys, train.labels, task.seed)
    probes = _make_probes(task, length)
    task.start(length.n_steps * length.batch_size + int(is_held_out.sum()) + len(test))

    bad_train, bad_test = BadImages(len(train)), BadImages(len(test))
    is_used = _train(task, length, probes, is_held_out, bad_train)
    held_out = in_order(np.flatnonzero(is_held_out), task.batch_size)
    with closing(_looked_at(task, train, held_out, bad_train)) as batches:
        for batch in batches:
            for name, features in batch.by_model():
                probes[name].ask_twins(features, batch.labels)
    is_asked = np.zeros(len(test), dtype=np.bool_)
    asked = in_order(range(len(test)), task.batch_size)
    with closing(_looked_at(task, test, asked, bad_test)) as batches:
        for batch in batches:
            is_asked[batch.rows] = True
            for name, features in batch.by_model():
                probes[name].ask(features, batch.labels)

    scores = {name: probe.scores() for name, probe in probes.items()}
    return Outcome(
        settings=ProbeSettings(
            steps=length.n_steps,
            batch_size=length.batch_size,
            passes=length.n_steps * length.batch_size / len(train),
            n_held_out=next(iter(probes.values())).held_out.n,
        ),
        scores=scores,
        heads={name: probe.every_head() for name, probe in probes.items()},
        train_labels=torch.from_numpy(train.labels[is_used]),
        test_labels=torch.from_numpy(test.labels[is_asked]),
        bad_images=(*bad_train.reasons, *bad_test.reasons),
        notes=tuple(_notes(task, length, bool(is_held_out.any()), scores)),
    )


def _train(
    task: Task, length: ProbeLength, probes: dict[str, _Probe], is_held_out: NDArray[np.bool_], bad_images: BadImages
) -> NDArray[np.bool_]:
    """Train every head and its twin; returns which training images were seen.

    Models are frozen, so one forward serves as many steps as `--batch-size` has room for. A step whose images are all
    bad is left out.
    """
    part = task.labelled.train
    is_used = np.zeros(len(part), dtype=np.bool_)
    at_once = max(1, task.batch_size // length.batch_size)
    requests = _training_requests(len(part), length, task.seed, at_once)
    with closing(_looked_at(task, part, requests, bad_images)) as batches:
        for number, batch in enumerate(batches):
            is_used[batch.rows] = True
            steps = list(_steps_of(batch, number * at_once, at_once, length, is_held_out))
            for name, features in batch.by_model():
                for rows, kept, share in steps:
                    probes[name].step(features[rows], batch.labels[rows], kept, share)
    return is_used


def _steps_of(
    batch: _Batch, first: int, at_once: int, length: ProbeLength, is_held_out: NDArray[np.bool_]
) -> Iterator[tuple[slice, Tensor, float]]:
    """The steps that a batch holds: its rows, which of these the twins see, and the share of the rate."""
    ends = np.searchsorted(batch.places, np.arange(at_once + 1) * length.batch_size).tolist()
    for step, (start, end) in enumerate(itertools.pairwise(ends), start=first):
        if end > start:
            kept = np.flatnonzero(~is_held_out[batch.rows[start:end]])
            yield slice(start, end), torch.from_numpy(kept).to(batch.labels.device), cosine(step, length.n_steps)


def _make_probes(task: Task, length: ProbeLength) -> dict[str, _Probe]:
    n_classes = len(task.labelled.classes)
    try:
        return {
            name: _Probe(model, n_classes, length.batch_size, task.seed, task.device)
            for name, model in task.models.items()
        }
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ProteusCacheError(
            f"the GPU has too little memory for the heads of {len(task.models)} models and {n_classes:,} classes "
            f"({gpu_memory()}); free some there, leave --teacher out, or try --device cpu"
        ) from error


def _training_requests(n_images: int, length: ProbeLength, seed: int, at_once: int) -> Iterator[list[Request]]:
    """The images of `at_once` steps at a time: pass after pass over all, each in an order of its own.

    A step may reach into the next pass.
    """
    endless = (
        Request(int(row), f"v{number:03d}")
        for number in itertools.count()
        for row in permutation(n_images, "linear-probe", seed, number)
    )
    for first in range(0, length.n_steps, at_once):
        n_steps = min(at_once, length.n_steps - first)
        yield list(itertools.islice(endless, n_steps * length.batch_size))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Images that were read, for every model to look at."""

    rows: NDArray[np.int64]
    """(B,) of the part; none where all images of the batch are bad."""
    labels: Tensor
    """(B,) int64 on the device."""
    places: NDArray[np.int64]
    """(B,) ascending: which of the requests each answers."""
    views: Tensor
    """(B, H, W, 3) uint8."""
    task: Task

    def by_model(self) -> Iterator[tuple[str, Tensor]]:
        """Each model's name and what its probe reads; nothing for an empty batch."""
        for name, model in self.task.models.items() if len(self.rows) else ():
            yield name, last_block_features(model, self.views, self.task.batch_size)


def _looked_at(
    task: Task, part: Part, requests: Iterator[list[Request]], bad_images: BadImages
) -> Generator[_Batch, None, None]:
    """The batches asked for; each is counted when the next one is asked for."""
    reader = read_views(part, requests, bad_images, size_px=task.size_px, n_threads=task.n_threads, seed=task.seed)
    with closing(reader) as batches:
        for batch in batches:
            labels = torch.from_numpy(part.labels[batch.rows]).to(task.device)
            yield _Batch(batch.rows, labels, batch.places, batch.views, task)
            task.count(batch.n_requests)


def _notes(
    task: Task, length: ProbeLength, has_held_out: bool, scores: dict[str, tuple[ProbeScore, ProbeScore]]
) -> Iterator[str]:
    if not has_held_out:
        yield "no class has two training images, so none could be held out to choose a head by"
    for name, model in task.models.items():
        n_blocks = n_last_blocks(model)
        if n_blocks < LAST_BLOCKS:
            yield f"{name} has {n_blocks} block{'s' if n_blocks > 1 else ''}: its heads on 4 blocks read all it has"
    if length.n_steps >= PASSES_OF_FEW * (len(task.labelled.train) // length.batch_size):
        return
    at_the_edge = [
        name
        for name, (on_test, by_held_out) in scores.items()
        if name != UNTRAINED_MODEL and _learns_fastest(by_held_out.head or on_test.head)
    ]
    if at_the_edge:
        yield f"the largest rate was the best for {', '.join(at_the_edge)}: more --probe-steps may score higher"


def _learns_fastest(head: Head | None) -> bool:
    return head is not None and head.base_lr == max(BASE_LRS)
