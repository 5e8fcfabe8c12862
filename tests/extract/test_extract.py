"""extract: resume, growth, several workers, bad images, refusals, and equality with a plain computation."""

import json
import shutil
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from proteus_cache import open_cache, storage
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.cache.writer import commit_unit
from proteus_cache.codecs import fit_codec
from proteus_cache.errors import (
    ConfigError,
    ImageListError,
    ProteusCacheError,
    SpaceError,
    StorageError,
    UsageError,
)
from proteus_cache.extract import pipeline, planning
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import describe_plan, extract
from proteus_cache.processes import Worker
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from tests.makers import (
    identity,
    make_cache,
    make_config,
    make_images,
    make_teacher,
    run_extract,
    shows_canaries,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("finished"))


def test_targets_are_those_of_the_teacher_on_the_stored_pixels(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, codec="float32", targets=("cls", "patch", "block.0"))
    teacher = load_teacher("vit", weights=str(tmp_path / "teacher.safetensors"), home=tmp_path, size_px=None)

    for index in (0, 7, 19):
        sample = cache[index]
        expected = teacher.targets(torch.from_numpy(sample.view.copy()).unsqueeze(0), ["cls", "patch", "block.0"])
        for name, values in expected.items():
            np.testing.assert_allclose(sample.targets[name], values[0].numpy(), rtol=0, atol=1e-5)


def test_int8_codes_are_those_of_the_codec(finished: Cache) -> None:
    record = finished.target("patch")
    sample = finished[3]
    teacher = load_teacher(
        "vit", weights=str(finished.path.parent / "teacher.safetensors"), home=finished.path, size_px=None
    )
    tokens = teacher.targets(torch.from_numpy(sample.view.copy()).unsqueeze(0), ["patch"])["patch"][0].numpy()

    error = np.square(sample.targets["patch"] - tokens).sum() / np.square(tokens - tokens.mean(axis=0)).sum()

    assert record.codec.name == "int8"
    assert error < 3e-4


def test_the_same_command_twice_does_nothing_more(finished: Cache) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}

    done = run_extract(make_config(finished.path.parent))

    assert (done.units_committed, done.units_left) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()} == before


def test_more_views_are_added_to_a_cache(tmp_path: Path, finished: Cache) -> None:
    shutil.copytree(finished.path, tmp_path / "cache")

    done = run_extract(make_config(finished.path.parent, out=tmp_path / "cache", views=3))

    grown = open_cache(tmp_path / "cache")
    assert (done.units_committed, len(grown)) == (3, 30)
    assert {unit: parts for unit, parts in identity(grown).items() if not unit.startswith("v002")} == identity(finished)
    assert verify_cache(grown.path, read_data=True) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_several_workers_make_the_same_cache(tmp_path: Path, finished: Cache, workers: int) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache", workers=workers)

    results = [run_extract(config, Worker(index, 3)) for index in (2, 0, 1)]

    cache = open_cache(tmp_path / "cache")
    assert [result.units_committed for result in results] == [2, 2, 2]
    assert identity(cache) == identity(finished)
    for view, shard in (("v000", 0), ("v001", 2)):
        for target in ("cls", "patch"):
            assert np.array_equal(cache.read_codes(view, shard, target), finished.read_codes(view, shard, target))


def test_batches_do_not_change_views_or_keys(tmp_path: Path, finished: Cache) -> None:
    run_extract(make_config(finished.path.parent, out=tmp_path / "cache", batch_size=64))

    assert identity(open_cache(tmp_path / "cache")) == identity(finished)


def test_a_cut_extraction_goes_on_where_it_was(
    tmp_path: Path, finished: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    commit = commit_unit
    committed: list[object] = []

    def commit_two(*args: object, **options: object) -> object:
        if len(committed) == 2:
            raise StorageError("unplugged")
        committed.append(args)
        return commit(*args, **options)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(pipeline, "commit_unit", commit_two)
    with pytest.raises(StorageError, match="unplugged"):
        run_extract(config)
    monkeypatch.undo()

    done = run_extract(config)

    assert done.units_committed == 4
    assert identity(open_cache(config.out)) == identity(finished)
    assert list((config.out / "tmp").iterdir()) == []


def test_bad_images_are_quarantined_and_skipped(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 9)
    (images / "class_0/empty.jpg").write_bytes(b"")
    (images / "class_1/cut.jpg").write_bytes((images / "class_0/image_000.JPEG").read_bytes()[:200])
    (images / "class_2/page.jpg").write_text("<html>not found</html>")
    Image.new("CMYK", (40, 40)).save(images / "class_0/cmyk.jpg")
    Image.new("L", (40, 40)).save(images / "class_1/grey.jpg")
    Image.new("RGBA", (1, 1)).save(images / "class_2/dot.png")
    make_images(tmp_path / "others", 1)
    make_teacher(tmp_path / "teacher.safetensors")

    cache = make_cache(tmp_path)

    bad = {entry.path for shard in cache.units("v000") for entry in cache.receipt("v000", shard).quarantined}  # type: ignore[union-attr]
    assert bad == {"class_0/empty.jpg", "class_1/cut.jpg", "class_2/page.jpg"}
    assert len(cache) == 2 * 12
    assert verify_cache(cache.path, read_data=True) == []
    table = cache.image_table
    for shard in cache.units("v001"):
        receipt = cache.receipt("v001", shard)
        assert receipt is not None
        codes = cache.read_codes("v001", shard, "patch")
        for entry in receipt.quarantined:
            assert table["path"][entry.row].as_py() == entry.path
            assert str(images) not in entry.reason
            assert not codes[entry.row - receipt.first_row].any()


def test_too_many_bad_images_stop_the_run_and_keep_what_is_done(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_images=30, views=1)
    for path in sorted((tmp_path / "images").rglob("*.JPEG"))[:11]:
        path.write_bytes(b"junk")

    with pytest.raises(ProteusCacheError, match="11 images cannot be used, more than the 10 that are let pass"):
        run_extract(config)

    assert verify_cache(config.out, read_data=True) == []


def test_an_image_that_changed_between_its_views_stops_the_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_images=12, probe_images=2)
    run_extract(config)
    cache = open_cache(config.out)
    victim = tmp_path / "images" / cache.image_table["path"][5].as_py()
    Image.new("RGB", (50, 50), "red").save(victim)

    with pytest.raises(ProteusCacheError, match=f"{victim}: changed since its first view was made"):
        run_extract(make_config(tmp_path, views=3, probe_images=2))

    assert cache.units("v002") == [0]
    assert verify_cache(config.out, read_data=True) == []


def test_an_image_that_vanished_is_no_bad_image(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_images=12)
    planned = plan_cache(config)
    victim = planned.cache.image_table["path"][9].as_py()
    (tmp_path / "images" / victim).unlink()

    with pytest.raises(StorageError, match=victim):
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert open_cache(config.out).units("v000") == [0, 1]
    assert verify_cache(config.out, read_data=True) == []


def test_what_a_worker_meets_is_told_as_here(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_images=12, workers=2)
    planned = plan_cache(config)
    victim = planned.cache.image_table["path"][9].as_py()
    (tmp_path / "images" / victim).unlink()

    with pytest.raises(StorageError, match=victim) as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert "\n" not in str(caught.value)


def test_a_killed_worker_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, n_images=12, workers=1)
    planned = plan_cache(config)
    start = ForkServerProcess.start

    def start_and_kill(self: Any) -> None:
        start(self)
        self.kill()

    monkeypatch.setattr(ForkServerProcess, "start", start_and_kill)

    with pytest.raises(ProteusCacheError, match="ended from outside .*fewer --workers") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert "\n" not in str(caught.value)


def test_the_bad_images_of_all_processes_count_together(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_images=32, views=1)
    planned = plan_cache(config)
    table = planned.cache.image_table
    for row in range(0, 32, 2):
        (tmp_path / "images" / table["path"][row].as_py()).write_bytes(b"junk")

    extract(config, planned, Worker(0, 2), lambda _: None)
    with pytest.raises(ProteusCacheError, match="11 images cannot be used, more than the 10"):
        extract(config, planned, Worker(1, 2), lambda _: None)

    assert verify_cache(config.out, read_data=True) == []


def test_a_new_cache_that_cannot_fit_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    monkeypatch.setattr(storage, "free_space", lambda path: storage.Free(15_000, None))
    with pytest.raises(SpaceError, match=r"15 KB are free; --views 1 --limit \d fits"):
        run_extract(config)
    assert not (config.out / "manifest.json").exists()

    run_extract(make_config(tmp_path, views=1, limit=2))

    assert len(open_cache(config.out)) == 2


def test_settings_are_compared_before_a_teacher_is_loaded(finished: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "load_teacher", lambda *_, **__: pytest.fail("loaded"))

    with pytest.raises(UsageError, match="--teacher is vit there and dinov2_vitg14 here"):
        run_extract(make_config(finished.path.parent, teacher="dinov2_vitg14", weights=None))


@pytest.mark.parametrize("step", ["list_folder", "make_folder", "write_durable", "publish_once"])
def test_a_start_beside_one_that_is_faster_reads_its_plan(
    tmp_path: Path, finished: Cache, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache")
    real, calls = getattr(storage, step), []
    (tmp_path / "cache").mkdir()

    def let_the_other_finish(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            run_extract(config)
        return real(*args)

    monkeypatch.setattr(storage, step, let_the_other_finish)

    done = run_extract(config)

    assert (done.units_committed, done.units_left, len(calls) > 1) == (0, 0, True)
    assert verify_cache(config.out, read_data=True) == []
    assert list((config.out / "tmp").iterdir()) == []


@pytest.mark.gpu
def test_on_a_gpu_every_code_arrives_and_planning_leaves_no_memory_behind(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_images=40, device="cuda", workers=2, codec="float32", precision="fp32")
    (tmp_path / "images/class_0/empty.jpg").write_bytes(b"")

    planned = plan_cache(config)
    assert torch.cuda.memory_reserved() == 0
    extract(config, planned, Worker(0, 1), lambda _: None)

    cache = open_cache(config.out)
    teacher = load_teacher("vit", weights=str(tmp_path / "teacher.safetensors"), home=tmp_path, size_px=None)
    assert verify_cache(cache.path, read_data=True) == []
    for index in range(len(cache)):
        sample = cache[index]
        expected = teacher.targets(torch.from_numpy(sample.view.copy()).unsqueeze(0), ["cls", "patch"])
        for name, values in expected.items():
            # fp32 on two kinds of device: sums in another order
            np.testing.assert_allclose(sample.targets[name], values[0].numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"codec": "float16"}, "--codec"),
        ({"targets": ("cls",)}, "--targets"),
        ({"augment": "none"}, "--augment"),
        ({"seed": 3}, "--seed"),
        ({"shard_size": 5}, "--shard-size"),
        ({"view_format": "png"}, "--view-format"),
        ({"limit": 4}, "--limit"),
        ({"probe_images": 2}, "--probe-images"),
    ],
)
def test_another_configuration_is_refused_naming_the_field(finished: Cache, change: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=f"{field}") as caught:
        run_extract(make_config(finished.path.parent, **change))

    assert "--out another folder" in str(caught.value)


def test_other_weights_are_refused(finished: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights"):
        run_extract(make_config(finished.path.parent, weights=str(make_teacher(tmp_path / "other.safetensors", 7))))


def test_a_folder_with_something_else_is_refused_untouched(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")

    with pytest.raises(UsageError, match=r"is no cache, pack or run \(it holds thesis.tex\)"):
        run_extract(config)

    assert [path.name for path in config.out.iterdir()] == ["thesis.tex"]


def test_other_images_than_those_of_the_cache_are_refused(finished: Cache, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"x{number}.png").write_bytes(b"")

    with pytest.raises(UsageError, match="none of this cache's images"):
        run_extract(make_config(finished.path.parent, images=tmp_path))


def test_no_images_is_a_usage_error(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "empty").mkdir()

    with pytest.raises(ImageListError, match="no images"):
        run_extract(make_config(tmp_path, images=tmp_path / "empty"))

    assert not config.out.exists()


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for change, reason in (
        ({"views": 0}, "--views"),
        ({"size_px": 0}, "--size"),
        ({"workers": -1}, "--workers"),
        ({"batch_size": "8"}, "--batch-size"),
        ({"views": True}, "--views"),
        ({"seed": 1 << 64}, "--seed"),
        ({"shard_size": 1 << 30}, "--shard-size must be at most 65,536"),
        ({"precision": "int8"}, "unknown precision .int8.; choose fp32, fp16 or bf16"),
        ({"targets": ("cls", "cls")}, "--targets"),
    ):
        with pytest.raises(ConfigError, match=reason):
            make_config(tmp_path, **change)
    for change, reason in (
        ({"targets": ("cls", "block.9")}, "block.9"),
        ({"codec": "int9"}, "int9"),
        ({"augment": "strong"}, "strong"),
        ({"teacher": "dinov2_vits"}, "dinov2_vits14"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"probe_images": 11}, "--probe-images"),
    ):
        with pytest.raises(UsageError, match=reason):
            run_extract(make_config(tmp_path, **change))
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_unit_that_is_not_finite_is_redone_in_fp32(
    tmp_path: Path, finished: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache", precision="bf16")
    planned = plan_cache(config)
    targets = Teacher.targets

    def overflow(self: Teacher, views: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        found = targets(self, views, names)
        if self.precision == "fp32" or shows_canaries(views):
            return found
        return {name: value * float("inf") for name, value in found.items()}

    monkeypatch.setattr(Teacher, "targets", overflow)

    extract(config, planned, Worker(0, 1), lambda _: None)

    cache = open_cache(config.out)
    receipt = cache.receipt("v001", 1)
    assert receipt is not None
    assert receipt.precision == "fp32"
    assert cache.manifest.teacher.precision == "bf16"
    assert identity(cache) == identity(finished)
    assert np.isfinite(cache[5].targets["patch"]).all()


def test_a_teacher_that_is_never_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = Teacher.targets
    monkeypatch.setattr(
        Teacher,
        "targets",
        lambda self, views, names: {n: v * float("nan") for n, v in targets(self, views, names).items()},
    )

    with pytest.raises(ProteusCacheError, match="not finite"):
        run_extract(make_config(tmp_path))


def test_a_full_disk_is_refused_before_and_survived_during(
    tmp_path: Path, finished: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(finished.path.parent, out=tmp_path / "cache", views=4)
    planned = plan_cache(config)
    bytes_per_view = planned.cache.manifest.bytes_per_view + (planned.view_bytes or 0)
    monkeypatch.setattr(storage, "free_space", lambda path: storage.Free(int(25 * bytes_per_view * 1.2), None))
    with pytest.raises(SpaceError, match="--views 2 fits"):
        describe_plan(config, planned, 1).check()

    real, calls = storage.write_new, []

    def fill(path: Path, chunks: object) -> storage.Written:
        calls.append(path)
        if len(calls) > 12:
            raise SpaceError(f"{path}: cannot write: No space left on device")
        return real(path, chunks)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(storage, "write_new", fill)
    with pytest.raises(SpaceError, match="No space left"):
        extract(config, planned, Worker(0, 1), lambda _: None)
    monkeypatch.undo()

    assert verify_cache(config.out, read_data=True) == []
    left = [path.name for path in (config.out / "tmp").iterdir()]
    assert left == []


def test_block_targets_and_png_views(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, targets=("patch", "block.1.raw"), view_format="png", augment="none", codec="float16")

    sample = cache[0]

    assert set(sample.targets) == {"patch", "block.1.raw"}
    assert sample.targets["block.1.raw"].shape == (17, 24)
    assert cache.read_views("v000", 0)[sample.key][0].startswith(b"\x89PNG")


def test_held_out_shards_and_probe_are_written_down(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, n_images=24, shard_size=2, views=1, probe_images=5, codec="float16")

    held_out = cache.manifest.images.held_out
    probe = [row for row, is_probe in enumerate(cache.image_table["probe"].to_pylist()) if is_probe]

    assert len(held_out) == 1
    assert len(probe) == 5
    assert not {row // 2 for row in probe} & set(held_out)
    assert cache.views() == ["v000", "probe"]
    receipt = cache.receipt("probe", 0)
    assert receipt is not None
    assert receipt.samples.keys == [cache.image_table["key"][row].as_py() for row in probe[:2]]
    assert len(cache) == 24


def test_manifest_documents_what_made_the_cache(finished: Cache) -> None:
    manifest = json.loads((finished.path / "manifest.json").read_bytes())

    assert manifest["teacher"]["name"] == "vit"
    assert manifest["teacher"]["mean"] == [0.5, 0.4, 0.3]
    assert manifest["views"]["augment"] == "deit"
    assert "Pillow" in manifest["views"]["decoder"]
    assert manifest["targets"][1]["codec"]["name"] == "int8"
    assert "n_views" not in manifest["images"]
    assert str(finished.path.parent) not in json.dumps(manifest)


def test_fit_codec_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="int9"):
        fit_codec("int9", torch.zeros(1, 2, 3))


def test_an_image_that_went_bad_or_was_mended_between_its_views_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, 8, views=1)
    images = sorted((tmp_path / "images").rglob("*.JPEG"))
    good = images[3].read_bytes()
    images[6].write_bytes(b"no image")
    run_extract(config)

    caplog.clear()
    images[3].write_bytes(b"no image either")
    with pytest.raises(
        ProteusCacheError, match=rf"{images[3].name}: changed since its first view was made \(it is a bad"
    ):
        run_extract(make_config(tmp_path, views=2))
    assert not any("quarantined" in line and images[3].name in line for line in caplog.messages)
    images[3].write_bytes(good)
    images[6].write_bytes(good)
    with pytest.raises(
        ProteusCacheError, match=rf"{images[6].name}: changed since .* \(it was a bad image then\); put"
    ):
        run_extract(make_config(tmp_path, views=2))
    images[6].write_bytes(b"no image")
    run_extract(make_config(tmp_path, views=2))

    cache = open_cache(config.out)
    assert {len(rows) for _, _, rows in identity(cache).values() if isinstance(rows, list)} == {3, 4}
    assert len(cache) == 14
