"""What every protocol is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proteus_cache.evaluate.labelled import LabelledImages
from proteus_cache.evaluate.report import HeadScore, KnnSettings, ProbeSettings, Score
from proteus_cache.teachers.teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Models to score and images to score them on."""

    models: Mapping[str, Teacher]
    """By name, in the order of the report, on `device`."""
    labelled: LabelledImages
    size_px: int
    """Side of the views."""
    batch_size: int
    """Images in one forward."""
    n_threads: int
    """Threads that read images."""
    seed: int
    """Of everything that a protocol draws."""
    device: torch.device
    start: Callable[[int], None]
    """To be called first, with the number of images that will be read."""
    count: Callable[[int], None]
    """To be called with the number of images done since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a protocol found."""

    settings: KnnSettings | ProbeSettings
    scores: Mapping[str, tuple[Score, ...]]
    """By model."""
    heads: Mapping[str, tuple[HeadScore, ...]] = field(default_factory=dict)
    """Of a linear probe: by model, all 52."""
    train_labels: Tensor
    """(N,) int64, of the training images that were used."""
    test_labels: Tensor
    """(M,) int64, of the test images that were used."""
    bad_images: tuple[str, ...]
    """Why each skipped image was skipped; every reason names the file."""
    notes: tuple[str, ...]
    """What a reader of these scores must know."""
