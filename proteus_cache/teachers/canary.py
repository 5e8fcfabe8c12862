"""Four fixed images, and a short fixed summary of what a teacher says of them.

The images are whole-number arithmetic, so that they are the same everywhere and for ever. The summary of a target is
`N_PROJECTIONS` sums of its values with fixed signs, for each image. The difference of two outputs has such sums, too,
and the mean of their squares is the mean square of the difference: with 4 x 32 of them the relative difference
of two outputs is estimated within 6 % of itself (one standard deviation), in 1 KB instead of megabytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.teachers.teacher import Precision, Teacher

N_IMAGES: Final = 4
N_PROJECTIONS: Final = 32
TOLERANCE: Final[dict[Precision, float]] = {"fp32": 0.01, "fp16": 0.05, "bf16": 0.2}
"""Largest relative difference between two devices, by the coarser precision of the two. Measured on one H200 for
DINOv2-g/14 with random weights, against fp32: 0.3 % in fp16 and 2.7 % in bf16. Another teacher is off by 100 %."""
_SIGNS: Final = b"proteus-cache/canary/1"
_ROWS_AT_ONCE: Final = 1 << 16
_DIGITS: Final = 6


def canary_images(size_px: int) -> NDArray[np.uint8]:
    """(4, size_px, size_px, 3) uint8: slopes, stripes, rings, and blocks of mixed colour."""
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.int64)
    last = max(size_px - 1, 1)
    slopes = (255 * x // last, 255 * y // last, 255 * (x + y) // (2 * last))
    stripes = tuple(np.abs((step * x + (8 - step) * y) * 64 // size_px % 256 - 128) * 255 // 128 for step in (1, 3, 6))
    radius = (2 * x - last) ** 2 + (2 * y - last) ** 2
    rings = tuple(radius * scale // (size_px * size_px) % 256 for scale in (400, 700, 1100))
    block = x // max(size_px // 28, 1) + 31 * (y // max(size_px // 28, 1))
    mixed = tuple((block + 7 * channel) * 2654435761 % (1 << 32) >> 24 for channel in range(3))
    images = [np.stack(planes, axis=-1) for planes in (slopes, stripes, rings, mixed)]
    return np.stack(images).astype(np.uint8)


def canary_targets(teacher: Teacher, names: Sequence[str], at_once: int) -> dict[str, Tensor]:
    """What the teacher says of the four images now.

    Args:
        teacher: on its device, in its precision.
        names: of the targets.
        at_once: views in one forward; never more than there are images. The same number gives the same bits on one
            device in one process.

    Returns:
        Name -> (4, *shape) float32 on the CPU.
    """
    images = torch.from_numpy(canary_images(teacher.identity.size_px))
    parts = [teacher.targets(part, names) for part in torch.split(images, min(at_once, N_IMAGES))]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in names}


def project(tokens: Tensor) -> list[list[float]]:
    """The summary of one target: for each image 32 sums with signs, over the root of the number of values.

    Args:
        tokens: (n, *shape) float32 on the CPU.

    Returns:
        n lists of 32 numbers, rounded to six significant digits; each is about as large as a value of the target.
    """
    flat = tokens.reshape(len(tokens), -1).numpy()
    sums = np.zeros((len(flat), N_PROJECTIONS))
    for start in range(0, flat.shape[1], _ROWS_AT_ONCE):
        part = flat[:, start : start + _ROWS_AT_ONCE].astype(np.float64)
        sums += part @ _signs(start, part.shape[1])
    return [[_rounded(value) for value in row] for row in sums / math.sqrt(flat.shape[1])]


def relative_difference(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Norm of the difference of two summaries over the norm of `expected`; infinite for numbers that are not finite."""
    wanted = np.asarray(expected, dtype=np.float64)
    difference = np.asarray(found, dtype=np.float64) - wanted
    ratio = float(np.linalg.norm(difference) / max(float(np.linalg.norm(wanted)), 1e-30))
    return ratio if math.isfinite(ratio) else math.inf


def _signs(start: int, count: int) -> NDArray[np.float64]:
    """(count, 32) of +1 and -1: the bits of SHAKE-128 over a fixed text and the number of the part."""
    number = start // _ROWS_AT_ONCE
    data = hashlib.shake_128(_SIGNS + b"/%d" % number).digest(count * N_PROJECTIONS // 8)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).reshape(count, N_PROJECTIONS)
    return np.where(bits == 1, -1.0, 1.0)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
