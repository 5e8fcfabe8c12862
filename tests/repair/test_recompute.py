"""The teacher again: it finds what no checksum can, and passes another batch shape and precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus_cache import open_cache
from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.codecs.recomputed import PRECISION
from proteus_cache.errors import ConfigError, UsageError, WeightsError
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.verify import verify_pack
from proteus_cache.recompute.run import RecomputeReport, recompute
from proteus_cache.storage import write_new
from proteus_cache.teachers.teacher import Teacher
from tests.makers import make_config, run_extract
from tests.repair.stores import Stores, edit, flip, make_settings, reseal
from tests.repair.test_cache import members_of, with_field, write_tar

ALL = 23
"""Stored views of the cache and of the pack, the probe's among them."""


def computed(path: Path, stores: Stores, n_views: int = ALL, **options: Any) -> RecomputeReport:
    settings = {"seed": 1, "weights": stores.config.weights, "home": stores.home, "device": "cpu"}
    return recompute(path, n_views, **(settings | options))


@pytest.mark.parametrize("kind", ["cache", "pack"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_right_teacher_passes_in_any_batch(stores: Stores, kind: str, batch_size: int) -> None:
    report = computed(getattr(stores, kind), stores, batch_size=batch_size)

    assert report.findings == []
    assert report.n_views == ALL
    for numbers in report.targets.values():
        assert numbers["lowest_cosine"] > 0.9999
        assert numbers["largest_error"] <= numbers["tolerance"]
        assert numbers["n_failed"] == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_right_teacher_passes_in_another_precision(tmp_path: Path, precision: str) -> None:
    config = make_settings(tmp_path, precision=precision)
    run_extract(config)
    stores = Stores(config.home, config)

    report = computed(config.out, stores)

    assert report.findings == []
    assert 0 < report.targets["cls"]["largest_error"] < PRECISION[precision]


@pytest.mark.parametrize("codec", ["float32", "float16", "int4", "klt:15dB"])
def test_the_right_teacher_passes_with_any_codec(tmp_path: Path, codec: str) -> None:
    config = make_config(tmp_path, n_images=24, codec=codec, views=1, home=tmp_path)
    run_extract(config)
    build_pack(config.out, tmp_path / "int8", codec=None if codec.startswith("klt") else "int8")
    stores = Stores(tmp_path, config)

    for path in (config.out, tmp_path / "int8"):
        assert computed(path, stores, 24, batch_size=5).findings == []


def swap_codes(cache: Cache, unit: tuple[str, int], target_name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite the codes of one target of a unit, with every checksum right."""
    import google_crc32c

    target = cache.target(target_name)
    codes = change(np.array(cache.read_codes(*unit, target_name)))
    name = f"{unit[0]}/s{unit[1]:05d}"
    path = cache.path / f"targets.zarr/{unit[0]}/{target_name}/c/{unit[1]}"
    path = path if target_name == "cls" and path.is_file() else path / "0"
    path.unlink()
    write_new(path, zarr_arrays.shard_buffers(target, cache.manifest.shard_size, codes))

    def crcs(receipt: dict[str, Any]) -> None:
        receipt["samples"]["crc32c"][target_name] = [int(google_crc32c.value(row)) for row in codes]

    edit(cache.path / "receipts" / f"{name}.json", crcs)
    reseal(cache.path, name)


@pytest.mark.parametrize("target", ["cls", "patch"])
def test_swapped_codes_are_found_though_all_checksums_agree(stores: Stores, tmp_path: Path, target: str) -> None:
    cache = open_cache(stores.cache)
    receipt = cache.receipt("v001", 1)
    assert receipt is not None
    keys = receipt.samples.keys
    swap_codes(cache, ("v001", 1), target, lambda codes: codes[[1, 0, 2, 3]])
    build_pack(stores.cache, tmp_path / "pack")

    report = computed(stores.cache, stores)
    packed = computed(tmp_path / "pack", stores)

    assert verify_cache(stores.cache, read_data=True) == []
    assert verify_pack(tmp_path / "pack", read_data=True) == []
    assert {finding.unit for finding in report.findings} == {"v001/s00001"}
    named = " ".join(finding.problem for finding in report.findings)
    assert f"target {target} of {keys[0]}" in named
    assert f"target {target} of {keys[1]}" in named
    assert report.targets[target]["n_failed"] == 2
    assert f"repair {stores.cache} --unit v001/s00001 --images DIR --weights FILE`" in report.findings[0].remedy
    assert [finding.unit for finding in packed.findings] == ["v001/s00001"] * 2
    assert "verify it with --recompute, repair its units" in packed.findings[0].remedy


def test_codes_of_the_other_view_of_the_same_image_are_found(stores: Stores) -> None:
    cache = open_cache(stores.cache)
    other = np.array(cache.read_codes("v000", 1, "cls"))
    swap_codes(cache, ("v001", 1), "cls", lambda codes: other)

    report = computed(stores.cache, stores)

    assert report.targets["cls"]["n_failed"] == 4


def test_shuffled_views_are_found_though_all_checksums_agree(stores: Stores) -> None:
    """Pictures and documents have changed places, the keys have not, and every digest follows."""
    cache = open_cache(stores.cache)
    path = stores.cache / "views/v000/s00001.tar"
    members = members_of(path)
    pictures = [name for name in members if name.endswith(".jpg")]
    shuffled = pictures[1:] + pictures[:1]
    receipt = cache.receipt("v000", 1)
    assert receipt is not None
    digests = dict(zip(receipt.samples.keys, receipt.samples.view_digests, strict=True))
    moved = {name: members[other] for name, other in zip(pictures, shuffled, strict=True)}
    for name, other in zip(pictures, shuffled, strict=True):
        key, digest = name.partition(".")[0], digests[other.partition(".")[0]]
        moved[f"{key}.json"] = with_field(members[f"{key}.json"], "view_digest", digest)
    write_tar(path, members | moved)

    def move(receipt: dict[str, Any]) -> None:
        samples = receipt["samples"]
        samples["view_digests"] = samples["view_digests"][1:] + samples["view_digests"][:1]

    edit(stores.cache / "receipts/v000/s00001.json", move)
    reseal(stores.cache, "v000/s00001")

    report = computed(stores.cache, stores)

    assert verify_cache(stores.cache, read_data=True) == []
    assert report.targets["cls"]["n_failed"] == report.targets["patch"]["n_failed"] == 4


def test_one_changed_weight_is_refused_by_its_digest(stores: Stores, tmp_path: Path) -> None:
    weights = str(stores.config.weights)
    from safetensors import safe_open

    tensors = load_file(weights)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors["blocks.0.mlp.fc1.weight"][0, 0] += 1e-6
    save_file(tensors, tmp_path / "changed.safetensors", metadata)

    with pytest.raises(WeightsError, match=r"was made with weights \w{12} .* have digest .* with --weights"):
        computed(stores.cache, stores, weights=str(tmp_path / "changed.safetensors"))


def test_a_teacher_that_computes_otherwise_is_found(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is right and the numbers are not: a failing device, or a changed library."""
    targets = Teacher.targets

    def wrong(teacher: Teacher, views: torch.Tensor, names: Any) -> dict[str, torch.Tensor]:
        return targets(teacher, views.flip(2), names)

    monkeypatch.setattr(Teacher, "targets", wrong)

    report = computed(stores.cache, stores)

    assert {name: numbers["n_failed"] for name, numbers in report.targets.items()} == {"cls": ALL, "patch": ALL}


def test_a_seed_draws_the_same_views_and_damage_is_named(stores: Stores) -> None:
    first, again, other = (computed(stores.cache, stores, 5, seed=seed) for seed in (3, 3, 4))
    flip(stores.cache / "views/v000/s00001.tar")
    flip(stores.cache / "receipts/v001/s00001.json")

    report = computed(stores.cache, stores)

    assert first.targets == again.targets != other.targets
    assert first.n_views == 5
    assert {finding.unit for finding in report.findings} == {"v000/s00001", "v001/s00001"}
    assert report.n_views == ALL - 8


def test_what_cannot_be_computed_is_refused(stores: Stores, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--recompute takes a number of views of at least 1"):
        computed(stores.cache, stores, 0)
    with pytest.raises(UsageError, match="give a cache or pack"):
        computed(tmp_path, stores)
    shutil.rmtree(stores.cache / "receipts")
    with pytest.raises(UsageError, match="holds no view yet"):
        computed(stores.cache, stores)
