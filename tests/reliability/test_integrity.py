"""I1 and I2: every flipped bit and every cut, swapped, copied or lost file is found, by verify and by training.

The worlds are real: a tiny cache, its pack, and a run trained on it. For each kind of byte in them, bits are flipped
one by one. `verify --read-data` must find each, and name it. Training on a pack must find each flip of a byte that it
uses, and must return the very same batches after any other. The same goes for packing a cache.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.reader import open_cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.verify import Finding, verify_cache
from proteus_cache.documents import Document
from proteus_cache.errors import DamageError, ProteusCacheError, UsageError
from proteus_cache.evaluate.models import load_run
from proteus_cache.pack.index import RECORD, RECORD_BYTES, seal_records
from proteus_cache.pack.verify import verify_pack
from proteus_cache.train.loop import train
from proteus_cache.train.verify import verify_run
from tests.makers import make_cache
from tests.reliability import damage, worlds
from tests.reliability.damage import (
    CACHE_KINDS,
    PACK_KINDS,
    PACK_KINDS_TRAINED_ON,
    RUN_KINDS,
    Changes,
    Flip,
    Region,
    changed,
    flipped,
    flips_of,
)
from tests.reliability.invariants import digests_below, files_below
from tests.reliability.reading import batches_of
from tests.train.runs import run_config, tiny_student

SEED = 20261121
N_FLIPS = 2_016
"""Over the 28 kinds of bytes of cache, pack and run, in equal shares."""
N_FLIPS_PER_KIND = N_FLIPS // (len(CACHE_KINDS) + len(PACK_KINDS) + len(RUN_KINDS))
N_FLIPS_PACKED_PER_KIND = 12
"""Of the flips of a kind, those after which the cache is packed as well."""
N_VERIFIED_OF_EVERY_BIT = 48
"""Of all the bits of the smallest manifest and receipt, those for which the whole verify is asked as well."""
N_RANDOM_CUTS = 200
N_CACHE_CASES, N_PACK_CASES, N_RUN_CASES = 440, 285, 55
"""Damaged files at least; the sizes of JPEG views decide how many cuts there are."""
N_RUN_STEPS = 3


@dataclass(frozen=True, slots=True)
class World:
    """Whole stores, and what reading them gives."""

    prepared: worlds.Prepared
    cache: Path
    pack: Path
    run: Path
    packed: dict[str, str]
    """Path to digest of the pack's files."""
    trained_on: list[str]
    """Digests of all batches of the pack."""


@pytest.fixture(scope="module")
def folder(shared_fast_folder: Path) -> Path:
    """In memory where there is such a place."""
    return shared_fast_folder


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    """A cache with both kinds of codes, its pack, and a run with checkpoints and final weights."""
    prepared = worlds.prepare(folder / "prepared")
    cache = prepared.path
    pack = worlds.pack_prepared(cache, folder / "pack").path
    with tiny_student():
        train(run_config(pack, folder / "run", max_steps=N_RUN_STEPS, checkpoint_every=1, ema_decay=0.9))
    return World(prepared, cache, pack, folder / "run", digests_below(pack), batches_of(pack))


def found_by(verify: Callable[[], list[Finding]]) -> str:
    """What verify says, or the error that it ends with; nothing when all is well."""
    try:
        return "\n".join(f"{finding.path} {finding.unit}: {finding.problem}" for finding in verify())
    except DamageError as error:
        return str(error)


def is_named(path: str, text: str) -> bool:
    """Whether the file, or the unit that it belongs to, is named."""
    return path in text or (unit_of(path) or path) in text


def unit_of(path: str) -> str | None:
    """ "targets.zarr/v000/cls/c/1/0" to "v000/s00001"."""
    parts = path.split("/")
    if parts[0] == "targets.zarr" and "c" in parts:
        return f"{parts[1]}/s{int(parts[4]):05d}"
    stem = "/".join(parts[-2:]).rpartition(".")[0]
    return stem if stem.startswith("v") and "/s" in stem else None


# --- I1: flipped bits ------------------------------------------------------------------------------------------------


def test_regions_cover_every_byte_of_the_stores(world: World) -> None:
    cache, pack, run = (
        damage.regions_of_cache(world.cache),
        damage.regions_of_pack(world.pack),
        damage.regions_of_run(world.run),
    )

    assert {region.kind for region in cache} == set(CACHE_KINDS)
    assert {region.kind for region in pack} == set(PACK_KINDS)
    assert {region.kind for region in run} == set(RUN_KINDS)
    assert damage.uncovered(world.cache, cache) == damage.uncovered(world.pack, pack) == []
    logs = [path for path in files_below(world.run) if not path.endswith((".json", ".safetensors"))]
    assert set(damage.uncovered(world.run, run)) == set(logs)
    assert N_FLIPS_PER_KIND * (len(CACHE_KINDS) + len(PACK_KINDS) + len(RUN_KINDS)) == N_FLIPS


def test_whole_stores_are_found_whole(world: World) -> None:
    assert found_by(lambda: verify_cache(world.cache, read_data=True)) == ""
    assert found_by(lambda: verify_pack(world.pack, read_data=True)) == ""
    assert found_by(lambda: verify_run(world.run, True)) == ""
    assert batches_of(world.pack) == world.trained_on


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_every_flip_in_a_cache_is_found(kind: str, world: World, folder: Path) -> None:
    regions = damage.regions_of_cache(world.cache)
    for number, flip in enumerate(_flips(regions, kind)):
        with flipped(world.cache, flip):
            text = found_by(lambda: verify_cache(world.cache, read_data=True))
            assert text, f"verify does not find {flip}"
            assert is_named(flip.path, text), f"{flip}: {text}"
            if number < N_FLIPS_PACKED_PER_KIND:
                assert_packing_notices(world, folder / "again", flip, kind)


def assert_packing_notices(world: World, out: Path, flip: Flip, kind: str) -> None:
    """A cache with damage is not packed; or gives the same pack, where packing does not look at that file."""
    try:
        worlds.pack_prepared(world.cache, out)
    except DamageError:
        assert kind not in ("group metadata", "array metadata")
    else:
        assert digests_below(out) == world.packed, f"packing takes {flip}"
        assert kind in ("group metadata", "array metadata"), f"packing does not notice {flip}"
    finally:
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("kind", PACK_KINDS)
def test_every_flip_in_a_pack_is_found(kind: str, world: World) -> None:
    regions = damage.regions_of_pack(world.pack)
    for flip in _flips(regions, kind):
        with flipped(world.pack, flip):
            text = found_by(lambda: verify_pack(world.pack, read_data=True))
            assert text, f"verify does not find {flip}"
            assert is_named(flip.path, text), f"{flip}: {text}"
            if kind in PACK_KINDS_TRAINED_ON:
                with pytest.raises(DamageError) as caught:
                    batches_of(world.pack)
                assert is_named(flip.path, str(caught.value)), f"{flip}: {caught.value}"
            else:
                assert batches_of(world.pack) == world.trained_on, f"{flip} changes what training gets"


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_every_flip_in_a_run_is_found(kind: str, world: World) -> None:
    regions = damage.regions_of_run(world.run)
    for flip in _flips(regions, kind):
        with flipped(world.run, flip):
            text = found_by(lambda: verify_run(world.run, True))
            assert text, f"verify does not find {flip}"
            assert flip.path.rpartition("/")[2] in text, f"{flip}: {text}"


def test_damaged_weights_are_not_evaluated(world: World) -> None:
    regions = [region for region in damage.regions_of_run(world.run) if region.path == "student.safetensors"]
    for flip in flips_of(regions, "final weights", N_VERIFIED_OF_EVERY_BIT, SEED + 3):
        with flipped(world.run, flip), pytest.raises(DamageError, match=r"student\.safetensors: .*; run the same"):
            load_run(world.run, world.run)


def _flips(regions: list[Region], kind: str) -> list[Flip]:
    return flips_of(regions, kind, N_FLIPS_PER_KIND, SEED)


@pytest.mark.parametrize(
    ("kind", "document"), [("manifest", Manifest), ("receipt", Receipt)], ids=["manifest", "receipt"]
)
def test_every_bit_of_the_smallest_document_counts(kind: str, document: type[Document], world: World) -> None:
    regions = [region for region in damage.regions_of_cache(world.cache) if region.kind == kind]
    smallest = min(regions, key=lambda region: region.end)
    data = (world.cache / smallest.path).read_bytes()
    missed = []
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            document.parse(bytes(damaged), smallest.path)
        except DamageError:
            continue
        missed.append(place)
    assert missed == [], f"bits of {smallest.path}"
    for flip in flips_of([smallest], kind, N_VERIFIED_OF_EVERY_BIT, SEED + 1):
        with flipped(world.cache, flip):
            assert is_named(flip.path, found_by(lambda: verify_cache(world.cache, read_data=True)))


# --- I2: damaged, swapped, copied and lost files ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One damaged store."""

    name: str
    changes: Changes
    named: frozenset[str]
    """Files of which a finding must name one, or its unit."""


def case(name: str, changes: Changes, *named: str) -> Case:
    return Case(name, changes, frozenset(named or changes))


def cuts_at_blocks(root: Path, paths: list[str]) -> Iterator[Case]:
    """Every file cut at every multiple of 512 bytes."""
    for path in paths:
        data = (root / path).read_bytes()
        for end in range(0, len(data), 512):
            yield case(f"{path} cut at {end}", {path: data[:end]})


def random_cuts(root: Path, paths: list[str], n: int, seed: int) -> Iterator[Case]:
    """Files cut anywhere."""
    rng = np.random.default_rng(seed)
    for path in rng.choice(paths, n):
        data = (root / path).read_bytes()
        end = int(rng.integers(0, len(data)))
        yield case(f"{path} cut at {end}", {str(path): data[:end]})


def junk_and_holes(root: Path, paths: list[str], seed: int) -> Iterator[Case]:
    """Bytes appended, a page of zeros, a file that is gone, and one that is there twice."""
    rng = np.random.default_rng(seed)
    for path in paths:
        data = (root / path).read_bytes()
        page = int(rng.choice([page for page in range(0, len(data), 4096) if any(data[page : page + 4096])]))
        junk = bytes(512) if path.endswith(".tar") else rng.bytes(100)
        yield case(f"{path} with junk", {path: data + junk})
        yield case(f"{path} with zeros at {page}", {path: damage.zeroed(data, page, 4096)})
        yield case(f"{path} deleted", {path: None})
        if not path.startswith("checkpoints/"):
            copy = f"{path}.copy" if "/c/" not in path else f"{path}9"
            yield case(f"{path} duplicated", {copy: data})


def swaps(root: Path, paths: list[str]) -> Iterator[Case]:
    """Each two files after each other in a list under each other's name."""
    for one, other in pairwise(paths):
        if (root / one).read_bytes() != (root / other).read_bytes():
            yield case(f"{one} and {other} swapped", damage.swapped(root, one, other))


def of_kind(paths: list[str], *parts: str) -> list[str]:
    return [path for path in paths if all(part in path for part in parts)]


def cache_swaps(root: Path) -> Iterator[Case]:
    """Tars, Zarr shard files and receipts of other units and targets; two chunks of one Zarr shard file."""
    paths = files_below(root)
    yield from swaps(root, of_kind(paths, "views/"))
    yield from swaps(root, of_kind(paths, "receipts/"))
    for target in ("cls", "patch"):
        yield from swaps(root, of_kind(paths, f"/{target}/c/"))
    for view in ("v000", "v001"):
        for one, other in zip(of_kind(paths, view, "/cls/c/"), of_kind(paths, view, "/patch/c/"), strict=True):
            yield case(f"{one} and {other} swapped", damage.swapped(root, one, other))
        yield from swaps(root, of_kind(paths, view, "zarr.json"))
    for path in of_kind(paths, "/patch/c/"):
        data = (root / path).read_bytes()
        chunk = (len(data) - 16 * worlds.SHARD_SIZE - 4) // 2
        if not path.endswith("/2/0"):  # the last unit has one view
            yield case(f"{path} with its codes swapped", {path: damage.swapped_inside(data, 0, chunk, chunk)})


def other_cache(root: Path, other: Path) -> Iterator[Case]:
    """Files of another cache: of the same images with another seed, so everything has its name and nearly its size."""
    for path in files_below(root):
        data = (other / path).read_bytes() if (other / path).exists() else None
        if data is not None and data != (root / path).read_bytes():
            # All receipts belong to another manifest then, and are named instead of it.
            named = (path,) if path != "manifest.json" else ("receipts/v000/s00000.json",)
            yield case(f"{path} of another cache", {path: data}, *named)


def old_and_new(root: Path, again: Path) -> Iterator[Case]:
    """A unit written twice, with the last bits of its targets different: the files of one and the receipt of the other.

    GPUs do that: what a unit's codes are is not the same from run to run.
    """
    receipt = "receipts/v000/s00001.json"
    files = [receipt, *open_cache(root).unit_files("v000", 1)]
    newer = {path: (again / path).read_bytes() for path in files}
    other = [path for path in files if newer[path] != (root / path).read_bytes()]
    assert len(other) == 3, "the receipt and two Zarr shard files"
    yield case("newer files, older receipt", {path: newer[path] for path in other if path != receipt}, *files)
    for path in other:
        yield case(f"{path} of a newer attempt", {path: newer[path]}, *files)


def written_again(prepared: worlds.Prepared, out: Path) -> Path:
    """The same cache, in which one unit has codes with other last bits."""
    unit = prepared.units["v000", 1]
    codes = {name: values.copy() for name, values in unit.codes.items()}
    codes["patch"][0, -1] ^= 1
    codes["cls"][1, 0] ^= 1
    units = prepared.units | {("v000", 1): dataclasses.replace(unit, codes=codes)}
    worlds.extract_prepared(out, dataclasses.replace(prepared, units=units))
    return out


def pack_swaps(root: Path) -> Iterator[Case]:
    """Tars and indices of other units; codes, views or documents of two samples, with and without a new index."""
    paths = files_below(root)
    yield from swaps(root, of_kind(paths, ".tar"))
    yield from swaps(root, of_kind(paths, ".idx"))
    for view in ("v000", "v001"):
        index = (root / f"{view}.idx").read_bytes()
        records = np.frombuffer(index, dtype=RECORD, offset=RECORD_BYTES)
        for tar in (0, 1):
            path = f"{view}/s{tar:05d}.tar"
            data = (root / path).read_bytes()
            one, other = np.flatnonzero(records["tar"] == tar)
            for member in ("codes", "view", "json"):
                size = int(min(records[f"{member}_size"][[one, other]]))
                places = [int(records[f"{member}_offset"][which]) for which in (one, other)]
                new = damage.swapped_inside(data, places[0], places[1], size)
                yield case(f"{path}: {member} of two samples swapped", {path: new})
                forged = records.copy()
                for which, place in zip((one, other), places, strict=True):
                    whole = int(records[f"{member}_size"][which])
                    forged[f"{member}_crc32c"][which] = google_crc32c.value(new[place : place + whole])
                sealed = index[:RECORD_BYTES] + seal_records(forged).tobytes()
                yield case(
                    f"{path}: {member} of two samples swapped and the index rewritten",
                    {path: new, f"{view}.idx": sealed},
                )
        forged = records.copy()
        for member in ("codes", "view", "json"):
            forged[f"{member}_offset"] = np.roll(records[f"{member}_offset"], 1)
        yield case(
            f"{view}.idx with the offsets of other samples",
            {f"{view}.idx": index[:RECORD_BYTES] + seal_records(forged).tobytes()},
        )


def test_every_damaged_file_of_a_cache_is_found(world: World, folder: Path) -> None:
    root = world.cache
    paths = files_below(root)
    other = make_cache(folder / "other", worlds.N_IMAGES, views=2, shard_size=worlds.SHARD_SIZE, seed=5).path
    cases = [
        *cuts_at_blocks(root, paths),
        *random_cuts(root, paths, N_RANDOM_CUTS // 2, SEED),
        *junk_and_holes(root, paths, SEED),
        *cache_swaps(root),
        *other_cache(root, other),
        *old_and_new(root, written_again(world.prepared, folder / "again")),
    ]
    _all_found(root, cases, lambda: verify_cache(root, read_data=True))
    assert len(cases) >= N_CACHE_CASES, len(cases)


def test_every_damaged_file_of_a_pack_is_found(world: World, folder: Path) -> None:
    root = world.pack
    paths = files_below(root)
    other = make_cache(folder / "another", worlds.N_IMAGES, views=2, shard_size=worlds.SHARD_SIZE, seed=6).path
    other_pack = worlds.pack_prepared(other, folder / "another pack").path
    cases = [
        *cuts_at_blocks(root, paths),
        *random_cuts(root, paths, N_RANDOM_CUTS // 2, SEED + 1),
        *junk_and_holes(root, paths, SEED + 1),
        *pack_swaps(root),
    ]
    for path in paths:
        if not path.startswith("codec/"):
            named = [path] if path != "pack.json" else paths
            cases.append(case(f"{path} of another pack", {path: (other_pack / path).read_bytes()}, *named))

    _all_found(root, cases, lambda: verify_pack(root, read_data=True))

    for damaged in cases:
        with changed(root, damaged.changes), suppress(ProteusCacheError):  # another error is a defect
            assert batches_of(root) == world.trained_on, f"{damaged.name} changes what training gets"
    assert len(cases) >= N_PACK_CASES, len(cases)


def test_every_damaged_file_of_a_run_is_found(world: World) -> None:
    root = world.run
    paths = [path for path in files_below(root) if path.endswith((".json", ".safetensors"))]
    checkpoints = [path for path in paths if path.startswith("checkpoints/")]
    small = [path for path in checkpoints if path.endswith(".json")]
    whole = [c for c in junk_and_holes(root, paths, SEED + 2) if not c.name.endswith("duplicated")]
    assert {path for c in whole if c.name.endswith("deleted") for path in c.changes} == set(paths)
    cases = [
        *cuts_at_blocks(root, small),
        *random_cuts(root, paths, 20, SEED + 2),
        *whole,
        *swaps(root, [path for path in paths if "/" not in path and path.endswith(".safetensors")]),
        *swaps(root, small),
        *swaps(root, of_kind(checkpoints, "model")),
        *swaps(root, [checkpoints[0], checkpoints[1]]),
    ]
    for damaged in cases:
        with changed(root, damaged.changes):
            text = found_by(lambda: verify_run(root, True))
            assert text, f"not found: {damaged.name}"
            assert any(path.split("/")[-2 if "/" in path else -1] in text for path in damaged.named), damaged.name
    assert len(cases) >= N_RUN_CASES, len(cases)


def _all_found(root: Path, cases: list[Case], verify: Callable[[], list[Finding]]) -> None:
    before = digests_below(root)
    for damaged in cases:
        assert damaged.changes != {path: damage.content(root / path) for path in damaged.changes}, damaged.name
        with changed(root, damaged.changes):
            if damaged.changes in ({"manifest.json": None}, {"pack.json": None}):
                with pytest.raises(UsageError, match=rf"^{root}: .* has lost its (manifest|pack)\.json"):
                    verify()
                continue
            text = found_by(verify)
            assert text, f"not found: {damaged.name}"
            assert any(is_named(path, text) for path in damaged.named), f"{damaged.name}: {text}"
    assert digests_below(root) == before
