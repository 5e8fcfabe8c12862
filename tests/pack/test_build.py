"""Packing a real small cache: what is packed, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from proteus_cache import storage
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.errors import ChecksumError, ConfigError, DamageError, SpaceError, UsageError
from proteus_cache.pack import build, unit
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.pack.reader import open_pack
from proteus_cache.pack.verify import verify_pack
from tests.makers import N_PATCHES, WIDTH, make_cache, make_config, make_images, run_extract


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Ten images and one that is none, in shards of four, two view indices and a probe; do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    make_config(folder)
    (folder / "images" / "class_0" / "damaged.JPEG").write_bytes(b"\xff\xd8\xff and no more")
    return make_cache(folder, probe_images=3)


@pytest.fixture
def cache(finished: Cache, tmp_path: Path) -> Cache:
    """A copy that a test may change."""
    shutil.copytree(finished.path, tmp_path / "cache")
    return open_cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def packed(finished: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pack; do not change it."""
    return build_pack(finished.path, tmp_path_factory.mktemp("packed") / "pack", workers=2).path


def contents(folder: Path) -> dict[str, str]:
    """Relative path to digest of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_view_index_that_lacks_a_unit_is_said_to_be_left_out(cache: Cache, tmp_path: Path) -> None:
    cache.layout.receipt("v001", 2).unlink()
    cache = open_cache(cache.path)

    by_itself, asked_for = (
        plan_pack(cache.path, tmp_path / "pack"),
        plan_pack(cache.path, tmp_path / "p", views=["v000"]),
    )

    assert by_itself.views == ["v000", "probe"]
    assert by_itself.lines()[2] == "left out  v001 (2 of 3 units): not complete in the cache"
    assert not any(line.startswith("left out") for line in asked_for.lines())


def test_a_pack_holds_the_samples_of_the_cache(finished: Cache, packed: Path) -> None:
    pack = open_pack(packed)

    assert len(pack) == len(finished) == 20
    for index in range(20):
        ours, theirs = pack[index], finished[index]
        assert (ours.key, ours.label, ours.view_index) == (theirs.key, theirs.label, theirs.view_index)
        assert np.array_equal(ours.view, theirs.view)
        assert all(np.array_equal(ours.targets[name], theirs.targets[name]) for name in ("cls", "patch"))
    assert not any("damaged" in pack[index].key for index in range(20))
    assert pack.cache_id == finished.cache_id()
    assert (pack.teacher, pack.view_spec) == (finished.manifest.teacher, finished.manifest.views)


def test_a_pack_holds_the_files_that_the_format_says(finished: Cache, packed: Path) -> None:
    parameters = finished.target("patch").codec.parameters
    expected = {"pack.json", f"codec/{parameters}.safetensors", "probe.idx", "probe/s00000.tar"}
    for view in ("v000", "v001"):
        expected |= {f"{view}.idx", *(f"{view}/s{shard:05d}.tar" for shard in range(3))}

    assert set(contents(packed)) == expected


def test_rows_are_those_of_the_image_list(finished: Cache, packed: Path) -> None:
    pack = open_pack(packed)
    keys = finished.image_table["key"].to_pylist()

    for view in ("v000", "probe"):
        n_records = pack.document.packed[view].n_samples
        records = pack.sample_reader().index(view).read(np.arange(n_records))
        assert [keys[row] for row in records["row"]] == [pack.sample(view, number).key for number in range(n_records)]


def test_packing_twice_gives_equal_bytes(finished: Cache, packed: Path, tmp_path: Path) -> None:
    build_pack(finished.path, tmp_path / "again", workers=1)

    assert contents(tmp_path / "again") == contents(packed)


def test_a_finished_pack_is_left_as_it_is(finished: Cache, packed: Path) -> None:
    before = contents(packed)

    report = build_pack(finished.path, packed)

    assert (report.units_written, report.units_kept, report.units_moved) == (0, 7, 0)
    assert plan_pack(finished.path, packed).bytes_todo == 0
    assert contents(packed) == before


def test_a_slice_takes_what_was_chosen(finished: Cache, tmp_path: Path) -> None:
    report = build_pack(finished.path, tmp_path / "pack", views=["v001"], targets=["cls"])
    pack = open_pack(report.path)

    assert (report.views, report.n_samples, len(pack)) == (["v001"], 10, 10)
    assert [target.name for target in pack.targets] == ["cls"]
    assert pack.code_bytes == 2 * WIDTH
    assert pack[3].view_index == 1
    assert np.array_equal(pack[3].targets["cls"], finished[13].targets["cls"])
    assert verify_pack(report.path, read_data=True) == []


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_another_codec_holds_the_same_tokens(finished: Cache, tmp_path: Path, codec: str) -> None:
    pack = open_pack(build_pack(finished.path, tmp_path / "pack", codec=codec).path)

    assert [target.codec.name for target in pack.targets] == [codec, codec]
    tolerance = 0 if codec == "float32" else 2**-11  # half a step of float16
    for index in (0, 19):
        for name in ("cls", "patch"):
            ours, theirs = pack[index].targets[name], finished[index].targets[name]
            assert np.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert verify_pack(pack.path, read_data=True) == []


def test_a_codec_is_fitted_again_from_the_first_views(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, n_images=5, views=1, codec="float16")

    first = open_pack(build_pack(cache.path, tmp_path / "pack", codec="int8").path)
    second = build_pack(cache.path, tmp_path / "again", codec="int8").path

    assert [target.codec.name for target in first.targets] == ["float16", "int8"]
    error = first[2].targets["patch"] - cache[2].targets["patch"]
    assert np.square(error).mean() < 3e-4 * np.var(cache[2].targets["patch"])
    assert first[2].targets["patch"].shape == (N_PATCHES, WIDTH)
    assert contents(first.path) == contents(second)


def test_a_killed_pack_goes_on_where_it_was(
    finished: Cache, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "pack", 0
    pack_unit = unit.pack_unit

    def die_at_the_fourth(*arguments: object) -> unit.PackedUnit:
        nonlocal begun
        begun += 1
        if begun == 4:
            raise KeyboardInterrupt
        return pack_unit(*arguments)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(build, "pack_unit", die_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        build_pack(finished.path, out, workers=1)
    with pytest.raises(UsageError, match="give a pack"):
        open_pack(out)
    report = build_pack(finished.path, out, workers=1)

    assert report.units_kept >= 3
    assert report.units_written == 7 - report.units_kept >= 1
    assert contents(out) == contents(packed)


def test_a_tar_that_changed_since_is_packed_again(
    finished: Cache, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    monkeypatch.setattr(build, "_finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        build_pack(finished.path, out)
    monkeypatch.undo()
    path = out / "v001" / "s00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (out / "tmp" / "v000-s00001.json").write_bytes(b"{}")

    report = build_pack(finished.path, out)

    assert report.units_written == 2
    assert contents(out) == contents(packed)


def test_another_choice_sweeps_away_what_an_abandoned_pack_left(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    monkeypatch.setattr(build, "_finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        build_pack(finished.path, out)
    monkeypatch.undo()

    build_pack(finished.path, out, views=["v000"], codec="float32")

    assert verify_pack(out, read_data=True) == []
    assert not (out / "v001").exists()


@pytest.mark.parametrize("relative", ["views/v001/s00001.tar", "targets.zarr/v001/patch/c/1/0"])
def test_damage_in_the_cache_is_never_packed(cache: Cache, tmp_path: Path, relative: str) -> None:
    path = cache.path / relative
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(ChecksumError, match="damaged"):
        build_pack(cache.path, tmp_path / "pack")
    assert not (tmp_path / "pack" / "pack.json").exists()


def test_moving_leaves_one_copy(cache: Cache, packed: Path, tmp_path: Path) -> None:
    report = build_pack(cache.path, tmp_path / "pack", move=True)

    assert report.units_moved == 7
    assert contents(tmp_path / "pack") == contents(packed)
    assert not [name for name in contents(cache.path) if name.endswith(".tar") or "/c/" in name or "receipts" in name]
    assert verify_pack(tmp_path / "pack", read_data=True) == []


def test_a_finished_pack_can_take_over_the_cache(cache: Cache, tmp_path: Path) -> None:
    build_pack(cache.path, tmp_path / "pack")
    cache.layout.receipt("v000", 0).unlink()  # as a move that was killed leaves it

    report = build_pack(cache.path, tmp_path / "pack", move=True)
    again = build_pack(cache.path, tmp_path / "pack", move=True)

    assert (report.units_written, report.units_moved, again.units_moved) == (0, 7, 0)
    assert open_cache(cache.path).views() == []
    assert not [name for name in contents(cache.path) if name.endswith(".tar") or "/c/" in name]


def test_a_killed_move_goes_on_though_the_cache_shrank(
    cache: Cache, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, removed = tmp_path / "pack", 0
    remove = storage.remove

    def die_at_the_sixth(path: Path) -> None:
        nonlocal removed
        removed += 1
        if removed == 6:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(storage, "remove", die_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        build_pack(cache.path, out, move=True, workers=1)
    monkeypatch.undo()
    assert not open_cache(cache.path).is_complete("v000")
    with pytest.raises(UsageError, match=r"holds another pack \(its targets are"):
        build_pack(cache.path, out, targets=["cls"])
    report = build_pack(cache.path, out, move=True)

    assert contents(out) == contents(packed)
    assert report.units_kept >= 2
    assert not [name for name in contents(cache.path) if name.endswith(".tar") or "/c/" in name]


def test_a_half_moved_pack_whose_tar_is_lost_says_what_can_be_done(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    monkeypatch.setattr(build, "_finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        build_pack(cache.path, out, move=True)
    monkeypatch.undo()
    (out / "v000" / "s00002.tar").unlink()

    with pytest.raises(UsageError, match=r"s00002\.tar: is missing or damaged, and its unit was moved"):
        build_pack(cache.path, out, move=True)


def test_nothing_is_removed_when_the_tar_does_not_read_back(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(cache.path)
    monkeypatch.setattr(storage, "sha256_of", lambda _, **__: (0, "0" * 64))

    with pytest.raises(ChecksumError, match="does not read back as written; the cache's copy is kept"):
        build_pack(cache.path, tmp_path / "pack", move=True)

    assert contents(cache.path) == before


@pytest.mark.parametrize("how", [{"targets": ["cls"]}, {"codec": "float32"}])
def test_a_move_that_would_lose_something_is_refused(finished: Cache, tmp_path: Path, how: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--move would lose targets or precision"):
        build_pack(finished.path, tmp_path / "pack", move=True, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"views": ["v007"]}, UsageError, "view index v007 is not complete, or not there; complete are v000, v001"),
        ({"views": []}, UsageError, "is needed"),
        ({"targets": ["block.3"]}, UsageError, "holds no target block.3, only cls, patch"),
        ({"targets": []}, UsageError, "at least one target"),
        ({"codec": "int3"}, ConfigError, "unknown codec 'int3'; did you mean int8?"),
    ],
)
def test_what_the_cache_lacks_is_said(
    finished: Cache, tmp_path: Path, how: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_pack(finished.path, tmp_path / "pack", **how)  # type: ignore[arg-type]  # options of plan_pack


def test_a_folder_that_holds_something_else_is_refused(finished: Cache, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    plan_pack(finished.path, tmp_path)
    (tmp_path / "tmp" / "precious").touch()
    with pytest.raises(UsageError, match="is no cache, pack or run \\(it holds tmp/precious\\)"):
        plan_pack(finished.path, tmp_path)
    with pytest.raises(UsageError, match="it holds cache"):
        plan_pack(finished.path, finished.path.parent)
    with pytest.raises(UsageError, match=r"holds another pack \(its view indices are probe, v000, v001\)"):
        plan_pack(finished.path, packed, views=["v000"])
    with pytest.raises(UsageError, match=r"holds another pack \(its targets are cls float16, patch int8, not"):
        plan_pack(finished.path, packed, codec="float32")


def test_a_pack_of_another_cache_or_of_fewer_views_is_not_replaced(packed: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path, n_images=5, views=1)
    with pytest.raises(UsageError, match="it is of another cache"):
        plan_pack(other.path, packed)
    build_pack(other.path, tmp_path / "pack")

    run_extract(make_config(tmp_path, n_images=5, views=2))

    with pytest.raises(UsageError, match="its view indices are v000"):
        plan_pack(other.path, tmp_path / "pack")
    shutil.rmtree(other.path / "receipts")
    with pytest.raises(UsageError, match="no view index is complete yet"):
        plan_pack(other.path, tmp_path / "new")


def test_what_cannot_fit_is_refused_with_what_fits(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan_pack(finished.path, tmp_path / "pack").bytes_todo
    assert needed == pytest.approx(sum(p.stat().st_size for p in tmp_path.rglob("*")), abs=200_000)

    for free, message in ((needed // 2, "--views v000 fits"), (9, "--move needs no second copy")):
        monkeypatch.setattr(storage, "free_space", lambda _, free=free: storage.Free(free, None))
        with pytest.raises(SpaceError, match=f"are needed and .* are free; {message}"):
            build_pack(finished.path, tmp_path / "pack")
    monkeypatch.setattr(storage, "free_space", lambda _: storage.Free(needed, None))
    plan_pack(finished.path, tmp_path / "pack", move=True).check(1)
    monkeypatch.setattr(storage, "free_space", lambda _: storage.Free(1 << 40, 3))
    with pytest.raises(SpaceError, match="inodes are free"):
        build_pack(finished.path, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_the_plan_says_what_will_be_done(finished: Cache, packed: Path, tmp_path: Path) -> None:
    plan = plan_pack(finished.path, tmp_path / "pack", move=True)

    assert plan.n_units == 7
    assert plan.to_json()["targets"]["patch"] == {"shape": [N_PATCHES, WIDTH], "codec": "int8"}
    assert "v000, v001, probe: 7 tars" in "\n".join(plan.lines())
    assert plan.bytes_all >= sum(path.stat().st_size for path in packed.glob("*/*.tar"))
    assert "nothing: the pack is there" in "\n".join(plan_pack(finished.path, packed).lines())


def test_progress_ends_with_all_units(finished: Cache, tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []

    build_pack(finished.path, tmp_path / "pack", workers=2, progress=lambda *at: calls.append(at))

    assert [call[:2] for call in calls] == [(done, 7) for done in range(1, 8)]
    assert calls[-1][2] == sum(path.stat().st_size for path in (tmp_path / "pack").glob("*/*.tar"))


def test_a_unit_without_any_view_is_an_empty_tar(tmp_path: Path) -> None:
    make_config(tmp_path, n_images=5)
    for path in (tmp_path / "images").rglob("*.JPEG"):
        path.write_bytes(b"\xff\xd8\xff")
    make_images(tmp_path / "images" / "more", 4, seed=1)
    cache = make_cache(tmp_path, shard_size=1, views=1)

    pack = open_pack(build_pack(cache.path, tmp_path / "pack").path)

    sizes = [(pack.path / f"v000/s{shard:05d}.tar").stat().st_size for shard in range(9)]
    assert sorted(sizes)[:5] == [1024] * 5
    assert len(pack) == 4
    assert {pack[index].label for index in range(4)} <= {0, 1, 2, 3, None}
    assert verify_pack(pack.path, read_data=True) == []


def test_a_finished_pack_that_lost_a_tar_is_not_taken_for_whole(finished: Cache, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "pack")
    (tmp_path / "pack" / "v000" / "s00001.tar").unlink()

    with pytest.raises(DamageError, match=r"s00001\.tar: missing; run `proteus-cache repair "):
        build_pack(finished.path, tmp_path / "pack")
