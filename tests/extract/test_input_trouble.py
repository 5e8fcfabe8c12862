"""Trouble with what goes in: disks that fail while images are read, files that change, and parts of another cache.

An I/O error is never recorded as a bad image, what does not fit is refused before anything is written, and committed
units stay.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from proteus_cache import open_cache
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.errors import DamageError, ImageListError, ProteusCacheError, StorageError, UsageError
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.views import source
from tests.makers import identity, make_cache, make_config, make_images, make_teacher, run_extract

N_CASES = 30
"""Reads that fail for good, in passing or elsewhere, and what does not fit; the last test counts them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("finished"))


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "READ_AGAIN_S", (0.0, 0.0))


def image_of(cache: Cache, row: int) -> Path:
    path: str = cache.image_table["path"][row].as_py()
    return cache.path.parent / "images" / path


def fail_reads(
    monkeypatch: pytest.MonkeyPatch, victim: Path, trouble: Callable[[], object], times: int | None = None
) -> list[Path]:
    """Reading one file ends in `trouble` (the first `times` times); returns the list of its reads."""
    read_all, reads = source._read_all, []

    def failing(descriptor: int, path: Path) -> bytes:
        if path == victim:
            reads.append(path)
            os.read(descriptor, 100)  # so that it happens in the middle
            os.lseek(descriptor, 0, os.SEEK_SET)
            if times is None or len(reads) <= times:
                trouble()
        return read_all(descriptor, path)

    monkeypatch.setattr(source, "_read_all", failing)
    return reads


def error(number: int) -> Callable[[], object]:
    def trouble() -> None:
        raise OSError(number, os.strerror(number))

    return trouble


def check_nothing_is_quarantined(config: ExtractConfig) -> None:
    cache = open_cache(config.out)
    for view in cache.views():
        for shard in cache.units(view):
            receipt = cache.receipt(view, shard)
            assert receipt is not None
            assert receipt.quarantined == []
    assert verify_cache(config.out, read_data=True) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("row", [0, 5, 9])
def test_a_read_that_fails_for_good_stops_the_run_and_is_no_bad_image(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, number: int
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    plan_cache(config)
    victim = image_of(finished, row)
    with monkeypatch.context() as broken:
        reads = fail_reads(broken, victim, error(number))

        with pytest.raises(StorageError) as caught:
            run_extract(config)

    reason = re.escape(os.strerror(number))
    assert re.fullmatch(
        rf"{victim}: cannot be read: {reason}; put the file back .* same command again", str(caught.value)
    )
    assert len(reads) == 3
    assert len(open_cache(config.out).units("v000")) == row // 4
    check_nothing_is_quarantined(config)
    run_extract(config)
    assert identity(open_cache(config.out)) == identity(finished)


def test_a_file_that_stays_too_short_stops_the_run(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    plan_cache(config)
    victim, look = image_of(finished, 6), os.fstat

    def too_large(descriptor: int) -> os.stat_result:
        status = look(descriptor)
        is_victim = os.path.samestat(status, os.stat(victim))
        return os.stat_result([*status[:6], status.st_size + 1000, *status[7:]]) if is_victim else status

    with monkeypatch.context() as broken:
        broken.setattr(os, "fstat", too_large)
        with pytest.raises(StorageError, match=f"{victim}: cannot be read: changed while it was read"):
            run_extract(config)

    assert open_cache(config.out).units("v000") == [0]
    check_nothing_is_quarantined(config)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT])
def test_a_read_that_fails_in_passing_is_done_again_and_said(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    plan_cache(config)
    victim = image_of(finished, 5)
    fail_reads(monkeypatch, victim, error(number), times=2)

    with caplog.at_level(logging.WARNING):
        run_extract(config)

    assert caplog.text.count(f"reading again path={victim} reason={os.strerror(number)}") == 2
    assert identity(open_cache(config.out)) == identity(finished)
    check_nothing_is_quarantined(config)


def test_what_does_not_pass_is_not_tried_again(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    plan_cache(config)
    reads = fail_reads(monkeypatch, image_of(finished, 5), error(errno.EACCES))

    with pytest.raises(StorageError, match="Permission denied"):
        run_extract(config)

    assert len(reads) == 1
    check_nothing_is_quarantined(config)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reads fail: Linux has one")
def test_a_read_that_fails_in_a_rendering_process_is_told_as_here(tmp_path: Path) -> None:
    config = make_config(tmp_path, workers=1)
    plan_cache(config)
    victim = image_of(open_cache(config.out), 5)
    victim.unlink()
    victim.symlink_to("/proc/self/mem")

    with pytest.raises(StorageError, match=f"{victim}: cannot be read: Input/output error; put the file back"):
        run_extract(config)

    assert open_cache(config.out).units("v000") == [0]
    check_nothing_is_quarantined(config)


def test_a_read_that_fails_while_planning_leaves_no_cache(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    fail_reads(monkeypatch, image_of(finished, 2), error(errno.EIO))

    with pytest.raises(StorageError, match=f"{image_of(finished, 2)}: cannot be read"):
        run_extract(config)

    assert not (config.out / "manifest.json").exists()


def test_a_folder_that_cannot_be_listed_is_named(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    scan, closed = os.scandir, finished.path.parent / "images/class_1"

    def refuse(path: Any) -> Any:
        return error(errno.EACCES)() if Path(path) == closed else scan(path)

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(StorageError, match=f"{closed}: .*Permission denied"):
        run_extract(config)

    assert not (config.out / "manifest.json").exists()


# What does not fit


def replace_image(folder: Path, cache: Cache) -> ExtractConfig:
    Image.new("RGB", (50, 50), "red").save(folder / "images" / cache.image_table["path"][5].as_py())
    return make_config(folder, views=3)


def replace_all_images(folder: Path, cache: Cache) -> ExtractConfig:
    make_images(folder / "others", 10, seed=9)
    return make_config(folder, views=3, images=folder / "others")


def remove_image(folder: Path, cache: Cache) -> ExtractConfig:
    (folder / "images" / cache.image_table["path"][5].as_py()).unlink()
    return make_config(folder, views=3)


def other_images(folder: Path, cache: Cache) -> ExtractConfig:
    make_images(folder / "others", 10, n_classes=1)
    (folder / "others/class_0").rename(folder / "others/class_9")
    return make_config(folder, views=3, images=folder / "others")


def with_list(folder: Path, lines: list[str], **changes: Any) -> ExtractConfig:  # fields of the config
    (folder / "images/list.txt").write_text("".join(f"{line}\n" for line in lines))
    return make_config(folder, images=folder / "images/list.txt", **changes)


def other_labels(folder: Path, cache: Cache) -> ExtractConfig:
    rows = cache.image_table.to_pylist()
    return with_list(folder, [f"{row['path']}\t{(row['label'] + 1) % 3}" for row in rows], views=3)


def twice_the_same(folder: Path, cache: Cache) -> ExtractConfig:
    paths = cache.image_table["path"].to_pylist()
    return with_list(folder, [*paths, paths[3]], out=folder / "new")


def label_that_is_none(folder: Path, cache: Cache) -> ExtractConfig:
    return with_list(folder, [f"{cache.image_table['path'][0].as_py()}\tcat"], out=folder / "new")


def weights_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> ExtractConfig:
    path = make_teacher(folder / "other.safetensors")
    state = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(state)
    save_file(state, path, metadata=metadata)
    return make_config(folder, views=3, weights=str(path))


def one_weight(folder: Path, cache: Cache) -> ExtractConfig:
    return weights_of(folder, lambda state: state["blocks.1.mlp.fc2.weight"][0, 0].add_(1e-5))


def half_the_bits(folder: Path, cache: Cache) -> ExtractConfig:
    return weights_of(folder, lambda state: state.update({name: value.half() for name, value in state.items()}))


def manifest_of_another(folder: Path, cache: Cache) -> ExtractConfig:
    other = make_cache(folder / "another", seed=5)
    shutil.copy(other.path / "manifest.json", cache.path / "manifest.json")
    return make_config(folder, views=3)


def receipt_of_another(folder: Path, cache: Cache) -> ExtractConfig:
    other = make_cache(folder / "another", seed=5)
    shutil.copy(other.path / "receipts/v000/s00001.json", cache.path / "receipts/v000/s00001.json")
    return make_config(folder, views=3)


def list_of_another(folder: Path, cache: Cache) -> ExtractConfig:
    other = make_cache(folder / "another", n_images=9)
    shutil.copy(other.path / "images.parquet", cache.path / "images.parquet")
    return make_config(folder, views=3)


def codec_without_parameters(folder: Path, cache: Cache) -> ExtractConfig:
    for path in (cache.path / "codec").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    return make_config(folder, views=3)


MISFITS: dict[str, tuple[Callable[[Path, Cache], ExtractConfig], type[ProteusCacheError], str]] = {
    "an image replaced": (replace_image, ProteusCacheError, "changed since its first view was made"),
    "all images replaced": (replace_all_images, ProteusCacheError, "changed since its first view was made"),
    "an image removed": (remove_image, StorageError, "cannot be read: No such file"),
    "another data set": (other_images, UsageError, "holds none of this cache's images"),
    "another label map": (other_labels, UsageError, "list.txt: gives class_./image_.* the label ., and this cache has"),
    "an image listed twice": (twice_the_same, ImageListError, "is listed twice; remove one of the lines"),
    "a label that is no number": (label_that_is_none, ImageListError, "line 1: the label after the tab"),
    "one weight changed": (one_weight, UsageError, "--weights is teacher.safetensors"),
    "weights of half the bits": (half_the_bits, UsageError, "--weights is teacher.safetensors"),
    "the manifest of another cache": (manifest_of_another, ProteusCacheError, "missing, and no copy is left of it"),
    "a receipt of another cache": (receipt_of_another, DamageError, "s00001.json: belongs to another cache"),
    "the list of another cache": (list_of_another, DamageError, "images.parquet: damaged"),
    "damaged parameters of a codec": (codec_without_parameters, DamageError, "safetensors: damaged"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_and_what_is_done_stays(finished: Cache, tmp_path: Path, name: str) -> None:
    spoil, kind, reason = MISFITS[name]
    shutil.copytree(finished.path.parent, tmp_path, dirs_exist_ok=True)
    config = spoil(tmp_path, open_cache(tmp_path / "cache"))
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    with pytest.raises(kind, match=reason) as caught:
        run_extract(config)

    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(path.read_bytes() == data for path, data in before.items())
    new = [path for path in (tmp_path / "cache/receipts").rglob("*.json") if path not in before]
    assert all(json.loads(path.read_bytes())["quarantined"] == [] for path in new)
    assert not (tmp_path / "new/manifest.json").exists()


def test_a_unit_that_is_missing_is_made_again_and_no_other(finished: Cache, tmp_path: Path) -> None:
    shutil.copytree(finished.path.parent, tmp_path, dirs_exist_ok=True)
    cache = tmp_path / "cache"
    for part in ("receipts/v000/s00001.json", "views/v000/s00001.tar", "targets.zarr/v000/cls/c/1/0"):
        (cache / part).unlink()
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}

    done = run_extract(replace(make_config(finished.path.parent), out=cache))

    assert (done.units_committed, done.units_left) == (1, 0)
    assert identity(open_cache(cache)) == identity(finished)
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == set()
    assert verify_cache(cache, read_data=True) == []


def test_the_same_list_continues_the_cache(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    rows = [f"class_{n % 3}/image_{n:03d}.JPEG\t{n % 3}" for n in range(10)]
    config = with_list(tmp_path, rows, views=1)
    run_extract(config)

    assert run_extract(replace(config, views=2)).units_committed == 3


def test_the_number_of_cases_is_as_stated() -> None:
    tests = [value for name, value in globals().items() if name.startswith("test_")]
    tests.remove(test_the_number_of_cases_is_as_stated)

    assert sum(_n_variants(test) for test in tests) == N_CASES


def _n_variants(test: Callable[..., None]) -> int:
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    return math.prod(len(mark.args[1]) for mark in marks)
