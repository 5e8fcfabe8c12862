"""The rates of a plan, measured on this machine in about a minute, with the code that does the work later.

Weights are random (what a forward costs does not depend on them), so nothing is downloaded; the teacher `vit`
needs its file and `demo` has its own. One GPU is measured, and several are taken to do as many times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from proteus_cache.devices import use_device
from proteus_cache.plan.costs import student_shape
from proteus_cache.plan.measure_device import student_rate, teacher_rate
from proteus_cache.plan.measure_host import disk_rate, render_rate
from proteus_cache.plan.rates import Rate
from proteus_cache.teachers.outline import TeacherOutline

CPU = "CPU"
"""The device of a machine without a GPU."""
_TEACHER_S = 10.0
_STUDENTS_S = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be measured."""

    outline: TeacherOutline
    weights: str | None
    """The file of teacher `vit`."""
    targets: tuple[str, ...]
    codec: str
    students: tuple[str, ...]
    n_gpus: int
    """That share a student's batch."""
    photographs: tuple[Path, ...]
    """To render; none makes some up."""
    out: Path
    home: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The rates of this machine."""

    device: str
    """A GPU's name, or `CPU`."""
    teacher: Rate
    """Of one device, encoding and the copy to the host included."""
    students: dict[str, Rate]
    """Of one device, whole steps."""
    renders_per_s: float
    """Of all cores."""
    n_renderers: int
    disk_bytes_per_s: float
    """Hashed, written and synced."""


def measure(task: Task, say: Callable[[str], None]) -> Measured:
    """Measure everything that a plan asks for.

    Args:
        task: what it is.
        say: called with what is measured next.

    Raises:
        UsageError: the teacher cannot be built.
        WeightsError: the weights of `vit` cannot be read.
        StorageError: nothing can be written where the cache would be.
        ProteusCacheError: the photographs cannot be read, or the GPU's memory is too small.
    """
    device = use_device(None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU
    say(f"writing beside {task.out}")
    disk_bytes_per_s = disk_rate(task.out)
    say("rendering views on all cores")
    renders_per_s, n_renderers = render_rate(task.outline, task.photographs)
    say(f"teacher {task.outline.name} on {name}")
    teacher, codecs = teacher_rate(
        task.outline,
        weights=task.weights,
        home=task.home,
        targets=task.targets,
        codec=task.codec,
        device=device,
        budget_s=_TEACHER_S,
    )
    students: dict[str, Rate] = {}
    for student in sorted(task.students, key=lambda each: _flops(each, task.outline)):
        rate = _from_smaller(student, task, students)
        if rate is None:
            say(f"student {student} on {name}")
            rate = student_rate(student, task.outline, codecs, task.n_gpus, _STUDENTS_S / len(task.students))
        students[student] = rate
    return Measured(
        device=name,
        teacher=teacher,
        students=students,
        renders_per_s=renders_per_s,
        n_renderers=n_renderers,
        disk_bytes_per_s=disk_bytes_per_s,
    )


def _from_smaller(student: str, task: Task, known: dict[str, Rate]) -> Rate | None:
    """The rate of a student by its FLOPs, where a single step of two views would take minutes; None elsewhere."""
    if not known:
        return None
    smaller = [name for name, rate in known.items() if not rate.source.startswith("estimate")][-1]
    per_s = known[smaller].views_per_s
    assert per_s is not None, "measured rates are known"
    predicted = per_s * _flops(smaller, task.outline) / _flops(student, task.outline)
    if 2 / predicted < 2 * _STUDENTS_S / len(task.students):
        return None
    return Rate(views_per_s=predicted, source=f"estimate: by its FLOPs from the rate of {smaller}, measured here")


def _flops(student: str, outline: TeacherOutline) -> int:
    return student_shape(student, size_px=outline.size_px, patch_px=outline.patch_px).forward_flops
