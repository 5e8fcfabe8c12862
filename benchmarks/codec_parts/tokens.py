"""What a teacher says of augmented views of images: the views that codecs are fitted to and measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proteus_cache.images import list_images
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.views.make import make_view
from proteus_cache.views.spec import ViewSpec

_AT_ONCE = 64


def tokens_of(teacher: Teacher, images: Path, names: tuple[str, ...], n_images: int) -> dict[str, Tensor]:
    """Targets of one `deit` view of each image, images in random order: (n, T, D) float32 by name."""
    identity = teacher.identity
    spec = ViewSpec(
        augment="deit", size_px=identity.size_px, view_format="jpeg", seed=0, mean=identity.mean, std=identity.std
    )
    paths = list_images(images).table["path"].to_pylist()
    order = np.random.default_rng(0).permutation(len(paths))[:n_images]
    teacher.to(torch.device("cpu"), "fp32")
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(order), _AT_ONCE):
        views = [_pixels(images, paths[place], spec) for place in order[first : first + _AT_ONCE]]
        parts.append(teacher.targets(torch.stack(views), names))
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _pixels(images: Path, path: str, spec: ViewSpec) -> Tensor:
    key = path.replace("/", "-").replace(".", "-")
    return torch.from_numpy(make_view(images / path, path, key, None, "v000", spec).pixels)
