"""Row I5, caches: every class of damage is found, repaired, and gone, and nothing else has changed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import open_cache, tar
from proteus_cache.cache.verify import verify_cache
from proteus_cache.documents import seal
from proteus_cache.errors import DamageError, UsageError, WeightsError
from proteus_cache.repair.cache import repair_cache
from proteus_cache.repair.report import RepairReport
from tests.makers import identity, make_images, make_teacher, run_extract
from tests.repair.stores import (
    Stores,
    append,
    copy_bytes,
    cut,
    edit,
    empty,
    flip,
    make_settings,
    reseal,
    swap,
    tree,
    zero_page,
)

TAR, PATCH, CLS = "views/v000/s00001.tar", "targets.zarr/v000/patch/c/1/0", "targets.zarr/v001/cls/c/2/0"
RECEIPT, ARRAY, GROUP = "receipts/v000/s00001.json", "targets.zarr/v001/patch/zarr.json", "targets.zarr/v000/zarr.json"
ROOT, IMAGES, PROBE = "targets.zarr/zarr.json", "images.parquet", "views/probe/s00000.tar"


def on(relative: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda cache: damage(cache / relative)


def on_blob(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda cache: damage(next((cache / "codec").iterdir()))


def swapped(first: str, second: str) -> Callable[[Path], None]:
    return lambda cache: swap(cache / first, cache / second)


def copied(source: str, target: str) -> Callable[[Path], None]:
    return lambda cache: copy_bytes(cache / source, cache / target)


def older_receipt(cache: Path) -> None:
    """A sealed receipt of the same unit from an earlier extraction, whose codes differed in their last bits."""

    def age(receipt: dict[str, Any]) -> None:
        receipt["files"][PATCH]["sha256"] = "0" * 64
        receipt["samples"]["crc32c"]["patch"][0] ^= 1

    edit(cache / RECEIPT, age)


def members_of(path: Path) -> dict[str, bytes]:
    """Name to bytes of every file in a tar, in order."""
    data = path.read_bytes()
    members = tar.members(io.BytesIO(data), len(data), str(path), 1000)
    return {member.name: data[member.offset : member.offset + member.size] for member in members}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    parts = [part for name, data in members.items() for part in (tar.header(name, len(data)), data)]
    sizes = [len(data) for data in members.values()]
    path.write_bytes(
        b"".join(parts[2 * n] + parts[2 * n + 1] + tar.padding(size) for n, size in enumerate(sizes)) + tar.END
    )


def with_field(data: bytes, name: str, value: str) -> bytes:
    """A sealed document with one field changed, and sealed again."""
    document = json.loads(data)
    del document["digest"]
    return seal(document | {name: value})


def receipt_of_other_images(cache: Path) -> None:
    """Receipt and tar agree with each other, and not with the image list."""
    members = members_of(cache / TAR)
    first, second = list(dict.fromkeys(name.partition(".")[0] for name in members))[:2]
    names = {first: second, second: first}

    def renamed(name: str) -> str:
        key, _, extension = name.partition(".")
        return f"{names.get(key, key)}.{extension}"

    def rename(receipt: dict[str, Any]) -> None:
        receipt["samples"]["keys"] = [names.get(key, key) for key in receipt["samples"]["keys"]]

    def described(name: str, data: bytes) -> bytes:
        return with_field(data, "key", renamed(name).partition(".")[0]) if name.endswith(".json") else data

    write_tar(cache / TAR, {renamed(name): described(name, data) for name, data in members.items()})
    edit(cache / RECEIPT, rename)
    reseal(cache, "v000/s00001")


def document_of_another_view(cache: Path) -> None:
    """The sample documents are sealed, and say v001."""
    members = members_of(cache / TAR)
    changed = {
        name: with_field(data, "view", "v001") if name.endswith(".json") else data for name, data in members.items()
    }
    write_tar(cache / TAR, changed)
    reseal(cache, "v000/s00001")


def pixels_of_another_image(cache: Path) -> None:
    """Two views have changed places in a tar, and the receipt's digests of files are right."""
    members = members_of(cache / TAR)
    first, second = [name for name in members if name.endswith(".jpg")][:2]
    write_tar(cache / TAR, members | {first: members[second], second: members[first]})
    reseal(cache, "v000/s00001")


def codes_of_another_unit(cache: Path) -> None:
    """Whole, resealed, and not those of the CRCs."""
    shutil.copy(cache / "targets.zarr/v001/patch/c/1/0", cache / PATCH)
    reseal(cache, "v000/s00001")


def link_for_a_file(cache: Path) -> None:
    (cache / TAR).rename(cache.parent / "elsewhere.tar")
    (cache / TAR).symlink_to(cache.parent / "elsewhere.tar")


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{
        f"bit flipped in {name}": on(name, flip)
        for name in (TAR, PATCH, CLS, RECEIPT, ARRAY, GROUP, ROOT, IMAGES, PROBE)
    },
    "bit flipped in parameters": on_blob(flip),
    **{f"{name} removed": on(name, Path.unlink) for name in (TAR, PATCH, CLS, RECEIPT, ARRAY, GROUP, ROOT, IMAGES)},
    "parameters removed": on_blob(Path.unlink),
    **{f"{name} cut": on(name, cut) for name in (TAR, PATCH, RECEIPT, ARRAY, IMAGES)},
    **{f"{name} empty": on(name, empty) for name in (TAR, RECEIPT)},
    **{f"junk behind {name}": on(name, append) for name in (TAR, PATCH, RECEIPT)},
    **{f"page of {name} zeroed": on(name, zero_page) for name in (TAR, PATCH)},
    "codes of two units swapped": swapped(PATCH, "targets.zarr/v001/patch/c/1/0"),
    "codes of two shards swapped": swapped(PATCH, "targets.zarr/v000/patch/c/0/0"),
    "tars swapped": swapped(TAR, "views/v001/s00001.tar"),
    "receipts swapped": swapped(RECEIPT, "receipts/v001/s00001.json"),
    "tar of another shard in its place": copied("views/v000/s00000.tar", TAR),
    "zarr.json of another target": copied("targets.zarr/v001/cls/zarr.json", ARRAY),
    "older receipt": older_receipt,
    "receipt and tar of other images, resealed": receipt_of_other_images,
    "documents of another view, resealed": document_of_another_view,
    "pixels of another image, resealed": pixels_of_another_image,
    "codes of another unit, resealed": codes_of_another_unit,
    "link in place of a tar": link_for_a_file,
}


def repaired(stores: Stores, **options: Any) -> RepairReport:
    return repair_cache(stores.cache, stores.settings, home=stores.home, **options)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_repaired_and_gone(name: str, whole: Stores, stores: Stores) -> None:
    DAMAGES[name](stores.cache)

    found = verify_cache(stores.cache, read_data=True)
    report = repaired(stores)

    assert found, "verify must find it"
    assert report.is_whole, report.lines()
    assert all(action.state == "done" for action in report.actions)
    assert verify_cache(stores.cache, read_data=True) == []
    assert identity(open_cache(stores.cache)) == identity(open_cache(whole.cache))
    assert tree(stores.cache) == tree(whole.cache)
    assert repaired(stores).actions == []


def test_only_damaged_units_are_touched(stores: Stores) -> None:
    flip(stores.cache / TAR)
    before = {path: path.stat().st_ino for path in stores.cache.rglob("*.*") if path.is_file()}

    repaired(stores)

    changed = {str(path.relative_to(stores.cache)) for path, inode in before.items() if path.stat().st_ino != inode}
    assert changed == {TAR, RECEIPT}


def test_a_receipt_of_another_cache_is_replaced(whole: Stores, stores: Stores, tmp_path: Path) -> None:
    other = make_settings(tmp_path / "other", seed=5)
    run_extract(other)
    shutil.copy(other.out / RECEIPT, stores.cache / RECEIPT)

    assert "belongs to another cache" in verify_cache(stores.cache)[0].problem
    assert repaired(stores).is_whole
    assert tree(stores.cache) == tree(whole.cache)


def test_all_at_once(whole: Stores, stores: Stores) -> None:
    for name in ("parameters removed", f"{IMAGES} cut", f"{ARRAY} removed", f"{RECEIPT} removed", "tars swapped"):
        DAMAGES[name](stores.cache)

    report = repaired(stores)

    assert report.is_whole, report.lines()
    assert tree(stores.cache) == tree(whole.cache)


def test_a_named_unit_is_redone_though_it_looks_whole(whole: Stores, stores: Stores) -> None:
    before = (stores.cache / RECEIPT).stat()

    report = repaired(stores, units=["v000/s00001"])
    after = (stores.cache / RECEIPT).stat()

    assert [(action.unit, action.state) for action in report.actions] == [("v000/s00001", "done")]
    assert (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
    assert tree(stores.cache) == tree(whole.cache)
    with pytest.raises(UsageError, match="--unit v000/s00009: .*no such unit"):
        repaired(stores, units=["v000/s00009"])


def test_a_dry_run_changes_nothing_and_says_what_it_would_do(stores: Stores) -> None:
    flip(stores.cache / TAR)
    (stores.cache / IMAGES).unlink()
    before = tree(stores.cache)

    report = repaired(stores, dry_run=True)

    assert [(action.unit, action.state) for action in report.actions] == [(None, "to do"), ("v000/s00001", "to do")]
    assert tree(stores.cache) == before
    assert not report.is_whole


def test_foreign_files_are_named_and_left(stores: Stores) -> None:
    foreign = ["notes.txt", "views/v000/s00000.tar.bak", "receipts/v000/s00007.json", "views/v009/s00000.tar"]
    for name in foreign:
        (stores.cache / name).parent.mkdir(parents=True, exist_ok=True)
        (stores.cache / name).write_text("mine")
    flip(stores.cache / TAR)

    report = repaired(stores)

    left = {action.paths[0] for action in report.actions if action.state == "not done"}
    assert left == set(foreign)
    assert all((stores.cache / name).read_text() == "mine" for name in foreign)
    assert not report.is_whole
    assert [action.unit for action in report.actions if action.state == "done"] == ["v000/s00001"]


def test_other_weights_are_refused_before_anything_is_touched(stores: Stores, tmp_path: Path) -> None:
    other = make_teacher(tmp_path / "other.safetensors", seed=9)
    flip(stores.cache / TAR)
    (stores.cache / ARRAY).unlink()
    before = tree(stores.cache)

    with pytest.raises(WeightsError, match="was made with weights .* give the same ones with --weights"):
        repair_cache(stores.cache, lambda: replace(stores.config, weights=str(other)), home=stores.home)

    assert tree(stores.cache) == before


def test_other_images_are_refused_before_anything_is_touched(stores: Stores, tmp_path: Path) -> None:
    elsewhere = make_images(tmp_path / "photos", 3, n_classes=1)
    (elsewhere / "class_0").rename(elsewhere / "others")
    flip(stores.cache / TAR)
    before = tree(stores.cache)

    with pytest.raises(UsageError, match="holds none of this cache's images"):
        repair_cache(stores.cache, lambda: replace(stores.config, images=elsewhere), home=stores.home)

    assert tree(stores.cache) == before


@pytest.mark.parametrize("how", ["missing", "changed", "changed, and of one view index"])
def test_a_unit_whose_image_is_not_the_same_keeps_what_it_has(stores: Stores, tmp_path: Path, how: str) -> None:
    images = tmp_path / "images"
    shutil.copytree(stores.config.images, images)
    flip(stores.cache / TAR)
    flip(stores.cache / "views/v000/s00002.tar")
    if how.endswith("of one view index"):  # only the damaged unit's own receipt knows the image
        for part in ("views", "receipts", "targets.zarr"):
            shutil.rmtree(stores.cache / part / "v001")
    path = images / open_cache(stores.cache).image_table["path"][5].as_py()  # in shard 1
    damaged = (stores.cache / TAR).read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"changed")

    report = repair_cache(stores.cache, lambda: replace(stores.config, images=images), home=stores.home)

    states = {action.unit: action.state for action in report.actions}
    assert states == {"v000/s00001": "not done", "v000/s00002": "done"}
    assert str(path) in next(action.remedy for action in report.actions if action.state == "not done")
    assert (stores.cache / TAR).read_bytes() == damaged
    assert not report.is_whole


def test_a_list_that_the_images_no_longer_make_is_not_invented(stores: Stores, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(stores.config.images, images)
    shutil.copy(next(images.rglob("*.JPEG")), images / "class_0" / "new.JPEG")
    (stores.cache / IMAGES).unlink()

    report = repair_cache(stores.cache, lambda: replace(stores.config, images=images), home=stores.home)

    (action,) = report.actions
    assert action.state == "not done"
    assert "makes another image list now" in action.remedy
    assert "copy this file from another copy" in action.remedy
    assert not (stores.cache / IMAGES).exists()


def test_parameters_are_found_in_a_pack_without_images_or_weights(whole: Stores, stores: Stores) -> None:
    on_blob(Path.unlink)(stores.cache)

    def no_settings() -> Any:
        raise AssertionError("nothing has to be extracted")

    report = repair_cache(stores.cache, no_settings, home=stores.home)

    assert report.is_whole
    assert "copy it from another store" in report.actions[0].remedy
    assert tree(stores.cache) == tree(whole.cache)


def test_parameters_are_fitted_again_where_no_other_store_has_them(whole: Stores, stores: Stores) -> None:
    on_blob(Path.unlink)(stores.cache)
    shutil.rmtree(stores.pack)

    report = repaired(stores)

    assert report.is_whole, report.lines()
    assert "fit it again" in report.actions[0].remedy
    assert tree(stores.cache) == tree(whole.cache)


def test_fast_finds_what_sizes_show(stores: Stores) -> None:
    flip(stores.cache / TAR)
    cut(stores.cache / "views/v001/s00000.tar")

    report = repaired(stores, read_data=False)

    assert [action.unit for action in report.actions] == ["v001/s00000"]
    assert [finding.unit for finding in verify_cache(stores.cache, read_data=True)] == ["v000/s00001"]


def test_a_damaged_manifest_is_said_and_nothing_is_done(stores: Stores) -> None:
    flip(stores.cache / "manifest.json")
    before = tree(stores.cache)

    with pytest.raises(DamageError, match=r"manifest\.json: damaged"):
        repaired(stores)

    assert tree(stores.cache) == before


def test_a_folder_in_place_of_a_file_is_left_and_said(stores: Stores) -> None:
    (stores.cache / TAR).unlink()
    (stores.cache / TAR).mkdir()
    (stores.cache / TAR / "mine.txt").write_text("mine")

    report = repaired(stores)

    assert not report.is_whole
    assert (stores.cache / TAR / "mine.txt").read_text() == "mine"
