"""Which views are measured, and that two stores are matched by what they hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from proteus_cache.cache.reader import open_cache
from proteus_cache.errors import UsageError
from proteus_cache.fidelity.sample import check_reference, choose_sample, common_views, match
from proteus_cache.fidelity.sides import Entry, Side, open_side
from tests.cli.running import run
from tests.makers import make_cache, make_config, make_teacher, run_extract


def sides(stores: Path) -> list[Side]:
    return [open_side(stores / name) for name in ("cache", "int8")]


@pytest.mark.parametrize("name", ["cache", "int8"])
def test_held_out_views_are_measured_and_trained_ones_stand_beside_them(stores: Path, name: str) -> None:
    cache = open_cache(stores / "cache")
    (shard,) = cache.manifest.images.held_out
    receipt = cache.receipt("v000", shard)
    assert receipt is not None

    sample = choose_sample(open_side(stores / name), ["v000"], 2000)

    assert sample.is_held_out
    assert [entry.key for entry in sample.measured] == receipt.samples.keys
    assert len(sample.bank) == 320 - 32
    assert not {entry.key for entry in sample.measured} & {entry.key for entry in sample.bank}


def test_fewer_samples_take_the_first_held_out_views(stores: Path) -> None:
    whole, few = (choose_sample(open_side(stores / "int8"), ["v000"], n) for n in (2000, 5))

    assert few.measured == whole.measured[:5]
    assert few.bank == whole.bank[:5]


def test_without_held_out_views_the_last_images_are_measured_and_no_image_is_on_both_sides(tmp_path: Path) -> None:
    side = open_side(make_cache(tmp_path, n_images=11, shard_size=4, views=1).path)
    keys = [entry.key for shard in side.shards("v000") for entry in side.entries("v000", shard)]

    sample = choose_sample(side, ["v000"], 2000)
    small = choose_sample(side, ["v000"], 2)

    assert not sample.is_held_out
    assert [entry.key for entry in sample.measured] == keys[5:]
    assert [entry.key for entry in sample.bank] == keys[:5]
    assert [entry.key for entry in small.measured] == keys[-2:]
    assert [entry.key for entry in small.bank] == keys[-4:-2]


def test_cache_and_pack_tell_the_same_of_a_view(stores: Path) -> None:
    cache, pack = sides(stores)

    for shard in cache.shards("v000"):
        told = [[replace(entry, number=0) for entry in side.entries("v000", shard)] for side in (cache, pack)]
        assert told[0] == told[1]
        assert {entry.label for entry in told[0]} == {0, 1, 2}
    entries = [side.entries("v000", 3)[4:6] for side in (cache, pack)]
    assert (cache.pixels(entries[0]) == pack.pixels(entries[1])).all()


def test_stores_of_another_order_and_shard_size_are_matched_by_key(stores: Path, tmp_path: Path) -> None:
    config = make_config(stores, shard_size=50, views=1, codec="float16", out=tmp_path / "other")
    run_extract(config)
    other, pack = open_side(tmp_path / "other"), open_side(stores / "int8")
    measured = choose_sample(pack, ["v000"], 2000).measured

    forth = match(pack, other, measured)
    back = match(other, pack, forth)

    assert [(entry.key, entry.digest) for entry in forth] == [(entry.key, entry.digest) for entry in measured]
    assert [entry.shard for entry in forth] != [entry.shard for entry in measured]
    assert back == measured


def test_another_picture_under_the_same_name_is_refused(stores: Path) -> None:
    cache, pack = sides(stores)
    (entry, *_) = choose_sample(pack, ["v000"], 1).measured

    with pytest.raises(UsageError, match=f"view v000 of {entry.key} is another picture"):
        match(pack, cache, [replace(entry, digest="0" * 16)])


def test_a_view_that_the_reference_lacks_is_refused(stores: Path) -> None:
    cache, pack = sides(stores)
    missing = Entry("no_such_key", "0" * 16, None, "v000", 1, 0)

    with pytest.raises(UsageError, match="holds no view v000 of no_such_key"):
        match(pack, cache, [missing])
    with pytest.raises(UsageError, match="holds no view v000 of no_such_key"):
        match(cache, pack, [missing])


def test_a_lossy_reference_is_refused(stores: Path) -> None:
    cache, int8 = sides(stores)

    with pytest.raises(UsageError, match="its target patch is int8, which is no reference"):
        check_reference(cache.facts, int8.facts)
    check_reference(int8.facts, cache.facts)


def test_another_teacher_a_missing_target_and_another_size_are_refused(stores: Path, tmp_path: Path) -> None:
    _, int8 = sides(stores)
    make_teacher(tmp_path / "teacher.safetensors", seed=1)
    weights = str(tmp_path / "teacher.safetensors")
    other = make_config(stores, views=1, out=tmp_path / "other", limit=8, weights=weights, codec="float32")
    run_extract(other)
    run_extract(replace(other, out=tmp_path / "cls", weights=str(stores / "teacher.safetensors"), targets=("cls",)))

    with pytest.raises(UsageError, match="both must be of one teacher"):
        check_reference(int8.facts, open_side(tmp_path / "other").facts)
    with pytest.raises(UsageError, match="holds no target patch, only cls"):
        check_reference(int8.facts, open_side(tmp_path / "cls").facts)


def test_view_indices_that_both_hold_are_measured(tmp_path: Path) -> None:
    make_cache(tmp_path, n_images=8, shard_size=4, views=3, codec="float32")
    run("pack", tmp_path / "cache", "--views", "v001,v002", "--out", tmp_path / "rear", "--workers", 1)
    run("pack", tmp_path / "cache", "--views", "v000", "--out", tmp_path / "front", "--workers", 1)
    cache, rear, front = (open_side(tmp_path / name).facts for name in ("cache", "rear", "front"))

    assert common_views(rear, cache) == ["v001", "v002"]
    with pytest.raises(UsageError, match=r"no view index in common \(v000, and v001, v002\)"):
        common_views(front, rear)


def test_all_view_indices_of_held_out_shards_are_measured_the_first_one_first(tmp_path: Path) -> None:
    side = open_side(make_cache(tmp_path, n_images=40, shard_size=4, views=2).path)

    sample = choose_sample(side, ["v000", "v001"], 2000)

    assert [entry.view for entry in sample.measured] == 4 * ["v000"] + 4 * ["v001"]
    assert sample.n_images == 4
    assert {entry.view for entry in sample.bank} == {"v000"}


def test_a_cache_without_views_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path, n_images=8, views=1)
    shutil.rmtree(tmp_path / "cache" / "receipts")

    side = open_side(tmp_path / "cache")

    assert side.facts.view_names == ()
