"""Row I5, packs: every class of damage is found, repaired to the very bytes that pack.json states, or said."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proteus_cache.errors import DamageError, UsageError
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.verify import verify_pack
from proteus_cache.repair.pack import repair_pack
from proteus_cache.repair.report import RepairReport
from tests.makers import run_extract
from tests.repair.stores import (
    Stores,
    append,
    copy_bytes,
    cut,
    empty,
    flip,
    make_settings,
    refuse,
    swap,
    tree,
    zero_page,
)

TAR, OTHER_TAR, INDEX, PROBE_INDEX = "v000/s00001.tar", "v001/s00001.tar", "v000.idx", "probe.idx"


def on(relative: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda pack: damage(pack / relative)


def on_blob(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda pack: damage(next((pack / "codec").iterdir()))


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit flipped in {name}": on(name, flip) for name in (TAR, INDEX, PROBE_INDEX)},
    "bit flipped in parameters": on_blob(flip),
    **{f"{name} removed": on(name, Path.unlink) for name in (TAR, INDEX, "probe/s00000.tar")},
    "parameters removed": on_blob(Path.unlink),
    **{f"{name} cut": on(name, cut) for name in (TAR, INDEX)},
    **{f"{name} empty": on(name, empty) for name in (TAR, INDEX)},
    **{f"junk behind {name}": on(name, append) for name in (TAR, INDEX)},
    f"page of {TAR} zeroed": on(TAR, zero_page),
    "tars of two view indices swapped": lambda pack: swap(pack / TAR, pack / OTHER_TAR),
    "tars of two shards swapped": lambda pack: swap(pack / TAR, pack / "v000/s00000.tar"),
    "indices swapped": lambda pack: swap(pack / INDEX, pack / "v001.idx"),
    "tar of another shard in its place": lambda pack: copy_bytes(pack / "v000/s00000.tar", pack / TAR),
}


def repaired(stores: Stores, **options: Any) -> RepairReport:
    return repair_pack(stores.pack, **{"cache": None, "home": stores.home, **options})


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_repaired_to_the_same_bytes(name: str, whole: Stores, stores: Stores) -> None:
    DAMAGES[name](stores.pack)

    found = verify_pack(stores.pack, read_data=True)
    report = repaired(stores)

    assert found, "verify must find it"
    assert report.is_whole, report.lines()
    assert verify_pack(stores.pack, read_data=True) == []
    assert tree(stores.pack) == tree(whole.pack)
    assert not (stores.pack / "tmp").exists()
    assert tree(stores.cache) == tree(whole.cache)
    assert repaired(stores).actions == []


def test_all_at_once_after_a_dry_run(whole: Stores, stores: Stores) -> None:
    for name in ("parameters removed", f"{TAR} removed", f"{INDEX} cut", "bit flipped in probe.idx"):
        DAMAGES[name](stores.pack)
    before = tree(stores.pack)

    promised = repaired(stores, dry_run=True)
    unchanged = tree(stores.pack)
    report = repaired(stores)

    assert {action.state for action in promised.actions} == {"to do"}
    assert unchanged == before
    assert [action.paths for action in report.actions] == [action.paths for action in promised.actions]
    assert report.is_whole, report.lines()
    assert tree(stores.pack) == tree(whole.pack)


@pytest.mark.parametrize("codec", ["int4", "float16"])
def test_a_pack_with_another_codec_is_made_of_the_same_bytes(stores: Stores, codec: str) -> None:
    recoded = stores.home / "packs" / "recoded"
    build_pack(stores.cache, recoded, codec=codec)
    before = tree(recoded)
    flip(recoded / TAR)
    shutil.rmtree(recoded / "codec", ignore_errors=True)  # int4 is fitted again

    report = repair_pack(recoded, cache=None, home=stores.home)

    assert report.is_whole, report.lines()
    assert tree(recoded) == before


def test_an_index_is_read_off_the_tars_when_the_cache_is_gone(whole: Stores, stores: Stores) -> None:
    shutil.rmtree(stores.cache)
    (stores.pack / INDEX).unlink()

    assert repaired(stores).is_whole
    assert tree(stores.pack) == tree(whole.pack)


def test_an_index_of_quarantined_images_needs_the_image_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_settings(tmp_path, n_images=10)
    next(config.images.rglob("*.JPEG")).write_bytes(b"no picture")
    run_extract(config)
    stores = Stores(config.home, config)
    build_pack(stores.cache, stores.pack)
    before = tree(stores.pack)
    for index in (INDEX, "v001.idx"):
        (stores.pack / index).unlink()

    alone = repair_pack(stores.pack, cache=None, home=tmp_path / "nowhere")
    together = repaired(stores)

    assert [action.state for action in alone.actions] == ["not done", "not done"]
    assert "give --cache" in alone.actions[0].remedy
    assert together.is_whole, together.lines()
    assert tree(stores.pack) == before


def test_without_the_cache_a_tar_stays_as_it_is_and_the_alternative_is_named(stores: Stores) -> None:
    shutil.rmtree(stores.cache)
    flip(stores.pack / TAR)
    before = tree(stores.pack)

    report = repaired(stores)

    (action,) = report.actions
    assert action.state == "not done"
    assert "its cache is not below" in action.remedy
    assert "copy this file from another copy of the pack" in action.remedy
    assert tree(stores.pack) == before
    assert not report.is_whole


def test_a_unit_that_was_moved_out_of_the_cache_is_said(stores: Stores) -> None:
    (stores.cache / "receipts/v000/s00001.json").unlink()
    flip(stores.pack / TAR)

    (action,) = repaired(stores).actions

    assert action.state == "not done"
    assert "the cache no longer holds this unit" in action.remedy


def test_a_cache_that_was_redone_into_other_numbers_does_not_get_in(
    whole: Stores, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same unit of the same cache, whose codes differ in their last bits, as another GPU's would."""
    from proteus_cache.codecs.scalar import Int8Codec
    from proteus_cache.repair.cache import repair_cache

    encode = Int8Codec.encode
    with monkeypatch.context() as patch:
        patch.setattr(Int8Codec, "encode", lambda codec, tokens: encode(codec, tokens * 1.01))
        repair_cache(stores.cache, stores.settings, home=stores.home, units=["v000/s00001"])
    flip(stores.pack / TAR)
    damaged = (stores.pack / TAR).read_bytes()

    (action,) = repaired(stores).actions

    assert action.state == "not done"
    assert "is not the receipt that was packed; the unit was redone since, and gives another tar" in action.remedy
    assert (stores.pack / TAR).read_bytes() == damaged


def test_a_damaged_cache_does_not_get_in(stores: Stores) -> None:
    flip(stores.pack / TAR)
    flip(stores.cache / "targets.zarr/v000/patch/c/1/0")

    (action,) = repaired(stores).actions

    assert action.state == "not done"
    assert "run `proteus-cache repair" in action.remedy


def test_another_cache_is_refused(stores: Stores, tmp_path: Path) -> None:
    other = make_settings(tmp_path / "other", seed=5)
    run_extract(other)

    with pytest.raises(UsageError, match="is not the cache that .* was made from"):
        repaired(stores, cache=other.out)
    with pytest.raises(UsageError, match="has no such unit"):
        repaired(stores, units=["v000/s00009"])


def test_foreign_files_are_named_and_left(stores: Stores) -> None:
    (stores.pack / "v000" / "s00001.tar.bak").write_text("mine")
    flip(stores.pack / TAR)

    report = repaired(stores)

    assert {action.paths[0]: action.state for action in report.actions} == {
        TAR: "done",
        "v000/s00001.tar.bak": "not done",
    }
    assert (stores.pack / "v000" / "s00001.tar.bak").read_text() == "mine"
    assert not report.is_whole


def test_a_damaged_pack_json_is_said_and_nothing_is_done(stores: Stores) -> None:
    flip(stores.pack / "pack.json")
    before = tree(stores.pack)

    with pytest.raises(DamageError, match=r"pack\.json: damaged"):
        repaired(stores)

    assert tree(stores.pack) == before


def test_the_report_is_one_object_for_machines(stores: Stores) -> None:
    flip(stores.pack / TAR)

    report = json.loads(json.dumps(repaired(stores).to_json()))

    assert (report["kind"], report["is_whole"], report["left"], report["error"]) == ("pack", True, [], None)
    (action,) = report["actions"]
    assert (action["unit"], action["paths"], action["state"]) == ("v000/s00001", [TAR], "done")
    assert action["problem"].startswith("damaged (SHA-256 differs from pack.json)")


def test_a_whole_unit_that_cannot_be_made_again_stays_whole(whole: Stores, stores: Stores) -> None:
    shutil.rmtree(stores.cache)

    report = repaired(stores, units=["v000/s00001"])

    assert [action.state for action in report.actions] == ["not done"]
    assert "the tar that is there is whole, and stays" in report.actions[0].remedy
    assert "copy this file" not in report.actions[0].remedy
    assert report.is_whole
    assert not report.is_done
    assert report.lines()[-1] == f"pack {stores.pack}: 1 not done; whole"
    assert tree(stores.pack) == tree(whole.pack)


def test_a_cache_that_was_moved_into_the_pack_is_not_offered_to_be_packed_anew(stores: Stores) -> None:
    flip(stores.pack / TAR)
    assert "or pack the cache to a new folder" in _remedy_with_a_damaged_cache(stores)

    for part in ("receipts", "views", "targets.zarr"):
        shutil.rmtree(stores.cache / part)
    (action,) = repaired(stores).actions

    assert "the cache no longer holds this unit" in action.remedy
    assert action.remedy.endswith("copy this file from another copy of the pack")


def _remedy_with_a_damaged_cache(stores: Stores) -> str:
    codes = stores.cache / "targets.zarr/v000/patch/c/1/0"
    data = codes.read_bytes()
    flip(codes)
    (action,) = repaired(stores).actions
    codes.write_bytes(data)
    return action.remedy


def test_a_full_disk_is_said_once(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TAR, OTHER_TAR, INDEX):
        flip(stores.pack / name)
    before = tree(stores.pack)
    with monkeypatch.context() as patch:
        refuse(patch, "create", errno.ENOSPC, lambda path: path.parent.name == "tmp")
        report = repaired(stores)

    assert [action.state for action in report.actions] == ["not done"] * 3
    assert [os.strerror(errno.ENOSPC) in line for line in report.lines()].count(True) == 1
    assert report.lines()[-2].startswith("stopped: ")
    assert tree(stores.pack) == before
    assert repaired(stores).is_whole
