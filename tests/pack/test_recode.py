"""Packs in another codec than the cache's: fitted to trained views, measured on others, resumed as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_cache.cache.reader import Cache
from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.pack import build, recode, sampling, unit
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.recode import SecondStep
from proteus_cache.pack.verify import verify_pack
from tests.makers import make_cache
from tests.pack.test_build import contents


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """40 images in ten shards, one of them held out; half precision."""
    return make_cache(tmp_path_factory.mktemp("wide"), 40, codec="float16", views=1)


def ratio_db(pack: Pack, cache: Cache, rows: range) -> float:
    """Of the pack's patches about the cache's."""
    exact = np.stack([cache[row].targets["patch"] for row in rows]).astype(np.float64)
    error = np.stack([pack[row].targets["patch"] for row in rows]) - exact
    mean = np.stack([cache[row].targets["patch"] for row in range(len(cache))]).mean(axis=(0, 1))
    return float(-10 * np.log10(np.square(error).sum() / np.square(exact - mean).sum()))


@pytest.mark.parametrize(("codec", "least_db"), [("int8", 38), ("int4", 18), ("klt:20dB", 19), ("klt:0.2KB", 20)])
def test_the_report_says_what_the_second_step_added(codec: str, least_db: float, wide: Cache, tmp_path: Path) -> None:
    report = build_pack(wide.path, tmp_path / "pack", codec=codec, workers=2)

    pack = open_pack(report.path)
    (step,) = report.steps
    (held_out,) = wide.manifest.images.held_out
    assert (step.target, step.source, step.codec, step.source_db) == ("patch", "float16", codec, None)
    assert (step.n_fitted, step.n_measured) == (36, 4)  # all trained views; and the held-out ones
    assert (step.source_bytes, step.code_bytes) == (768, pack.targets[1].codec.code_bytes)
    assert step.added_db is not None
    assert step.added_db > least_db
    assert step.added_db == pytest.approx(ratio_db(pack, wide, range(4 * held_out, 4 * held_out + 4)), abs=1.5)
    assert f"recoded   patch from float16 to {codec}: 768 B to" in report.step_lines()[0]
    assert "on 4 other views; the error of float16 comes on top" in report.step_lines()[1]
    assert report.to_json()["steps"][0]["added_db"] == step.added_db
    assert verify_pack(report.path, read_data=True) == []


def test_without_held_out_shards_views_are_kept_from_the_fit(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, 20, codec="float32", views=1)

    (step,) = build_pack(cache.path, tmp_path / "pack", codec="int4", targets=["patch"]).steps

    assert cache.manifest.images.held_out == []
    assert (step.n_fitted, step.n_measured, step.source) == (18, 2, "float32")
    assert "comes on top" not in " ".join(step.lines())


def test_a_single_view_is_fitted_to_and_nothing_is_measured(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, 1, codec="float16", views=1)

    (step,) = build_pack(cache.path, tmp_path / "pack", codec="int8").steps

    assert (step.n_fitted, step.n_measured, step.added_db) == (1, 0, None)
    assert "is not measured" in step.lines()[1]


def test_float32_loses_nothing_and_float16_little(wide: Cache, tmp_path: Path) -> None:
    steps = build_pack(wide.path, tmp_path / "pack", codec="float32").steps
    cache = make_cache(tmp_path, 6, codec="float32", views=1)
    half = build_pack(cache.path, tmp_path / "half", codec="float16").steps

    assert [(step.target, step.added_db, step.n_fitted) for step in steps] == [("cls", None, 0), ("patch", None, 0)]
    assert all(step.lines()[0].endswith("and nothing is lost") for step in steps)
    assert all(step.added_db is not None and step.added_db > 65 for step in half)


def test_both_steps_are_added_where_the_first_is_known(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, 40, codec="int4", views=1)

    (step,) = build_pack(cache.path, tmp_path / "pack", codec="klt:18dB").steps

    assert step.source_db is not None
    assert step.added_db is not None
    assert step.total_db is not None
    assert step.total_db < min(step.source_db, step.added_db)
    assert f"of int4 about {step.total_db:.1f} dB" in step.lines()[1]


def test_two_errors_of_20_db_are_one_of_17() -> None:
    step = SecondStep(
        target="patch",
        source="int4",
        source_db=20.0,
        codec="klt:20dB",
        added_db=20.0,
        n_fitted=2_000,
        n_measured=200,
        source_bytes=200_000,
        code_bytes=100_000,
    )

    assert step.total_db == pytest.approx(16.99, abs=0.01)


def test_what_klt_has_left_out_cannot_be_brought_back(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, 20, codec="klt:20dB", views=1)

    for codec in ("float16", "int8", "klt:10dB"):
        with pytest.raises(UsageError, match=f"target patch is stored as klt:20dB, and {codec} cannot bring back"):
            build_pack(cache.path, tmp_path / "pack", codec=codec)
    same = build_pack(cache.path, tmp_path / "same", codec="klt:20db")

    assert same.steps == []
    assert [target.codec for target in open_pack(same.path).targets] == [t.codec for t in cache.manifest.targets]
    assert build_pack(cache.path, tmp_path / "cls", codec="float32", targets=["cls"]).n_samples == 20


@pytest.mark.parametrize(("codec", "message"), [("klt:90dB", "ask for klt:"), ("klt:9KB", "the largest is klt:")])
def test_a_goal_that_cannot_be_reached_writes_nothing(codec: str, message: str, wide: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"target patch: codec {codec}: .*{message}"):
        build_pack(wide.path, tmp_path / "pack", codec=codec)

    assert not (tmp_path / "pack").exists()


def test_a_killed_pack_keeps_its_codec_and_its_tars(
    wide: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        build_pack(wide.path, out, codec="klt:20dB", workers=1)
    monkeypatch.setattr(recode, "fit_codec", None)  # a second fit might come out another way
    report = build_pack(wide.path, out, codec="klt:20db", workers=1)

    assert report.units_kept >= 3
    assert report.steps[0].n_fitted == 36
    monkeypatch.undo()
    assert contents(out) == contents(build_pack(wide.path, tmp_path / "whole", codec="klt:20dB").path)


def test_another_codec_after_a_kill_is_fitted_anew_and_leaves_nothing_of_the_first(
    wide: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"

    def die(*arguments: object) -> unit.PackedUnit:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "pack_unit", die)
    with pytest.raises(KeyboardInterrupt):
        build_pack(wide.path, out, codec="klt:20dB", workers=1)
    monkeypatch.undo()

    build_pack(wide.path, out, codec="int4")

    assert contents(out) == contents(build_pack(wide.path, tmp_path / "whole", codec="int4").path)


def test_the_plan_holds_the_steps(wide: Cache, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    plan = plan_pack(wide.path, tmp_path / "pack", codec="int4", progress=lambda *at: calls.append(at))

    assert calls[-1][0] == 40
    assert plan.to_json()["steps"][0]["code_bytes"] == 16 * (2 + 12)
    assert any(line.startswith("recoded   patch from float16 to int4") for line in plan.lines())
    assert not (tmp_path / "pack").exists()


def test_values_that_a_codec_cannot_hold_name_the_sample(
    wide: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = wide.receipt("v000", 3)
    assert receipt is not None
    key = receipt.samples.keys[2]
    plan = plan_pack(wide.path, tmp_path / "pack", codec="int8")
    (recoding,) = [recoding for recoding in plan.recodings if recoding.step is not None]
    codes = [np.array(code) for code in wide.read_codes("v000", 3, "patch")]

    for bad in (np.inf, np.nan):
        codes[2].view(np.float16)[5] = bad
        with pytest.raises(UsageError, match=f"sample {key}, target patch: has values that codec int8 cannot hold"):
            recoding.apply(codes, receipt.samples.keys)

    def broken(self: Cache, *unit: object) -> np.ndarray:
        return np.stack(codes)

    monkeypatch.setattr(Cache, "read_codes", broken)
    with pytest.raises(UsageError, match="sample image_.*, target patch: has values that codec klt:20dB cannot hold"):
        plan_pack(wide.path, tmp_path / "other", codec="klt:20dB")


def test_widened_steps_are_counted(wide: Cache, tmp_path: Path) -> None:
    plan = plan_pack(wide.path, tmp_path / "pack", codec="int4")
    encoder = plan.recodings[1].encoder
    assert encoder is not None
    for bound in (encoder.get_buffer("low"), encoder.get_buffer("high")):
        bound.div_(8)  # as if calibration had seen much smaller values

    report = build.run_pack(plan)

    tokens = torch.from_numpy(np.stack([wide[row].targets["patch"] for row in range(40)]))
    n_widened = int(encoder.widened(encoder.encode(tokens)).sum())
    assert n_widened > 100
    assert report.widened == {"patch": n_widened}
    assert f"{n_widened:,} of patch" in report.step_lines()[-1]


def test_memory_bounds_what_is_read(
    wide: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampling, "available_memory", lambda: 4 * 18 * 16 * 24 * 2)

    (step,) = build_pack(wide.path, tmp_path / "pack", codec="int4").steps

    assert step.n_fitted + step.n_measured == 18
    assert "memory holds 18 calibration views" in caplog.text
