"""Whole plans: what they come to, by hand and against what extract says and does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_cache.codecs.names import CODEC_NAMES
from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.extract.planning import plan_cache
from proteus_cache.plan import whole
from proteus_cache.plan.config import PlanConfig
from proteus_cache.plan.extraction import ExtractPlan
from proteus_cache.plan.measure import Measured, Task
from proteus_cache.plan.rates import Rate
from proteus_cache.plan.whole import WholePlan, make_plan
from tests.makers import make_cache, make_config, make_images, make_teacher

MakePlan = Callable[..., WholePlan]


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plan on every machine."""
    monkeypatch.setattr(whole, "gpu_name", lambda asked: None)


@pytest.fixture
def planned(tmp_path: Path) -> MakePlan:
    def make(**settings: Any) -> WholePlan:  # fields of the config
        here: dict[str, Any] = {"out": tmp_path / "cache", "home": tmp_path / "home", "gpu_kind": "h200", "gpus": 1}
        return make_plan(PlanConfig(**(here | settings)), lambda what: None)

    return make


def test_without_any_setting_the_paper_s_teacher_and_students_are_planned_for_an_a100(tmp_path: Path) -> None:
    plan = make_plan(PlanConfig(out=tmp_path / "cache", home=tmp_path), lambda what: None)

    assert plan.outline.name == "dinov2_vitg14"
    assert (plan.cache.size.n_images, plan.cache.size.n_views, plan.cache.size.n_probe) == (1_281_167, 4, 4096)
    assert [student.student for student in plan.students] == ["vit_ti14", "vit_s14", "vit_b14", "vit_l14"]
    assert (plan.hardware.title, plan.hardware.n_gpus, plan.hardware.why) == ("A100", 1, "no GPU found here")


def test_the_gpus_found_here_are_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "gpu_name", lambda asked: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    plan = make_plan(PlanConfig(out=tmp_path / "cache", home=tmp_path), lambda what: None)
    other = make_plan(PlanConfig(out=tmp_path / "cache", home=tmp_path, gpu_kind="a100"), lambda what: None)

    assert (plan.hardware.title, plan.hardware.n_gpus, plan.hardware.why) == ("H200", 8, "found here")
    assert (other.hardware.title, other.hardware.n_gpus, other.hardware.why) == ("A100", 1, "as asked for")


def test_a_gpu_that_is_not_in_the_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "gpu_name", lambda asked: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    plan = make_plan(PlanConfig(out=tmp_path / "cache", home=tmp_path), lambda what: None)

    assert (plan.hardware.title, plan.hardware.n_gpus) == ("A100", 2)
    assert plan.hardware.why == "the NVIDIA L40S here is not in the table: --measure measures it"


def test_hours_of_one_h200_by_hand(planned: MakePlan) -> None:
    plan = planned(students=("vit_s14", "vit_l14"), epochs=300)

    small, large = plan.students
    # 1,252 shards, 13 held out: 1,267,855 views an epoch in whole batches of 1,024 and 256.
    assert small.size.views_per_epoch == 1_267_855
    assert plan.extraction_s == pytest.approx((4 * 1_281_167 + 4096) / 617)
    assert small.seconds == pytest.approx(300 * (small.size.views_per_epoch // 1024) * 1024 / 2985)
    assert large.seconds == pytest.approx(300 * (large.size.views_per_epoch // 256) * 256 / 448)
    assert small.live_seconds == pytest.approx(small.size.n_views * (1 / 2985 + 1 / 617))


def test_at_the_break_even_both_ways_cost_the_same(planned: MakePlan) -> None:
    plan = planned(students=("vit_s14",), views=4, epochs=300)
    student, extraction_s = plan.students[0], plan.extraction_s
    assert extraction_s is not None
    assert student.seconds is not None
    assert student.live_seconds is not None

    n = student.break_even(extraction_s)

    assert n is not None
    assert extraction_s + n * student.seconds == pytest.approx(n * student.live_seconds)
    assert n == pytest.approx(4 / 300, rel=0.02)  # the teacher sees every view once instead of once an epoch


def test_a_fresh_view_for_every_epoch_pays_only_from_the_second_student_on(planned: MakePlan) -> None:
    plan = planned(students=("vit_s14",), views=300, epochs=300)

    n = plan.students[0].break_even(plan.extraction_s)

    assert n is not None
    assert 1 < n < 1.02


def test_the_cache_never_pays_where_it_is_no_faster() -> None:
    from proteus_cache.plan.training import TrainingSize
    from proteus_cache.plan.whole import StudentPlan

    size = TrainingSize(views_per_epoch=10, batch_size=2, n_steps=5, bytes_per_view=1)
    same = StudentPlan(
        student="vit_s14",
        size=size,
        rate=Rate(views_per_s=1.0, source=""),
        views_per_s=1.0,
        live_views_per_s=1.0,
    )

    assert same.break_even(10.0) is None
    assert same.break_even(None) is None


def test_eight_gpus_take_an_eighth_of_the_time(planned: MakePlan) -> None:
    one, eight = planned(gpus=1), planned(gpus=8)

    assert one.extraction_s is not None
    assert eight.extraction_s == pytest.approx(one.extraction_s / 8)
    for alone, shared in zip(one.students, eight.students, strict=True):
        assert alone.seconds is not None
        assert shared.seconds == pytest.approx(alone.seconds / 8)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_plan_is_the_one_that_extract_opens_with(codec: str, tmp_path: Path, planned: MakePlan) -> None:
    make_images(tmp_path / "images", 30)
    make_teacher(tmp_path / "teacher.safetensors")
    announced: list[ExtractPlan] = []
    plan_cache(make_config(tmp_path, codec=codec, shard_size=None), announce=announced.append)

    plan = planned(
        teacher="vit",
        weights=str(tmp_path / "teacher.safetensors"),
        images=tmp_path / "images",
        views=2,
        codec=codec,
        students=("vit_demo",),
    )

    ours, theirs = plan.cache, announced[0]
    if codec == "klt:20dB":  # not known before it is fitted
        assert ours.size.at_most == {"patch"}
        assert ours.size.code_bytes >= theirs.size.code_bytes
        ours = replace(ours, size=replace(ours.size, targets=theirs.size.targets))
    for name in ("n_images", "n_views", "n_probe", "shard_size", "code_bytes", "view_bytes", "n_files", "bytes"):
        assert getattr(ours.size, name) == getattr(theirs.size, name), name
    assert ours.size.target_text() == theirs.size.target_text()
    assert (ours.units_todo, ours.views_todo, ours.files_todo, ours.bytes_todo, ours.inodes_todo) == (
        theirs.units_todo,
        theirs.views_todo,
        theirs.files_todo,
        theirs.bytes_todo,
        theirs.inodes_todo,
    )
    cache = make_cache(tmp_path, codec=codec, shard_size=None)
    assert sum(file.is_file() for file in cache.path.rglob("*")) == ours.size.n_files


def test_a_number_of_images_beside_a_folder_takes_only_the_size_of_views_from_it(
    tmp_path: Path, planned: MakePlan
) -> None:
    make_images(tmp_path / "images", 30)

    plan = planned(teacher="dinov2_vits14", images=tmp_path / "images", n_images=1_000_000)

    assert plan.cache.size.n_images == 1_000_000
    assert not plan.views_are_typical
    assert plan.cache.size.view_bytes < 0.6 * 37_600  # smooth images of 60 px


def test_targets_without_patches_train_no_student_and_are_planned_all_the_same(planned: MakePlan) -> None:
    plan = planned(targets=("cls", "block.9"))

    assert plan.missing_targets == ("patch",)
    assert plan.students == ()
    assert plan.cache.size.code_bytes == 2 * 1536 + 257 * (2 + 1536)


def test_another_block_is_stored_and_read_but_costs_no_second_forward(planned: MakePlan) -> None:
    plain, more = planned(), planned(targets=("cls", "patch", "block.9"))

    assert more.extraction_s == plain.extraction_s
    assert more.students[0].size.bytes_per_view > 1.8 * plain.students[0].size.bytes_per_view


def test_a_batch_larger_than_an_epoch_has_no_time(planned: MakePlan) -> None:
    plan = planned(n_images=500, students=("vit_s14", "vit_l14"))

    small, large = plan.students
    assert (small.size.n_steps, small.seconds, small.live_seconds) == (0, None, None)
    assert large.size.n_steps == 300


def test_rates_that_are_not_known_are_not_made_up(planned: MakePlan) -> None:
    plan = planned(teacher="demo", n_images=5000)

    assert [student.student for student in plan.students] == ["vit_demo"]
    assert (plan.extraction_s, plan.students[0].seconds, plan.students[0].live_seconds) == (None, None, None)


def measured(**changes: Any) -> Measured:  # fields of the record
    values = Measured(
        device="NVIDIA L40S",
        teacher=Rate(views_per_s=200, source="measured here"),
        students={"vit_s14": Rate(views_per_s=1000, source="measured here")},
        renders_per_s=1e9,
        n_renderers=4,
        disk_bytes_per_s=1e12,
    )
    return replace(values, **changes)


@pytest.mark.parametrize(
    ("changes", "slowest", "per_s"),
    [
        ({}, "teacher", 400),
        ({"renders_per_s": 300.0}, "rendering", 300),
        ({"disk_bytes_per_s": 43_480_000.0}, "disk", 100),
    ],
)
def test_measured_rates_replace_the_table_and_the_slowest_stage_decides(
    changes: dict[str, Any], slowest: str, per_s: float, planned: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Task] = []

    def measure(task: Task, say: Callable[[str], None]) -> Measured:
        tasks.append(task)
        return measured(**changes)

    monkeypatch.setattr(whole, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    plan = planned(gpu_kind=None, gpus=2, measure=True, students=("vit_s14",))

    assert plan.slowest == slowest
    assert plan.extract_per_s == pytest.approx(per_s, rel=0.01)
    assert plan.students[0].views_per_s == 2000
    live = min(2 / (1 / 1000 + 1 / 200), changes.get("renders_per_s", 1e9))
    assert plan.students[0].live_views_per_s == pytest.approx(live)
    assert (tasks[0].n_gpus, tasks[0].students) == (2, ("vit_s14",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_images": 0}, "--n-images must be a whole number of at least 1, got 0"),
        ({"n_images": 2_000_000_000}, "--n-images must be at most 1,000,000,000"),
        ({"epochs": 0}, "--epochs must be"),
        ({"gpus": 0}, "--gpus must be"),
        ({"gpu_kind": "a10"}, "did you mean a100"),
        ({"measure": True}, "leave --gpu-kind out"),
        ({"students": ("vit_s", "vit_s14")}, "did you mean vit_s14"),
        ({"students": ("vit_s14", "vit_s14")}, "names one twice"),
        ({"views": 0}, "--views must be"),
        ({"codec": "int9"}, "int8"),
        ({"targets": ("cls", "block.40")}, "block.0 to block.39"),
        ({"teacher": "dinov2_vitg"}, "did you mean dinov2_vitg14"),
        ({"size_px": 225}, "try 224 or 238"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, Any], message: str, planned: MakePlan) -> None:
    with pytest.raises((ConfigError, UsageError), match=message):
        planned(**settings)


def test_several_gpus_cannot_be_measured_where_there_is_none(
    planned: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(UsageError, match="no GPU here"):
        planned(gpu_kind=None, gpus=8, measure=True)
