"""Calibration: views through the teacher before anything is stored, to learn what a plan must know.

The first 64 views say how large views are, how fast the teacher is here, in which precision its outputs are finite,
and are enough for the codecs that only need a scale. `int4` and `klt` have tables and a transform that follow the
distribution of tokens: they are fitted to views of 2,000 trained images or more, spread over the list, none of them
held out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from proteus_cache import tar
from proteus_cache.cache.manifest import CanaryRecord
from proteus_cache.calibration_tokens import MEMORY_SHARE, Room, TokenStore, enough_images, room_for, spread
from proteus_cache.codecs.codec import largest_value
from proteus_cache.codecs.names import wants_many_views
from proteus_cache.devices import or_explain, use_device
from proteus_cache.errors import BadImageError, ProteusCacheError
from proteus_cache.extract.canary import record_canary
from proteus_cache.extract.config import DEFAULT_SHARD_SIZE, ExtractConfig
from proteus_cache.extract.listing import trained_rows
from proteus_cache.extract.memory import smaller_batch
from proteus_cache.extract.rendering import Job, render_jobs
from proteus_cache.memory import available_memory
from proteus_cache.plan.human import human_bytes
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.views.make import make_view
from proteus_cache.views.spec import ViewSpec

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (calibration views done, views in all)."""
_FIRST_IMAGES = 64
_AT_ONCE = 16
_FEW = 64
"""So many views are rendered here: worker processes would take longer to start."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the calibration views showed."""

    tokens: dict[str, Tensor]
    """Target to (n, *shape) float32 or float16 on the CPU; n is larger for the codecs that want many views."""
    precision: Precision
    view_bytes: float
    """Mean size of a view with its document in a tar, headers and padding included."""
    views_per_s: float
    """Of the teacher's forward on this device."""
    canary: CanaryRecord
    """Of fixed images, in the same precision on the same device."""


@dataclass(frozen=True, slots=True)
class Photographs:
    """The images of a new cache and how they become views."""

    root: Path
    table: pa.Table
    spec: ViewSpec
    workers: int
    """Rendering processes; 0 renders here."""


class _NotUsableError(Exception):
    """Outputs that are not finite, or that no codec but float32 stores; the text says which."""


def calibrate(
    config: ExtractConfig,
    teacher: Teacher,
    photographs: Photographs,
    codecs: dict[str, str],
    progress: Progress | None = None,
) -> Calibration:
    """Run the teacher over calibration views: their size, its speed and precision, and tokens to fit codecs to.

    The teacher is on the CPU afterwards: the process that only plans, and then starts others, holds no GPU memory.

    Args:
        config: as asked for.
        teacher: in any precision, on any device.
        photographs: of the cache.
        codecs: target to the codec that it will have.
        progress: of the views that `int4` and `klt` want.

    Raises:
        ProteusCacheError: no image can be used, or the outputs are not finite in any precision.
    """
    device = use_device(config.device)
    pixels, view_bytes = first_views(photographs.root, photographs.table, photographs.spec)
    why = ""
    try:
        for precision in _precisions(config, device):
            teacher.to(device, precision)
            try:
                tokens, views_per_s = _first_tokens(config, teacher, pixels, codecs)
                canary = _canary(config, teacher, tokens)
                tokens |= _many_tokens(config, teacher, photographs, codecs, progress)
            except _NotUsableError as error:
                why = str(error)
                logger.warning("teacher=%s precision=%s: %s", teacher.identity.name, precision, why)
                continue
            return Calibration(tokens, precision, view_bytes, views_per_s, canary)
    finally:
        teacher.to("cpu", "fp32")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise ProteusCacheError(
        f"{teacher.identity.name}: {why} (or beyond 65,504, which only --codec float32 stores), in fp32 too; "
        "check --weights"
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
    for row in table.slice(0, _FIRST_IMAGES).to_pylist():
        try:
            view = make_view(root / row["path"], row["path"], row["key"], row["label"], "v000", spec)
        except BadImageError as error:
            failed = error
            continue
        pixels.append(torch.from_numpy(view.pixels))
        sizes.append(tar.member_bytes(len(view.data)) + tar.member_bytes(len(view.sample_json)))
    if not pixels:
        raise ProteusCacheError(
            f"none of the first {len(table.slice(0, _FIRST_IMAGES))} images can be used; the last: {failed}. "
            "Check that --images names photographs (JPEG or PNG files)"
        )
    return torch.stack(pixels), sum(sizes) / len(sizes)


def _first_tokens(
    config: ExtractConfig, teacher: Teacher, pixels: Tensor, codecs: dict[str, str]
) -> tuple[dict[str, Tensor], float]:
    """Targets of the first views on the CPU, and views/s of the forwards but the first, which warms up."""
    batches = torch.split(pixels, _at_once(config))
    parts: list[dict[str, Tensor]] = []
    seconds = 0.0
    for number, batch in enumerate(batches):
        started = time.monotonic()
        parts.append(_targets(teacher, batch, list(codecs)))
        seconds += time.monotonic() - started if number or len(batches) == 1 else 0.0
    timed = len(pixels) - (len(batches[0]) if len(batches) > 1 else 0)
    tokens = {name: torch.cat([part[name] for part in parts]) for name in codecs}
    if not all(_are_usable(tokens[name], codec) for name, codec in codecs.items()):
        raise _NotUsableError("its outputs on the planning batch are not finite")
    return tokens, timed / max(seconds, 1e-9)


def _canary(config: ExtractConfig, teacher: Teacher, tokens: dict[str, Tensor]) -> CanaryRecord:
    canary = record_canary(teacher, tokens, _at_once(config))
    if canary is None:
        raise _NotUsableError("its outputs on the canary images are not finite")
    return canary


def _many_tokens(
    config: ExtractConfig,
    teacher: Teacher,
    photographs: Photographs,
    codecs: dict[str, str],
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Tokens of as many views as the codecs that follow their distribution want; nothing where there is none."""
    codecs = {name: codec for name, codec in codecs.items() if wants_many_views(codec)}
    if not codecs:
        return {}
    shapes = {name: teacher.target_shape(name) for name in codecs}
    trained = trained_rows(len(photographs.table), config.shard_size or DEFAULT_SHARD_SIZE, config.seed or 0)
    wanted = min(config.calibration_images or enough_images(shapes), len(trained))
    room = room_for(shapes, wanted, available_memory(), codecs)
    if room.n_views < wanted:
        _warn_of_memory(room, wanted)
    first = trained[spread(room.n_views, len(trained))]
    others = iter(np.setdiff1d(trained, first))  # stand in for bad images
    store, rows = TokenStore(shapes, room), [int(row) for row in first]
    while rows:
        _add_views(config, teacher, photographs, rows, codecs, store, progress)
        rows = [int(row) for row in islice(others, store.n_missing)]
    return store.tokens()


def _warn_of_memory(room: Room, wanted: int) -> None:
    logger.warning(
        "memory holds the tokens of %s of the %s calibration views: at most 1/%d of the %s that are free is used",
        *(f"{room.n_views:,}", f"{wanted:,}", MEMORY_SHARE, human_bytes(available_memory())),
    )


def _add_views(
    config: ExtractConfig,
    teacher: Teacher,
    photographs: Photographs,
    rows: Sequence[int],
    codecs: dict[str, str],
    store: TokenStore,
    progress: Progress | None,
) -> None:
    """Render these images and keep what the teacher says of them; bad ones are left out."""
    at_once, n_all = _at_once(config), store.n_views + store.n_missing
    rendered = render_jobs(
        _jobs(photographs.table, rows, at_once),
        photographs.root,
        photographs.spec,
        workers=0 if len(rows) <= _FEW else photographs.workers,
        batch_size=at_once,
        pin=False,
    )
    with closing(rendered):
        for batch in rendered:
            if batch.views:
                tokens = _targets(teacher, torch.as_tensor(batch.pixels), list(codecs))
                _check_usable(tokens, codecs, [view.key for view in batch.views])
                store.add(tokens)
            if progress is not None:
                progress(store.n_views, n_all)


def _jobs(table: pa.Table, rows: Sequence[int], at_once: int) -> Iterator[Job]:
    for start in range(0, len(rows), at_once):
        part = list(rows[start : start + at_once])
        images = table.take(pa.array(part, type=pa.int64()))
        yield Job(
            view="v000",
            shard=0,
            rows=part,
            keys=images["key"].to_pylist(),
            paths=images["path"].to_pylist(),
            labels=images["label"].to_pylist(),
            is_last=start + at_once >= len(rows),
        )


def _check_usable(tokens: dict[str, Tensor], codecs: dict[str, str], keys: list[str]) -> None:
    for name, codec in codecs.items():
        if not _are_usable(tokens[name], codec):
            number = next(n for n, view in enumerate(tokens[name]) if not _are_usable(view, codec))
            raise _NotUsableError(f"its {name} tokens of calibration view v000/{keys[number]} are not finite")


def _at_once(config: ExtractConfig) -> int:
    return min(_AT_ONCE, config.batch_size or _AT_ONCE)


def _targets(teacher: Teacher, batch: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    return or_explain(
        lambda: {name: value.float().cpu() for name, value in teacher.targets(batch, names).items()},
        len(batch),
        lambda n: teacher.targets(batch[:n], names),
        smaller_batch(len(batch)),
    )


def _are_usable(tokens: Tensor, codec: str) -> bool:
    return bool(tokens.abs().amax() <= largest_value(codec))  # false for NaN
