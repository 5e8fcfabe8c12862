"""The door to all teachers: a name and weights in, a teacher out. torch is imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_cache.choices import either, unknown
from proteus_cache.errors import UsageError
from proteus_cache.teachers.dinov2_models import DINOV2

if TYPE_CHECKING:
    from proteus_cache.teachers.teacher import Teacher

TEACHERS: tuple[str, ...] = (*DINOV2, "demo", "vit")
"""Names that stand alone; `timm:NAME` is the other kind."""


def check_teacher_name(name: str) -> None:
    """Do nothing for a name that `load_teacher` takes.

    Raises:
        UsageError: unknown; names the nearest. What follows `timm:` is checked on loading.
    """
    if name in TEACHERS or (name.startswith("timm:") and name != "timm:"):
        return
    raise UsageError(unknown("teacher", name, TEACHERS, also="timm:NAME"))


def load_teacher(
    name: str,
    *,
    weights: str | None,
    home: Path,
    size_px: int | None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Teacher:
    """Build a teacher with its weights, on the CPU in fp32.

    Args:
        name: one of `TEACHERS`, or `timm:NAME` for a ViT of timm.
        weights: `random:SEED`, a `.safetensors` or `.pth` file, or None for the published weights, which are
            downloaded once.
        home: the folder PROTEUS_HOME; downloads and converted files go to `home/weights`.
        size_px: side of the square view; None for the teacher's own (224 for DINOv2).
        progress: called with bytes done and in all while weights are downloaded.

    Raises:
        UsageError: unknown name, a size that patches do not tile, or a model without CLS and patch tokens.
        WeightsError: weights missing, out of reach, unsafe to read, or of another model.
    """
    check_teacher_name(name)
    if name in DINOV2:
        from proteus_cache.teachers.dinov2 import load_dinov2

        return load_dinov2(name, weights=weights, home=home, size_px=size_px, progress=progress)
    if name == "demo":
        from proteus_cache.teachers.vit_file import load_demo

        return load_demo(weights=weights, home=home, size_px=size_px)
    if name == "vit":
        from proteus_cache.teachers.vit_file import load_vit

        return load_vit(weights=weights, home=home, size_px=size_px)
    from proteus_cache.teachers.timm_model import load_timm

    return load_timm(name.removeprefix("timm:"), weights=weights, home=home, size_px=size_px)


def fetch_weights(name: str, home: Path, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Download the published weights of teacher `name` unless they are there; returns the file.

    Raises:
        UsageError: no such teacher, or one whose weights are not fetched by us.
        WeightsError: no network, or the file is not of this model.
    """
    check_teacher_name(name)
    if name == "demo":
        raise UsageError("nothing to fetch for 'demo': its weights come with proteus-cache")
    if name not in DINOV2:
        raise UsageError(f"nothing to fetch for {name!r}; choose {either(list(DINOV2))}")
    from proteus_cache.teachers.dinov2 import fetch_dinov2

    return fetch_dinov2(name, home, progress)
