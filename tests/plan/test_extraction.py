"""Sizes of caches: by hand, and against what is on disk."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from proteus_cache import tar
from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.codecs.names import CODEC_NAMES, codec_for_target
from proteus_cache.errors import SpaceError
from proteus_cache.extract import run
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import describe_plan
from proteus_cache.pack.build import run_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.plan.codes import planned_codec
from proteus_cache.plan.extraction import CacheSize, ExtractPlan, typical_view_bytes
from proteus_cache.plan.rates import Rate
from proteus_cache.storage import Free
from proteus_cache.teachers.outline import outline_teacher
from tests.makers import make_cache, make_config, make_images, make_teacher


def targets(codec: str, width: int = 1536, n_patches: int = 256) -> tuple[TargetRecord, ...]:
    shapes = {"cls": (width,), "patch": (n_patches, width)}
    return tuple(
        TargetRecord(
            name=name,
            shape=list(shape),
            codec=planned_codec(codec_for_target(codec, name), shape),
        )
        for name, shape in shapes.items()
    )


def imagenet(codec: str = "float16", **changes: object) -> CacheSize:
    size = CacheSize(
        n_images=1_281_167,
        n_views=4,
        n_probe=0,
        shard_size=1024,
        targets=targets(codec),
        view_bytes=36_000,
    )
    return replace(size, **changes)  # type: ignore[arg-type]  # fields of the record


def plan(size: CacheSize, free_bytes: int, free_inodes: int | None = None, is_published: bool = False) -> ExtractPlan:
    return ExtractPlan(
        out=Path("cache"),
        teacher="dinov2_vitg14",
        weights="its own",
        size=size,
        n_held_out=13,
        units_todo=size.n_units,
        views_todo=size.n_stored_views,
        free=Free(free_bytes, free_inodes),
        rate=Rate(views_per_s=650, source="measured here"),
        processes=8,
        is_published=is_published,
    )


def test_a_view_of_the_teacher_at_half_precision_has_789_504_bytes_and_four_of_every_image_4_tb() -> None:
    size = imagenet()

    assert size.code_bytes == 257 * 1536 * 2 == 789_504
    assert 4 * size.n_images * size.code_bytes == pytest.approx(4.05e12, rel=0.002)
    assert size.bytes_per_view == pytest.approx(789_504 + 36_000, rel=0.001)  # and a few digests
    assert size.bytes == 4 * size.n_images * size.bytes_per_view


def test_int8_halves_the_codes_and_a_pack_adds_one_member() -> None:
    size = imagenet("int8")

    assert size.code_bytes == 1536 * 2 + 256 * (2 + 1536)
    assert size.packed_bytes_per_view == 36_000 + 512 + tar.padded(size.code_bytes)


def test_files_and_units_of_the_whole_of_imagenet() -> None:
    size = imagenet("int8", n_probe=4096)

    assert (size.n_shards, size.n_units) == (1252, 4 * 1252 + 4)
    assert size.n_files == 5012 * 4 + 2 + 1 + 1 + 5 * 3


@pytest.mark.parametrize(("size_px", "kilobytes"), [(112, 12.8), (224, 37.6), (448, 113.4), (518, 139.8)])
def test_typical_views_are_those_that_were_measured_on_photographs(size_px: int, kilobytes: float) -> None:
    assert typical_view_bytes(size_px) == pytest.approx(1000 * kilobytes, rel=0.05)


def test_typical_views_against_real_photographs(test_data: Path, tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher.safetensors")
    config = make_config(tmp_path, images=test_data / "imagenet-sample", size_px=224, limit=64)

    planned = plan_cache(config)

    assert planned.view_bytes == pytest.approx(typical_view_bytes(224), rel=0.1)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_plan_says_what_is_on_disk_afterwards(codec: str, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 40)
    make_teacher(tmp_path / "teacher.safetensors")
    config = make_config(tmp_path, shard_size=16, probe_images=5, codec=codec)
    announced: list[ExtractPlan] = []
    plan_cache(config, announce=announced.append)

    cache = make_cache(tmp_path, shard_size=16, probe_images=5, codec=codec)

    first = announced[0]
    files = [file for file in cache.path.rglob("*") if file.is_file()]
    assert first.files_todo == first.size.n_files == len(files)
    assert first.inodes_todo >= len(files)
    parts = {"views": 0, "targets.zarr": 0}
    for file in files:
        top = file.relative_to(cache.path).parts[0]
        if top in parts and file.name != "zarr.json":
            parts[top] += file.stat().st_size
    n_views = first.size.n_stored_views
    assert parts["views"] == pytest.approx(n_views * first.size.view_bytes, rel=0.05)
    # zstd may take floats below what is planned, and a few bytes above so short ones; the index of the last, shorter
    # shard has places for a whole one.
    n_places = first.size.n_units * 16
    assert parts["targets.zarr"] <= n_views * (first.size.code_bytes + 2 * 4 + 2 * 12) + 2 * 16 * n_places + 100
    assert first.bytes_todo == first.size.bytes == pytest.approx(n_views * first.size.bytes_per_view)


def test_a_pack_has_the_size_that_was_planned(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, 30)
    config = make_config(tmp_path)
    size = describe_plan(config, plan_cache(config), 1).size

    run_pack(plan_pack(cache.path, tmp_path / "pack"))

    packed = sum(file.stat().st_size for file in (tmp_path / "pack").rglob("*.tar"))
    assert packed == pytest.approx(size.n_stored_views * size.packed_bytes_per_view, rel=0.02)


def test_nothing_is_left_of_a_finished_cache(tmp_path: Path) -> None:
    make_cache(tmp_path)
    config = make_config(tmp_path)

    finished = describe_plan(config, plan_cache(config), 1)

    assert (finished.bytes_todo, finished.files_todo, finished.views_todo) == (0, 0, 0)
    assert finished.lines()[-1] == "to do     nothing: all 6 units are there"


def test_a_cache_that_fits_passes_and_one_byte_less_is_refused() -> None:
    size = imagenet()
    enough = int(size.bytes * 1.05) + 1

    plan(size, enough).check()
    assert plan(size, enough).fits()

    assert not plan(size, enough - 2).fits()
    with pytest.raises(SpaceError, match=r"4\.44 TB are needed .* --views 3 fits"):
        plan(size, enough - 2).check()


@pytest.mark.parametrize("n_probe", [0, 4096])
@pytest.mark.parametrize("free_bytes", [3_000_000_000_000, 800_000_000_000, 10_000_000_000, 1_000_000_000])
def test_what_is_said_to_fit_fits(free_bytes: int, n_probe: int) -> None:
    size = imagenet(n_probe=n_probe)

    words = plan(size, free_bytes).what_fits("--limit").split()

    n_views = int(words[words.index("--views") + 1])
    n_images = int(words[words.index("--limit") + 1]) if "--limit" in words else size.n_images
    smaller = replace(size, n_views=n_views, n_images=n_images, n_probe=n_probe if n_images >= 16_384 else 0)
    assert plan(smaller, free_bytes).fits()


def test_a_published_cache_cannot_lose_images() -> None:
    assert "nothing fits" in plan(imagenet(), 10_000_000_000, is_published=True).what_fits("--limit")


def test_where_the_probe_is_missing_a_view_index_that_is_done_does_not_fit_without_it() -> None:
    size = imagenet(n_probe=4096)
    begun = replace(plan(size, 0, is_published=True), views_todo=size.n_stored_views - size.n_images - 10_000)

    def said(n_views: int) -> str:
        free = Free(math.ceil(n_views * size.bytes_per_view * 1.05), None)
        return replace(begun, free=free).what_fits("--limit")

    assert "nothing fits" in said(4000)
    assert said(4096) == "--views 1 fits"


def test_folders_count_as_inodes() -> None:
    size = imagenet("int8")
    n_inodes = plan(size, 1 << 50).inodes_todo

    assert n_inodes == size.n_files + 2 * size.n_units
    with pytest.raises(SpaceError, match="--shard-size"):
        plan(size, 1 << 50, free_inodes=n_inodes).check()


def test_inodes_on_disk_are_those_that_were_planned(tmp_path: Path) -> None:
    config = make_config(tmp_path, 64, shard_size=2)
    announced: list[ExtractPlan] = []
    plan_cache(config, announce=announced.append)
    cache = make_cache(tmp_path, 64, shard_size=2)

    n_inodes = sum(len(files) + len(folders) for _, folders, files in os.walk(cache.path))

    assert n_inodes == pytest.approx(announced[0].inodes_todo, rel=0.1)


def test_the_time_is_that_of_the_forward_on_all_processes() -> None:
    described = plan(imagenet("int8"), 1 << 50)

    assert described.seconds == pytest.approx(4 * 1_281_167 / (8 * 650))
    assert described.lines()[-1] == "time      16 min of teacher forward (650 views/s measured here, 8 processes)"
    assert replace(described, rate=Rate(views_per_s=None, source="not known")).seconds is None


def test_a_cache_that_is_continued_on_a_known_gpu_gets_its_time_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path, views=1)
    config = make_config(tmp_path, views=3)
    planned = plan_cache(config)
    giant = outline_teacher("dinov2_vitg14", weights=None, size_px=None)
    monkeypatch.setattr(run, "outline_teacher", lambda *arguments, **named: giant)
    monkeypatch.setattr(run, "_precision", lambda *arguments: "fp16")

    unknown = describe_plan(config, planned, 2)
    monkeypatch.setattr(run, "gpu_name", lambda asked: "NVIDIA H200")
    known = describe_plan(config, planned, 2)

    assert unknown.seconds is None
    assert known.seconds == pytest.approx(20 / (2 * 617), rel=0.01)
    assert "views/s estimate: its FLOPs at 369 TFLOP/s" in known.lines()[-1]
