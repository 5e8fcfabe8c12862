"""Calibration: the first views through the teacher, to learn what a plan must know.

How large views are, how fast the teacher is here, in which precision its outputs are finite, and tokens to fit codecs
to.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from proteus_cache import tar
from proteus_cache.codecs.codec import codec_for_target, largest_value
from proteus_cache.devices import or_explain, use_device
from proteus_cache.errors import BadImageError, ProteusCacheError
from proteus_cache.extract.config import DEFAULT_CODEC, ExtractConfig
from proteus_cache.extract.memory import smaller_batch
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.views.make import make_view
from proteus_cache.views.spec import ViewSpec

logger = logging.getLogger(__name__)

_CALIBRATION_IMAGES = 64
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the planning batch showed."""

    tokens: dict[str, Tensor]
    """Target to (n, *shape) float32 on the CPU."""
    precision: Precision
    view_bytes: float
    """Mean size of a view with its document in a tar, headers and padding included."""
    views_per_s: float
    """Of the teacher's forward on this device."""


def calibrate(
    config: ExtractConfig,
    teacher: Teacher,
    spec: ViewSpec,
    root: Path,
    table: pa.Table,
    names: tuple[str, ...],
) -> Calibration:
    """Run the teacher over the first views: their size, its speed and precision, and tokens to fit codecs to.

    The teacher is on the CPU afterwards: the process that only plans, and then starts others, holds no GPU memory.
    """
    device = use_device(config.device)
    pixels, view_bytes = first_views(root, table, spec)
    try:
        return _first_usable(config, teacher, pixels, view_bytes, names, device)
    finally:
        teacher.to("cpu", "fp32")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _first_usable(
    config: ExtractConfig,
    teacher: Teacher,
    pixels: Tensor,
    view_bytes: float,
    names: tuple[str, ...],
    device: torch.device,
) -> Calibration:
    """The calibration in the first precision that gives finite outputs."""
    for precision in _precisions(config, device):
        teacher.to(device, precision)
        tokens, views_per_s = _timed_targets(teacher, pixels, names, min(_AT_ONCE, config.batch_size or _AT_ONCE))
        if _are_usable(tokens, codec_for_target(config.codec or DEFAULT_CODEC, "patch")):
            return Calibration(tokens, precision, view_bytes, views_per_s)
        logger.warning("teacher=%s outputs are not finite in precision=%s", teacher.identity.name, precision)
    raise ProteusCacheError(
        f"{teacher.identity.name}: its outputs on the planning batch are not finite (or beyond 65,504, which only "
        "--codec float32 stores), in fp32 too; check --weights"
    )


def _precisions(config: ExtractConfig, device: torch.device) -> tuple[Precision, ...]:
    if config.precision is not None:
        return (config.precision,)  # type: ignore[return-value]  # checked by ExtractConfig
    return ("fp16", "bf16", "fp32") if device.type == "cuda" else ("fp32",)


def first_views(root: Path, table: pa.Table, spec: ViewSpec) -> tuple[Tensor, float]:
    """Up to 64 views of the first images: (n, H, W, 3) uint8, and the mean size of them in a tar.

    Raises:
        ProteusCacheError: none of these images can be read.
    """
    pixels, sizes = [], []
    failed: Exception | None = None
    for row in table.slice(0, _CALIBRATION_IMAGES).to_pylist():
        try:
            view = make_view(root / row["path"], row["path"], row["key"], row["label"], "v000", spec)
        except BadImageError as error:
            failed = error
            continue
        pixels.append(torch.from_numpy(view.pixels))
        sizes.append(tar.member_bytes(len(view.data)) + tar.member_bytes(len(view.sample_json)))
    if not pixels:
        raise ProteusCacheError(
            f"none of the first {len(table.slice(0, _CALIBRATION_IMAGES))} images can be used; the last: {failed}. "
            "Check that --images names photographs (JPEG or PNG files)"
        )
    return torch.stack(pixels), sum(sizes) / len(sizes)


def _timed_targets(
    teacher: Teacher, pixels: Tensor, names: tuple[str, ...], n_at_once: int
) -> tuple[dict[str, Tensor], float]:
    """Targets of all pixels on the CPU, and views/s of the forwards but the first, which warms up."""
    batches = torch.split(pixels, n_at_once)
    parts: list[dict[str, Tensor]] = []
    seconds = 0.0
    for number, batch in enumerate(batches):
        started = time.monotonic()
        parts.append(_targets(teacher, batch, names))
        seconds += time.monotonic() - started if number or len(batches) == 1 else 0.0
    timed = len(pixels) - (len(batches[0]) if len(batches) > 1 else 0)
    return {name: torch.cat([part[name] for part in parts]) for name in names}, timed / max(seconds, 1e-9)


def _targets(teacher: Teacher, batch: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    return or_explain(
        lambda: {name: value.float().cpu() for name, value in teacher.targets(batch, names).items()},
        len(batch),
        lambda n: teacher.targets(batch[:n], names),
        smaller_batch(len(batch)),
    )


def _are_usable(tokens: dict[str, Tensor], codec: str) -> bool:
    limit = largest_value(codec)
    return all(bool(values.abs().amax() <= limit) for values in tokens.values())
