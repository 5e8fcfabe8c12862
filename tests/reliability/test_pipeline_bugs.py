"""I3: bugs between the stages, put into the real code: extract, verify, pack, verify, train. Each is caught.

What carries the proof from the teacher to the batch: the CRC-32C of every code and the digest of every view in the
receipt, the key in every document, the record table of the pack. A bug in front of the receipt, where codes are still
nobody's, is seen only by computing them again: extract looks once more at one view of every unit, and
`verify --recompute` at as many as it is told. The first is off in the table of bugs, so that it hides nothing.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import Finding, verify_cache
from proteus_cache.cache.writer import Unit, commit_unit, publish_arrays
from proteus_cache.errors import ProteusCacheError
from proteus_cache.extract import canary, pipeline
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.pack import build
from proteus_cache.pack import unit as packing
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.index import seal_records
from proteus_cache.pack.recode import Recoded, Recoding
from proteus_cache.pack.verify import verify_pack
from proteus_cache.pack.writer import make_records, tar_buffers
from proteus_cache.processes import Worker
from proteus_cache.recompute.run import recompute
from tests.makers import make_config, run_extract
from tests.reliability.reading import batches_of

N_BUGS = 19
"""Twelve kinds of mistakes, six of them both in extract and in pack."""
N_IMAGES, SHARD_SIZE = 6, 2
N_RECOMPUTED = 2 * N_IMAGES
STAGES = ("extract", "verify cache", "recompute", "pack", "verify pack", "train")
Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Bug:
    """A mistake in one stage, and where it shows."""

    name: str
    seeded_in: Literal["extract", "pack"]
    put_in: Callable[[Patch], None]
    caught_by: tuple[str, ...]
    """All stages that complain, when each is run on what those before have left, and extract does not look twice."""
    message: str
    """Of the first of them."""


def _unit_changed(patch: Patch, change: Callable[[Unit], Unit]) -> None:
    """Units are changed on their way from the teacher to the disk."""
    real = commit_unit

    def commit(layout: Any, manifest: Any, digest: str, zarr: Any, unit: Unit, **more: Any) -> Any:  # as the real one
        changed = change(unit)
        return real(layout, manifest, digest, publish_arrays(layout, manifest, changed.view), changed, **more)

    patch.setattr(pipeline, "commit_unit", commit)


def _encoding_changed(
    patch: Patch, change: Callable[[Any, torch.Tensor], tuple[Any, torch.Tensor]], only: tuple[str, int] | None = None
) -> None:
    """The teacher's stage gets other views, or puts its codes elsewhere."""
    real = pipeline._Pipeline._encode_at_once

    def encode(self: Any, unit: Any, pixels: torch.Tensor, rows: list[int]) -> None:
        if only in (None, (unit.view, unit.shard)):
            unit, pixels = change(unit, pixels)
        real(self, unit, pixels, rows)

    patch.setattr(pipeline._Pipeline, "_encode_at_once", encode)


def wrong_view_index(patch: Patch) -> None:
    _unit_changed(patch, lambda unit: replace(unit, view="v001" if unit.view == "v000" else "v000"))


def wrong_shard(patch: Patch) -> None:
    def change(unit: Unit) -> Unit:
        by = {0: 1, 1: -1}.get(unit.shard, 0)
        rows = by * SHARD_SIZE
        views = [replace(view, row=view.row + rows) for view in unit.views]
        return replace(
            unit,
            shard=unit.shard + by,
            first_row=unit.first_row + rows,
            end_row=unit.end_row + rows,
            views=views,
        )

    _unit_changed(patch, change)


def view_dropped(patch: Patch) -> None:
    _unit_changed(patch, lambda unit: replace(unit, views=unit.views[:-1]))


def bytes_reversed(patch: Patch) -> None:
    _unit_changed(
        patch, lambda unit: replace(unit, codes={name: codes[:, ::-1].copy() for name, codes in unit.codes.items()})
    )


def stale_buffer(patch: Patch) -> None:
    """The codes of one unit go elsewhere, so that its buffer still holds those of a unit before."""

    def change(unit: Any, pixels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        return replace(unit, codes={name: codes.clone() for name, codes in unit.codes.items()}), pixels

    _encoding_changed(patch, change, only=("v001", 0))


def out_of_step(patch: Patch) -> None:
    _encoding_changed(patch, lambda unit, pixels: (unit, pixels.roll(1, 0)))


def targets_exchanged(patch: Patch) -> None:
    def change(unit: Any, pixels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        codes = unit.codes | {"block.0": unit.codes["block.1"], "block.1": unit.codes["block.0"]}
        return replace(unit, codes=codes), pixels

    _encoding_changed(patch, change)


def rows_permuted(patch: Patch) -> None:
    real = zarr_arrays.shard_buffers
    patch.setattr(zarr_arrays, "shard_buffers", lambda target, size, codes: real(target, size, codes[::-1].copy()))


def _job_changed(patch: Patch, change: Callable[[Any], Any]) -> None:
    real = build._job
    patch.setattr(build, "_job", lambda *args: change(real(*args)))


def _samples_changed(patch: Patch, change: Callable[[list[Any]], list[Any]]) -> None:
    real = packing._samples

    def samples(*args: Any) -> Any:  # as the real one
        found, widened = real(*args)
        return change(found), widened

    patch.setattr(packing, "_samples", samples)


def _views_changed(patch: Patch, change: Callable[[list[bytes]], list[bytes]]) -> None:
    real = Cache.read_views

    def read(self: Cache, view: str, shard: int) -> dict[str, tuple[bytes, bytes]]:
        members = real(self, view, shard)
        views = change([data for data, _ in members.values()])
        return {key: (view, json) for view, (key, (_, json)) in zip(views, members.items(), strict=True)}

    patch.setattr(Cache, "read_views", read)


def _codes_changed(patch: Patch, change: Callable[[Callable[[str], Any], str], Any]) -> None:
    """Packing gets other codes than it asks for."""
    real = Cache.read_codes

    def read(self: Cache, view: str, shard: int, target: str) -> Any:  # an array
        return change(lambda name: real(self, view, shard, name), target)

    patch.setattr(Cache, "read_codes", read)


def labels_mispaired(patch: Patch) -> None:
    _job_changed(patch, lambda job: replace(job, labels=job.labels[1:] + job.labels[:1]))


def labels_mispaired_in_records(patch: Patch) -> None:
    _records_changed(patch, "label", lambda values: np.roll(values, 1))


def codes_swapped(patch: Patch) -> None:
    _codes_changed(patch, lambda read, name: read(name)[::-1])


def codes_of_another_target(patch: Patch) -> None:
    other = {"block.0": "block.1", "block.1": "block.0"}
    _codes_changed(patch, lambda read, name: read(other.get(name, name)))


def sample_dropped(patch: Patch) -> None:
    _samples_changed(patch, lambda samples: samples[:-1])


def sample_duplicated(patch: Patch) -> None:
    _samples_changed(patch, lambda samples: [*samples, samples[-1]])


def sample_twice_in_tar(patch: Patch) -> None:
    real = tar_buffers
    patch.setattr(packing, "tar_buffers", lambda samples, extension: real([*samples, samples[-1]], extension))


def views_out_of_step(patch: Patch) -> None:
    _views_changed(patch, lambda views: views[1:] + views[:1])


def view_encoded_again(patch: Patch) -> None:
    def again(data: bytes) -> bytes:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).save(buffer, "JPEG", quality=90, subsampling=0)
        return buffer.getvalue()

    _views_changed(patch, lambda views: [again(view) for view in views])


def codes_reversed(patch: Patch) -> None:
    real = Recoding.apply

    def apply(self: Recoding, codes: Any, keys: Any) -> Recoded:  # as the real one
        recoded = real(self, codes, keys)
        return replace(recoded, codes=[code[::-1].copy() for code in recoded.codes])

    patch.setattr(Recoding, "apply", apply)


def _records_changed(patch: Patch, field: str, change: Callable[[Any], Any]) -> None:
    real = make_records

    def make(*args: Any) -> Any:  # as the real one
        records = real(*args)
        records[field] = change(records[field])
        return seal_records(records)

    patch.setattr(packing, "make_records", make)


def offsets_of_another_tar(patch: Patch) -> None:
    _records_changed(patch, "tar", lambda tars: (tars + 1) % 3)


NOT_OF_RECEIPT = "does not belong to this receipt and image list"
CHANGED = "its codes changed on their way into the pack"
NOT_THE_TEACHERS = "is not what the teacher says of this view"
IN_PACK = ("pack",)
IN_THE_PACK = ("verify pack",)
AFTER_EXTRACT = ("verify cache", "pack")
RECOMPUTED = ("recompute",)
BUGS = (
    Bug("labels mis-paired", "pack", labels_mispaired, IN_PACK, NOT_OF_RECEIPT),
    Bug(
        "labels mis-paired in the index", "pack", labels_mispaired_in_records, IN_THE_PACK, "belongs to another sample"
    ),
    Bug("codes of two samples swapped", "pack", codes_swapped, IN_PACK, CHANGED),
    Bug("a sample dropped", "extract", view_dropped, ("extract",), "its rows are not those of the unit"),
    Bug("a sample dropped", "pack", sample_dropped, IN_PACK, "would not hold the samples of its receipt"),
    Bug("a sample duplicated", "pack", sample_duplicated, IN_PACK, "would not hold the samples of its receipt"),
    Bug("a sample twice in the tar", "pack", sample_twice_in_tar, ("verify pack", "train"), "index record|as long as"),
    Bug("views and codes out of step", "extract", out_of_step, RECOMPUTED, NOT_THE_TEACHERS),
    Bug("views and codes out of step", "pack", views_out_of_step, IN_THE_PACK, "other pixels than the teacher saw"),
    Bug("two targets exchanged", "extract", targets_exchanged, RECOMPUTED, NOT_THE_TEACHERS),
    Bug("two targets exchanged", "pack", codes_of_another_target, IN_PACK, CHANGED),
    Bug("wrong view index", "extract", wrong_view_index, AFTER_EXTRACT, "is not the document of this view"),
    Bug("wrong shard", "extract", wrong_shard, AFTER_EXTRACT, "names other images than the list"),
    Bug("stale buffer", "extract", stale_buffer, RECOMPUTED, NOT_THE_TEACHERS),
    Bug("rows permuted in Zarr", "extract", rows_permuted, AFTER_EXTRACT, "codes of .* are not those of the receipt"),
    Bug("view encoded again", "pack", view_encoded_again, IN_THE_PACK, "other pixels than the teacher saw"),
    Bug("offsets of another tar", "pack", offsets_of_another_tar, ("verify pack", "train"), "order of the tars"),
    Bug("byte order reversed", "extract", bytes_reversed, RECOMPUTED, NOT_THE_TEACHERS),
    Bug("byte order reversed", "pack", codes_reversed, IN_PACK, CHANGED),
)


@dataclass(frozen=True, slots=True)
class World:
    """A cache without any bug, and what training gets from its pack."""

    config: ExtractConfig
    batches: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("right")
    targets = ("cls", "patch", "block.0", "block.1")
    config = make_config(folder, N_IMAGES, shard_size=SHARD_SIZE, targets=targets, codec="float16")
    run_extract(config)
    return World(config, batches_of(build_pack(config.out, folder / "pack", workers=1).path))


def complaints(world: World, bug: Bug | None, folder: Path, patch: Patch, looks_twice: bool = False) -> dict[str, str]:
    """Stage to its first complaint, of all stages one after the other, with a bug in one of them."""
    cache, pack = folder / "cache", folder / "pack"
    found: dict[str, str] = {}

    def stage(name: str, run: Callable[[], object]) -> None:
        try:
            result = run()
        except ProteusCacheError as error:
            found[name] = str(error)
        else:
            findings = [f for f in result if isinstance(f, Finding)] if isinstance(result, list) else []
            if findings:
                found[name] = findings[0].problem

    if bug is not None and bug.seeded_in == "extract":
        config = replace(world.config, out=cache)
        planned = plan_cache(config)
        with patch.context() as only_here:
            bug.put_in(only_here)
            if not looks_twice:
                only_here.setattr(canary, "check_one_view", lambda *_: None)
            stage("extract", lambda: extract(config, planned, Worker(0, 1), lambda _: None))
        if found:
            return found
    else:
        shutil.copytree(world.config.out, cache)
    stage("verify cache", lambda: verify_cache(cache, read_data=True))
    if not found:
        stage("recompute", lambda: recomputed(world, cache))
    with patch.context() as only_here:
        if bug is not None and bug.seeded_in == "pack":
            bug.put_in(only_here)
        stage("pack", lambda: build_pack(cache, pack, workers=1))
    if "pack" not in found:
        stage("verify pack", lambda: verify_pack(pack, read_data=True))
        stage("train", lambda: batches_of(pack))
    return found


def recomputed(world: World, cache: Path) -> list[Finding]:
    weights, home = world.config.weights, world.config.home
    return recompute(cache, N_RECOMPUTED, seed=0, weights=weights, home=home, device="cpu").findings


def test_without_a_bug_no_stage_complains(world: World, tmp_path: Path, monkeypatch: Patch) -> None:
    assert complaints(world, None, tmp_path, monkeypatch) == {}
    assert batches_of(tmp_path / "pack") == world.batches


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.name} in {bug.seeded_in}".replace(" ", "-"))
def test_every_bug_is_caught(bug: Bug, world: World, tmp_path: Path, monkeypatch: Patch) -> None:
    found = complaints(world, bug, tmp_path, monkeypatch)

    assert tuple(sorted(found, key=STAGES.index)) == bug.caught_by, found
    first = found[bug.caught_by[0]]
    assert re.search(bug.message, first), first


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.seeded_in == "extract"], ids=lambda bug: bug.name)
def test_extract_stops_at_its_own_bugs_when_it_looks_twice(
    bug: Bug, world: World, tmp_path: Path, monkeypatch: Patch
) -> None:
    found = complaints(world, bug, tmp_path, monkeypatch, looks_twice=True)

    assert list(found) == ["extract"]
    assert re.search(f"{NOT_THE_TEACHERS}|{bug.message}|cannot read: No such file", found["extract"]), found
