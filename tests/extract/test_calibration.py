"""Which views int4 and klt are fitted to, and what an extraction does about them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_cache import open_cache, storage
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.codecs import fit_codec, load_codec
from proteus_cache.codecs.calibration import CalibrationReport
from proteus_cache.codecs.scalar import Int8Codec
from proteus_cache.errors import ConfigError, ProteusCacheError, SpaceError, UsageError
from proteus_cache.extract import calibration, planning
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.plan.extraction import ExtractPlan
from proteus_cache.processes import Worker
from proteus_cache.teachers.teacher import Teacher
from tests.makers import identity, make_config, make_images, make_teacher, run_extract


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 images and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    make_images(folder / "images", 40)
    make_teacher(folder / "teacher.safetensors")
    return folder


def config_of(inputs: Path, out: Path, **changes: Any) -> ExtractConfig:  # fields of the config
    return make_config(inputs, out=out / "cache", views=1, **changes)


def report_of(cache: Cache, target: str = "patch") -> CalibrationReport:
    record = cache.target(target)
    found = load_codec(record.codec, tuple(record.shape), cache.parameters_blob(record)).calibration
    assert found is not None
    return found


@pytest.mark.parametrize("codec", ["int4", "klt:20dB", "klt:0.2KB"])
def test_a_codec_is_fitted_to_all_trained_images_and_to_no_held_out_one(
    codec: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def remember(name: str, tokens: torch.Tensor, **how: Any) -> Any:
        seen.append(tokens)
        return fit_codec(name, tokens, **how)

    monkeypatch.setattr(planning, "fit_codec", remember)
    config = config_of(inputs, tmp_path, codec=codec, shard_size=4, targets=("cls", "patch", "block.0.raw"))

    run_extract(config)

    cache = open_cache(config.out)
    (held_out,) = cache.manifest.images.held_out
    assert report_of(cache).n_views == report_of(cache, "block.0.raw").n_views == 36
    assert [len(tokens) for tokens in seen] == [40, 36, 36]  # cls only needs its shape
    rows = [row for row in range(40) if row not in range(4 * held_out, 4 * held_out + 4)]
    for row, tokens in zip(rows, seen[1], strict=True):
        stored = torch.from_numpy(cache[row].targets["patch"])
        error = (stored - tokens).square().mean() / tokens.var()
        assert error < 0.1, "row by row the very views of v000"


def test_as_many_images_are_taken_as_asked_for_spread_over_the_list(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[list[int]] = []
    jobs = calibration._jobs

    def remember(table: Any, rows: list[int], at_once: int) -> Any:
        rendered.append(rows)
        return jobs(table, rows, at_once)

    monkeypatch.setattr(calibration, "_jobs", remember)
    config = config_of(inputs, tmp_path, codec="int4", calibration_images=8)

    plan_cache(config)

    assert rendered == [[0, 4, 9, 13, 18, 26, 31, 35]]  # shard 5 is held out
    assert report_of(open_cache(config.out)).n_views == 8


def test_other_images_stand_in_for_bad_ones(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 30)
    for name in ("class_0/bad.jpg", "class_1/bad.jpg", "class_2/bad.jpg"):
        (images / name).write_bytes(b"no photograph")
    make_teacher(tmp_path / "teacher.safetensors")
    config = make_config(tmp_path, codec="int4", calibration_images=29)

    plan_cache(config)

    assert report_of(open_cache(config.out)).n_views == 29


def test_workers_and_batches_change_nothing_but_the_last_bits(inputs: Path, tmp_path: Path) -> None:
    plain = config_of(inputs, tmp_path / "plain", codec="klt:20dB")
    other = replace(plain, out=tmp_path / "other", workers=2, batch_size=16)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(calibration, "_FEW", 8)

    reports = []
    for config in (plain, other):
        plan_cache(config)
        reports.append(report_of(open_cache(config.out)))
    monkey.undo()

    assert reports[0].n_views == reports[1].n_views == 36
    assert reports[0].snr_db == pytest.approx(reports[1].snr_db, abs=0.05)


@pytest.mark.parametrize("codec", ["int8", "float16"])
def test_other_codecs_keep_their_64_views(codec: str, inputs: Path, tmp_path: Path, caplog: Any) -> None:
    calls: list[tuple[int, int]] = []

    plan_cache(config_of(inputs, tmp_path, codec=codec), calibration_progress=lambda *at: calls.append(at))

    assert calls == []
    assert caplog.messages == []


def test_progress_and_the_plan_say_what_is_fitted(inputs: Path, tmp_path: Path, caplog: Any) -> None:
    calls: list[tuple[int, int]] = []
    announced: list[ExtractPlan] = []
    config = config_of(inputs, tmp_path, codec="klt:20dB")

    planned = plan_cache(config, announce=announced.append, calibration_progress=lambda *at: calls.append(at))

    assert calls[-1] == (36, 36)
    (report,) = announced[0].size.fitted.values()
    lines = announced[0].lines()
    assert f"fitted    patch: {report.snr_db:.1f} dB at {report.bits_per_value:.2f} bits a value" in lines[3]
    assert f"{report.n_kept} of 24 components" in lines[4] or "all 24 components" in lines[4]
    shown = announced[0].to_json()["targets"]
    assert shown["patch"]["fitted"]["n_views"] == 36
    assert shown["cls"]["fitted"] is None
    assert shown["patch"]["code_bytes"] == planned.codecs["patch"].code_bytes
    (warning,) = caplog.messages
    assert "codec klt:20dB is fitted to 36 views" in warning


def test_memory_bounds_the_views_and_says_so(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    a_view = 16 * 24 * 2
    monkeypatch.setattr(calibration, "available_memory", lambda: 4 * 20 * a_view)

    plan_cache(config_of(inputs, tmp_path, codec="int4"))

    assert report_of(open_cache(tmp_path / "cache")).n_views == 20
    assert "memory holds the tokens of 20 of the 36 calibration views" in caplog.text


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("klt:90dB", r"target patch: codec klt:90dB: .* ask for klt:\d+(\.\d)?dB"),
        ("klt:5KB", "target patch: codec klt:5KB: .*the largest is klt:0"),
        ("klt:0.01KB", "target patch: codec klt:0.01KB: .*the smallest .*klt:0.0"),
    ],
)
def test_a_goal_that_cannot_be_reached_names_the_nearest_and_publishes_nothing(
    codec: str, message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_cache(config_of(inputs, tmp_path, codec=codec))

    assert not (tmp_path / "cache" / "manifest.json").exists()
    plan_cache(config_of(inputs, tmp_path, codec="int4"))  # and the place is as good as before


def test_too_few_tokens_to_fit_to_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\d+ are needed and there are 32: give more images"):
        plan_cache(make_config(tmp_path, 2, codec="klt:20dB"))


def test_views_that_are_not_finite_in_half_precision_are_fitted_in_a_better_one(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    targets, n_seen = Teacher.targets, 0

    def overflow(self: Teacher, views: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal n_seen
        n_seen += len(views)
        found = targets(self, views, names)
        late = self.precision != "fp32" and n_seen > 50  # the first 40 views are finite
        return {name: value * float("inf") if late else value for name, value in found.items()}

    monkeypatch.setattr(Teacher, "targets", overflow)
    monkeypatch.setattr(calibration, "_precisions", lambda *_: ("bf16", "fp32"))

    planned = plan_cache(config_of(inputs, tmp_path, codec="int4"))

    assert planned.cache.manifest.teacher.precision == "fp32"
    assert "precision=bf16: its patch tokens of calibration view v000/image_" in caplog.text


def test_a_view_that_is_never_finite_is_named(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, n_seen = Teacher.targets, 0

    def overflow(self: Teacher, views: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal n_seen
        n_seen += len(views)
        found = targets(self, views, names)
        return {name: value * float("nan") if n_seen > 60 else value for name, value in found.items()}

    monkeypatch.setattr(Teacher, "targets", overflow)

    with pytest.raises(ProteusCacheError, match="calibration view v000/image_[0-9a-f_]+ are not finite .*in fp32 too"):
        plan_cache(config_of(inputs, tmp_path, codec="klt:20dB"))
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_cache_is_continued_under_any_spelling_of_its_codec(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, codec="klt:20db")
    run_extract(config)

    done = run_extract(replace(config, codec="klt:20.0dB", views=2, calibration_images=3))

    assert done.units_committed == 10
    assert {target.codec.name for target in open_cache(config.out).manifest.targets} == {"float16", "klt:20dB"}
    with pytest.raises(UsageError, match="--codec is cls float16, patch klt:20dB there and .* patch int4 here"):
        plan_cache(replace(config, codec="int4"))


def test_two_planners_at_once_agree(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(inputs, tmp_path, codec="klt:20dB")
    publish = storage.publish_once
    raced: list[str] = []

    def race(temp: Path, final: Path) -> bool:
        monkeypatch.setattr(storage, "publish_once", publish)
        raced.append(plan_cache(config).cache.manifest_digest)  # another process is faster
        return publish(temp, final)

    monkeypatch.setattr(storage, "publish_once", race)

    planned = plan_cache(config)

    assert [planned.cache.manifest_digest] == raced
    assert list((config.out / "tmp").iterdir()) == []
    extract(config, planned, Worker(0, 1), lambda _: None)
    assert len(identity(planned.cache)) == 10


def test_plan_files_of_a_start_that_was_cut_go_once_a_plan_is_published(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, codec="klt:20dB")
    temporary = config.out / "tmp"
    temporary.mkdir(parents=True)
    for name in (f"plan-{'a' * 64}.safetensors", f"plan-{'b' * 64}.parquet", f"plan-{'b' * 64}.parquet.77.{'0' * 16}"):
        (temporary / name).write_bytes(b"of another plan")

    plan_cache(config)

    assert [path.name for path in temporary.iterdir()] == [f"plan-{'b' * 64}.parquet.77.{'0' * 16}"]
    assert verify_cache(config.out, read_data=True) == []


def test_a_planner_whose_files_are_swept_away_reads_the_plan_that_is_there(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(inputs, tmp_path, codec="int4")
    place = planning._place_plan_file
    raced: list[str] = []

    def race(*arguments: Any) -> None:
        place(*arguments)
        if not raced:
            raced.append("")
            other = replace(config, calibration_images=8)  # with other tables
            raced[0] = plan_cache(other).cache.manifest_digest

    monkeypatch.setattr(planning, "_place_plan_file", race)

    planned = plan_cache(config)

    assert raced == [planned.cache.manifest_digest]
    assert report_of(planned.cache).n_views == 8
    assert list((config.out / "tmp").iterdir()) == []


@pytest.mark.parametrize("codec", ["int4", "int8", "klt:0.2KB"])
def test_what_codes_alone_would_fill_is_refused_before_calibration(
    codec: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = 40 * 200
    monkeypatch.setattr(storage, "free_space", lambda _: storage.Free(free_bytes, None))
    monkeypatch.setattr(planning, "calibrate", lambda *_: pytest.fail("calibrated"))

    with pytest.raises(
        SpaceError, match=r"are needed \(with 5 % to spare\) and 8 KB are free; --views 1 --limit 1 fits"
    ):
        plan_cache(config_of(inputs, tmp_path, codec=codec))

    assert not (tmp_path / "cache").exists()


def test_too_few_inodes_are_refused_before_calibration(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "free_space", lambda _: storage.Free(1 << 40, 30))
    monkeypatch.setattr(planning, "calibrate", lambda *_: pytest.fail("calibrated"))

    with pytest.raises(SpaceError, match="30 inodes are free; a larger --shard-size makes fewer files"):
        plan_cache(config_of(inputs, tmp_path, codec="int4"))


@pytest.mark.parametrize("codec", ["klt:20dB", "int4"])
def test_what_may_fit_is_calibrated(codec: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 40 * 200 if codec == "klt:20dB" else 40 * 700
    monkeypatch.setattr(storage, "free_space", lambda _: storage.Free(free_bytes, None))
    announced: list[ExtractPlan] = []

    with pytest.raises(SpaceError, match="are needed"):  # now that the size of views is known
        plan_cache(config_of(inputs, tmp_path, codec=codec), announce=announced.append)

    assert len(announced) == 1


def test_widened_steps_are_counted_in_the_receipt(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, codec="int4")
    planned = plan_cache(config)
    codec = planned.codecs["patch"]
    for bound in (codec.get_buffer("low"), codec.get_buffer("high")):
        bound.div_(8)  # as if calibration had seen much smaller values
    expected = {}

    extract(config, planned, Worker(0, 1), lambda _: None)

    for shard in planned.cache.units("v000"):
        codes = torch.from_numpy(planned.cache.read_codes("v000", shard, "patch").copy())
        expected[shard] = int(codec.widened(codes).sum())
        receipt = planned.cache.receipt("v000", shard)
        assert receipt is not None
        assert receipt.widened == {"patch": expected[shard]}
    assert sum(expected.values()) > 100


def test_int8_receipts_have_no_widened_steps(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, codec="int8")
    run_extract(config)

    receipt = open_cache(config.out).receipt("v000", 0)

    assert receipt is not None
    assert receipt.widened == {}
    assert isinstance(plan_cache(config).codecs["patch"], Int8Codec)
