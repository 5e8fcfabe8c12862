"""Small real worlds in which a crash costs milliseconds: a cache whose units are rendered beforehand, a pack, a run.

`prepare` extracts a tiny cache for real and keeps its units in memory. `extract_prepared` then does all that a start
of `extract` does to a disk (plan, arrays, units, finish) through the product's own functions; only the teacher and the
renderer are replaced by what they said before. `pack_prepared` packs for real. `save_checkpoint` writes
checkpoints whose tensors all hold the number of their step. `tests.makers.run_extract` is the real thing,
teacher and all, at about a second a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from proteus_cache import storage
from proteus_cache.cache.layout import CacheLayout
from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.cache.writer import StoredView, Unit, commit_unit, publish_arrays
from proteus_cache.extract import planning, run
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import PlannedCache
from proteus_cache.extract.run import ExtractResult
from proteus_cache.pack.build import PackReport, build_pack
from proteus_cache.processes import Worker
from proteus_cache.train.checkpoint import (
    TENSOR_FILES,
    CheckpointState,
    clear_unfinished,
    newest_checkpoint,
    write_checkpoint,
)
from tests.makers import identity, make_cache

N_IMAGES, SHARD_SIZE, N_VIEWS = 5, 2, 2
N_UNITS, LAST_UNIT = 6, "v001/2"
CHECKPOINT_STEPS = (1, 2, 3, 4)
KEPT_CHECKPOINTS = 2

_Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A finished cache, and all that it takes to make it again without a teacher."""

    path: Path
    """The finished cache."""
    manifest: Manifest
    plan_files: dict[str, bytes]
    """Digest and suffix to the image list and the codecs' parameters."""
    units: dict[tuple[str, int], Unit]
    n_views: int
    identity: dict[str, list[object]]
    """`makers.identity`: what every other extraction of these images must come to."""


def prepare(folder: Path, *, n_images: int = N_IMAGES, n_views: int = N_VIEWS) -> Prepared:
    """Extract a tiny cache into `folder` for real: `N_UNITS` units of `SHARD_SIZE` images unless told otherwise."""
    cache = make_cache(folder, n_images, views=n_views, shard_size=SHARD_SIZE)
    blobs = {t.codec.parameters: cache.parameters_blob(t) for t in cache.manifest.targets if t.codec.parameters}
    plan_files = {f"{cache.manifest.images.sha256}.parquet": cache.layout.images.read_bytes()}
    plan_files |= {f"{digest}.safetensors": blob for digest, blob in blobs.items() if blob is not None}
    units = {(view, shard): _unit(cache, view, shard) for view in cache.views() for shard in cache.units(view)}
    return Prepared(cache.path, cache.manifest, plan_files, units, n_views, identity(cache))


def _unit(cache: Cache, view: str, shard: int) -> Unit:
    receipt = cache.receipt(view, shard)
    assert receipt is not None
    samples, members = receipt.samples, cache.read_views(view, shard)
    columns = zip(samples.rows, samples.keys, samples.view_digests, samples.source_sha256, strict=True)
    return Unit(
        view=view,
        shard=shard,
        first_row=receipt.first_row,
        end_row=receipt.end_row,
        views=[
            StoredView(
                row=row, key=key, data=members[key][0], digest=digest, source_sha256=source, sample_json=members[key][1]
            )
            for row, key, digest, source in columns
        ],
        codes={target.name: cache.read_codes(view, shard, target.name) for target in cache.manifest.targets},
        quarantined=list(receipt.quarantined),
        moments=receipt.moments,
        widened=receipt.widened,
        precision=receipt.precision,
        made_with=receipt.made_with,
    )


def extract_prepared(
    out: Path, prepared: Prepared, worker: Worker | None = None, report: _Report = lambda _: None
) -> ExtractResult:
    """One start of `extract` into `out`: plan it unless that is done, commit what is missing, finish.

    Args:
        out: the cache's folder.
        prepared: what rendering and teacher say.
        worker: which share of the units; None does all.
        report: called with "planned", "arrays", "committed v000/1" after each unit, and "finished" with nothing left.

    Raises:
        ProteusCacheError: as `plan_cache` and `extract`.
    """
    layout = CacheLayout(out)
    if planning._existing(layout) is None:
        planning.publish_plan(layout, prepared.plan_files, prepared.manifest)
    planning.finish_plan(layout)
    report("planned")
    cache = open_cache(out)
    nothing = cast(Any, None)  # what only the teacher and the renderer would ask for
    planned = PlannedCache(
        cache=cache,
        teacher=nothing,
        spec=nothing,
        codecs={},
        image_root=out,
        is_new=False,
        view_bytes=None,
        views_per_s=None,
    )
    config = ExtractConfig(
        images=out, out=out, home=out, views=prepared.n_views, device="cpu", precision="fp32", workers=0
    )

    def commit_all(planned: PlannedCache, todo: list[tuple[str, int]], **_: object) -> int:
        zarr = {view: publish_arrays(layout, cache.manifest, view) for view in dict.fromkeys(v for v, _ in todo)}
        report("arrays")
        for view, shard in todo:
            commit_unit(layout, cache.manifest, cache.manifest_digest, zarr[view], prepared.units[view, shard])
            report(f"committed {view}/{shard}")
        return len(todo)

    with mock.patch.object(run, "extract_units", commit_all):
        result = run.extract(config, planned, worker or Worker(0, 1), lambda _: None)
    if not result.units_left:
        report("finished")
    return result


def pack_prepared(cache: Path, out: Path, *, move: bool = False) -> PackReport:
    """One start of `pack`, with one thread, so that its operations come in one order."""
    return build_pack(cache, out, move=move, workers=1)


def save_checkpoint(checkpoints: Path, step: int, *, keep: int = KEPT_CHECKPOINTS, after: int | None = None) -> Path:
    """Write the checkpoint of one step; every number in it is the step."""
    state = CheckpointState(
        step=step,
        config={"student": "vit_s14"},
        data={"pack digest": "p"},
        precision="fp32",
        world_size=1,
        scaler=None,
        files={},
    )
    tensors = {name: {"weight": torch.full((64,), float(step))} for name in TENSOR_FILES}
    return write_checkpoint(checkpoints, state, tensors, keep=keep, after=after)


def train_prepared(
    run_folder: Path,
    steps: tuple[int, ...] = CHECKPOINT_STEPS,
    report: _Report = lambda _: None,
    *,
    keep: int = KEPT_CHECKPOINTS,
) -> int:
    """What one start of `train --resume` does to the checkpoints; returns the step that it went on from.

    Reports "found 2" before anything is written, and "saved 3" after each checkpoint.
    """
    checkpoints = run_folder / "checkpoints"
    found = newest_checkpoint(checkpoints)
    first = found.state.step if found else 0
    report(f"found {first}")
    storage.make_folder(run_folder)
    clear_unfinished(checkpoints, first, keep=keep)
    last = first
    for step in steps:
        if step > first:
            save_checkpoint(checkpoints, step, keep=keep, after=last)
            report(f"saved {step}")
            last = step
    return first
