"""The teacher that a store names, loaded once more and proved to have the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from proteus_cache.cache.manifest import TeacherRecord
from proteus_cache.errors import WeightsError
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher


def load_recorded_teacher(
    made: TeacherRecord,
    store: Path,
    *,
    weights: str | None,
    home: Path,
    progress: Callable[[int, int | None], None] | None = None,
) -> Teacher:
    """The teacher of a manifest or pack.json, on the CPU in fp32.

    Args:
        made: what is recorded of it.
        store: for messages.
        weights: as for extract; None takes the recorded `random:SEED`, else the official weights.
        home: PROTEUS_HOME, where weights are kept.
        progress: of a download.

    Raises:
        WeightsError: the weights cannot be had, or have another digest than the recorded one.
    """
    if weights is None and made.weights_source.startswith("random:"):
        weights = made.weights_source
    teacher = load_teacher(made.name, weights=weights, home=home, size_px=made.size_px, progress=progress)
    given = teacher.identity
    if given.weights_sha256 != made.weights_sha256:
        raise WeightsError(
            f"{store}: was made with weights {made.weights_sha256[:12]} ({made.weights_source}), and those found here "
            f"have digest {given.weights_sha256[:12]} ({given.weights_source}): give the same ones with --weights"
        )
    if dict(given.architecture) != dict(made.architecture) or [*given.mean, *given.std] != [*made.mean, *made.std]:
        raise WeightsError(
            f"{store}: its {made.name} was built in another way ({made.implementation}) than this one "
            f"({given.implementation}), though the weights are the same: use the version of proteus-cache that made it"
        )
    return teacher
