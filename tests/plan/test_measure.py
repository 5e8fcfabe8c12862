"""Measuring with the real parts, made small; and how a batch is found that memory and time allow."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from proteus_cache.errors import ProteusCacheError, StorageError
from proteus_cache.plan import measure as measuring
from proteus_cache.plan import measure_device, measure_host
from proteus_cache.plan.measure import Task, measure
from proteus_cache.plan.measure_device import student_rate, teacher_rate
from proteus_cache.plan.rates import Rate
from proteus_cache.teachers.outline import TeacherOutline, outline_teacher
from proteus_cache.train.steps import take_step
from tests.makers import make_images, make_teacher


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time; one rendering process starts as slowly as several."""
    monkeypatch.setattr(measuring, "_TEACHER_S", 0.5)
    monkeypatch.setattr(measuring, "_STUDENTS_S", 1.0)
    monkeypatch.setattr(measure_host, "_RENDER_S", 0.3)
    monkeypatch.setattr(measure_host, "_DISK_S", 0.1)
    monkeypatch.setattr(measure_host, "_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(measure_host, "usable_cores", lambda: 1)


@pytest.fixture
def outline(tmp_path: Path) -> TeacherOutline:
    return outline_teacher("vit", weights=str(make_teacher(tmp_path / "teacher.safetensors")), size_px=None)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_everything_is_measured_and_nothing_is_left(tmp_path: Path, outline: TeacherOutline) -> None:
    make_images(tmp_path / "images", 4)
    before = sorted(tmp_path.rglob("*"))
    said: list[str] = []

    found = measure(
        Task(
            outline=outline,
            weights=str(tmp_path / "teacher.safetensors"),
            targets=("cls", "patch"),
            codec="int8",
            students=("vit_demo",),
            n_gpus=1,
            photographs=tuple((tmp_path / "images").rglob("*.JPEG")),
            out=tmp_path / "not" / "there" / "yet",
            home=tmp_path / "home",
        ),
        said.append,
    )

    rates = [found.teacher.views_per_s, found.students["vit_demo"].views_per_s]
    assert all(rate is not None and rate > 1 for rate in rates)
    assert found.renders_per_s > 1
    assert found.disk_bytes_per_s > 1e5
    assert "measured here" in found.teacher.source
    assert [line.split()[0] for line in said] == ["writing", "rendering", "teacher", "student"]
    assert sorted(tmp_path.rglob("*")) == before


def test_steps_of_a_student_are_those_of_training(
    tmp_path: Path, outline: TeacherOutline, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    _, codecs = teacher_rate(
        outline,
        weights=str(tmp_path / "teacher.safetensors"),
        home=tmp_path,
        targets=("cls", "patch"),
        codec="float16",
        device=device,
        budget_s=0.1,
    )
    losses: list[list[float]] = []
    weights: list[torch.Tensor] = []

    def counted(run: measure_device._Training, batch: object, targets: Callable[..., object]) -> torch.Tensor:
        step = take_step(run, batch, targets)  # type: ignore[arg-type]  # handed through as they came
        losses.append(step.tolist())
        weights.append(next(run.state.bare.student.blocks.parameters()).detach().clone())
        return step

    monkeypatch.setattr(measure_device, "take_step", counted)
    monkeypatch.setattr(measure_device, "resolve_device", lambda config: "cpu")

    rate = student_rate("vit_demo", outline, codecs, 1, 0.5)

    assert rate.views_per_s is not None
    assert len(losses) > 2
    assert all(
        len(row) == 5 and min(row[:4]) > 0 for row in losses
    )  # the sum, token, feature and patch loss: masks took part
    assert not torch.equal(weights[0], weights[-1])  # and the optimiser moves


def test_a_student_whose_step_would_take_minutes_is_estimated_from_a_smaller_one(
    tmp_path: Path, outline: TeacherOutline, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[str] = []

    def slow(student: str, *others: object) -> Rate:
        took.append(student)
        return Rate(views_per_s=1.0 if student == "vit_ti14" else 0.25, source="measured here")

    nothing = Rate(views_per_s=1.0, source="measured here")
    monkeypatch.setattr(measuring, "student_rate", slow)
    monkeypatch.setattr(measuring, "teacher_rate", lambda *others, **named: (nothing, {}))
    monkeypatch.setattr(measuring, "disk_rate", lambda out: 1.0)
    monkeypatch.setattr(measuring, "render_rate", lambda *others: (1.0, 1))

    found = measure(
        Task(
            outline=outline_teacher("dinov2_vitg14", weights=None, size_px=None),
            weights=None,
            targets=("cls", "patch"),
            codec="int8",
            students=("vit_l14", "vit_b14", "vit_s14", "vit_ti14"),
            n_gpus=1,
            photographs=(),
            out=tmp_path,
            home=tmp_path,
        ),
        lambda what: None,
    ).students

    assert took == ["vit_ti14", "vit_s14"]
    assert found["vit_b14"].views_per_s == pytest.approx(0.25 * 12.2 / 46.3, rel=0.01)
    assert found["vit_l14"].views_per_s == pytest.approx(0.25 * 12.2 / 162, rel=0.01)
    assert found["vit_l14"].source == "estimate: by its FLOPs from the rate of vit_s14, measured here"


def test_nothing_is_written_where_nothing_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**keywords: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)

    with pytest.raises(StorageError, match="cannot write there to measure the disk: Permission denied"):
        measure_host.disk_rate(tmp_path / "cache")


def test_made_up_photographs_are_as_large_as_imagenet_s(tmp_path: Path) -> None:
    files = measure_host.made_up_photographs(tmp_path, 3)

    assert [Image.open(file).size for file in files] == [(500, 375)] * 3
    assert all(80_000 < file.stat().st_size < 140_000 for file in files)


@pytest.mark.usefixtures("quick")
def test_a_folder_of_broken_images_is_named(tmp_path: Path, outline: TeacherOutline) -> None:
    (tmp_path / "broken").mkdir()
    file = tmp_path / "broken" / "a.jpg"
    file.write_bytes(b"no image")

    with pytest.raises(ProteusCacheError, match="broken: none of the images"):
        measure_host.render_rate(outline, [file] * 16)


class _Device:
    """A machine that takes a fixed time for a batch and a view, and has memory for so many views."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_s: float, view_s: float, memory: int) -> None:
        self.now, self.sizes = 0.0, [0]
        self._batch_s, self._view_s, self._memory = batch_s, view_s, memory
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, size: int, n: int) -> None:
        self.sizes.append(size)
        if size > self._memory:
            raise torch.cuda.OutOfMemoryError("out of memory")
        self.now += n * (self._batch_s + size * self._view_s)


def test_the_largest_batch_that_memory_takes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, 0.01, 0.0001, memory=300)

    size, per_s = measure_device._steady_rate(device.run, torch.device("cpu"), 2, 1024, 100.0)

    assert size == 256
    assert per_s == pytest.approx(256 / (0.01 + 0.0256))
    assert max(device.sizes) == 512


def test_a_slow_device_gets_a_small_batch_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, 0.1, 1.0, memory=1000)

    size, per_s = measure_device._steady_rate(device.run, torch.device("cpu"), 2, 1024, 10.0)

    assert size == 2
    assert per_s == pytest.approx(2 / 2.1)
    assert device.now <= 1.2 * 10.0


def test_a_single_batch_that_outlasts_the_budget_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, 60.0, 1.0, memory=1000)

    size, per_s = measure_device._steady_rate(device.run, torch.device("cpu"), 1, 16, 10.0)

    assert size == 1
    assert per_s == pytest.approx(1 / 61)
    assert device.sizes == [0, 1]


def test_too_little_memory_for_anything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, 0.1, 0.1, memory=1)

    with pytest.raises(ProteusCacheError, match="too little memory for a batch of 2"):
        measure_device._steady_rate(device.run, torch.device("cpu"), 2, 1024, 10.0)
