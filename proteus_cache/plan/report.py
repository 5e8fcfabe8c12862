"""A whole plan for people, in lines of at most 80 columns with the source of every rate, and for machines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from proteus_cache.cache.reader import is_cache
from proteus_cache.next_steps import command_line
from proteus_cache.plan.costs import teacher_shape
from proteus_cache.plan.extraction import CacheSize
from proteus_cache.plan.human import human_bytes, human_rate, human_time
from proteus_cache.plan.rates import READ_S, RENDER_S
from proteus_cache.plan.whole import StudentPlan, WholePlan

_COLUMNS = 80
_LABEL = 10
_UNKNOWN = "not known"


def render_cores(views_per_s: float, size_px: int) -> float:
    """Cores that make so many views a second: their cost grows with the side of a view."""
    return views_per_s * RENDER_S * size_px / 224


def read_cores(views_per_s: float, size_px: int) -> float:
    """Cores that read and decode so many packed views a second: nearly all of it is their pixels."""
    return views_per_s * READ_S * (size_px / 224) ** 2


def plan_lines(plan: WholePlan) -> list[str]:
    """The plan for people."""
    notes = _Notes()
    lines = [*_cache_lines(plan), "", *_extraction_lines(plan, notes)]
    if plan.students:
        lines += ["", *_student_lines(plan, notes)]
    elif plan.missing_targets:
        lines += ["", *_labelled("students", f"none: their losses need {' and '.join(plan.missing_targets)} too")]
    sources = notes.lines()
    return [*lines, "", *sources] if sources else lines


def next_step(plan: WholePlan) -> str | None:
    """The extraction that was planned, as a command; None when it would not fit."""
    if not plan.cache.fits():
        return None
    config = plan.config
    given = {
        "--teacher": config.teacher,
        "--weights": config.weights,
        "--images": config.images,
        "--limit": config.n_images,
        "--views": config.views,
        "--targets": ",".join(config.targets) if config.targets else None,
        "--codec": config.codec,
        "--size": config.size_px,
        "--out": config.out if config.is_out_given else None,
    }
    return command_line(
        "extract", *(word for flag, value in given.items() if value is not None for word in (flag, value))
    )


def plan_json(plan: WholePlan) -> dict[str, Any]:
    """The plan for machines; null where something is not known."""
    cache, hardware, outline = plan.cache, plan.hardware, plan.outline
    extraction_s = plan.extraction_s
    measured = hardware.measured
    return {
        "teacher": {
            "name": outline.name,
            "size_px": outline.size_px,
            "flops_per_view": teacher_shape(outline).forward_flops,
        },
        "cache": cache.size.to_json()
        | {
            "out": str(cache.out),
            "n_held_out": cache.n_held_out,
            "view_bytes_are_typical": plan.views_are_typical,
            "pack_bytes": plan.pack_bytes,
            "free_bytes": cache.free.bytes,
            "free_inodes": cache.free.inodes,
            "fits": cache.fits(),
            "pack_fits_beside_it": plan.pack_fits_beside_it,
        },
        "gpu": {
            "kind": hardware.title if hardware.gpu is None else hardware.gpu.kind,
            "count": hardware.n_gpus,
            "why": hardware.why,
        },
        "extraction": {
            "teacher_views_per_s_per_gpu": plan.teacher.views_per_s,
            "source": plan.teacher.source,
            "views_per_s": plan.extract_per_s,
            "slowest": plan.slowest,
            "seconds": extraction_s,
            "gpu_hours": None if extraction_s is None else extraction_s * hardware.n_gpus / 3600,
        },
        "epochs": plan.config.epochs,
        "students": [_student_json(student, extraction_s) for student in plan.students],
        "measured": None
        if measured is None
        else {
            "device": measured.device,
            "renders_per_s": measured.renders_per_s,
            "rendering_processes": measured.n_renderers,
            "disk_bytes_per_s": measured.disk_bytes_per_s,
        },
    }


def _student_json(student: StudentPlan, extraction_s: float | None) -> dict[str, Any]:
    size = student.size
    return {
        "student": student.student,
        "batch_size": size.batch_size,
        "views_per_epoch": size.views_per_epoch,
        "n_steps": size.n_steps,
        "views_per_s_per_gpu": student.rate.views_per_s,
        "source": student.rate.source,
        "views_per_s": student.views_per_s,
        "read_bytes_per_s": None if student.views_per_s is None else size.bytes_per_s(student.views_per_s),
        "bytes_to_read": size.bytes_to_read,
        "seconds": student.seconds,
        "live_seconds": student.live_seconds,
        "break_even_students": student.break_even(extraction_s),
    }


class _Notes:
    """Sources, numbered in the order in which they are first named."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        """ "[1]" for the first text, and again for the same one."""
        if text not in self._texts:
            self._texts.append(text)
        return f"[{self._texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        """Every text behind its mark."""
        lines = []
        for number, text in enumerate(self._texts, start=1):
            mark = f"[{number}] "
            lines += textwrap.wrap(text, _COLUMNS, initial_indent=mark, subsequent_indent=" " * len(mark))
        return lines


def _labelled(label: str, text: str) -> list[str]:
    """Text beside its label, wrapped under itself."""
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _cache_lines(plan: WholePlan) -> list[str]:
    """Teacher, cache and disk."""
    cache, size = plan.cache, plan.cache.size
    gflop = teacher_shape(plan.outline).forward_flops / 1e9
    probe = f" + a probe of {size.n_probe:,}" if size.n_probe else ""
    held_out = f"; {cache.n_held_out} of {size.n_shards:,} shards held out" if cache.n_held_out else ""
    typical = "(typical; --images DIR measures)" if plan.views_are_typical else "(of your images)"
    return [
        *_labelled(
            "teacher", f"{plan.outline.name}, views of {plan.outline.size_px} px, {human_rate(gflop)} GFLOP each"
        ),
        *_labelled("views", f"{size.n_images:,} images x {size.n_views}{probe}{held_out}"),
        *_labelled("targets", size.target_text()),
        *_labelled(
            "a view",
            f"{size.most}{human_bytes(size.bytes_per_view)}: {human_bytes(size.code_bytes)} codes, "
            f"{human_bytes(size.view_bytes)} pixels {typical}, {size.overhead_bytes:,} B more",
        ),
        *_unfitted(size),
        *_labelled("cache", f"{size.most}{human_bytes(size.bytes)} in {size.n_files:,} files"),
        *_labelled(
            "pack",
            f"{size.most}{human_bytes(plan.pack_bytes)}, made by the first training; pack --move frees the cache",
        ),
        *_labelled("free", f"{human_bytes(cache.free.bytes)} at {cache.out}: {_verdict(plan)}"),
        *([] if not is_cache(cache.out) else _labelled("there", "a cache already: extract goes on with it")),
    ]


def _unfitted(size: CacheSize) -> list[str]:
    """What to expect of codecs that are not fitted yet."""
    if not size.at_most:
        return []
    names = [f"{target.name} ({target.codec.name})" for target in size.targets if target.name in size.at_most]
    return _labelled(
        "codes",
        f"of {' and '.join(names)}: how many bytes the ratio takes is known once extract has fitted the codec to "
        "views, before it stores any; planned is the most, for components that all vary alike",
    )


def _verdict(plan: WholePlan) -> str:
    """Whether cache and pack fit."""
    cache = plan.cache
    if not cache.fits():
        state = "may not fit; as large as that" if cache.size.at_most else "does not fit;"
        return f"{state} {cache.what_fits('--n-images')}"
    if not plan.pack_fits_beside_it:
        return "the cache fits, a pack beside it does not: use pack --move, or --out on another disk"
    return "cache and pack fit"


def _machine(plan: WholePlan) -> str:
    hardware = plan.hardware
    return f"{hardware.n_gpus} x {hardware.title}" if hardware.has_gpu else "the CPU here"


def _extraction_lines(plan: WholePlan, notes: _Notes) -> list[str]:
    """Machine, and the extraction on it."""
    size_px, measured = plan.outline.size_px, plan.hardware.measured
    lines = _labelled("machine", f"{_machine(plan)} ({plan.hardware.why})")
    if plan.extract_per_s is None or plan.extraction_s is None:
        return [*lines, *_labelled("extract", f"time {plan.teacher.source}")]
    per_s, seconds = plan.extract_per_s, plan.extraction_s
    mark = notes.mark(plan.teacher.source)
    gpu_hours = seconds * plan.hardware.n_gpus / 3600
    hours = f" ({gpu_hours:,.1f} GPU-hours)" if plan.hardware.n_gpus > 1 else ""
    lines += _labelled("extract", f"{human_time(seconds)}{hours} at {human_rate(per_s)} views/s {mark}")
    written = human_bytes(per_s * plan.cache.size.bytes_per_view)
    if measured is None:
        cores = render_cores(per_s, size_px)
        mark = notes.mark(f"a core renders {_per_core(1 / render_cores(1, size_px), size_px)} (docs/benchmarks.md)")
        return [*lines, *_labelled("", f"with {_cores(cores)} for rendering {mark} and {written}/s to the disk")]
    return [
        *lines,
        *_labelled(
            "",
            f"decided by the {plan.slowest}: here {human_rate(measured.renders_per_s)} views/s are rendered by "
            f"{measured.n_renderers} processes and {human_bytes(measured.disk_bytes_per_s)}/s written",
        ),
    ]


def _cores(count: float) -> str:
    return f"{max(1, round(count)):,} core{'s' * (round(count) > 1)}"


def _student_lines(plan: WholePlan, notes: _Notes) -> list[str]:
    """A row for each student, what they come to together, and how to read it."""
    cells = {student.student: _cells(plan, student, notes) for student in plan.students}
    rows = [_aligned((name, *row)) if isinstance(row, tuple) else f"{name:11}{row}" for name, row in cells.items()]
    n_views = plan.students[0].size.views_per_epoch
    first = f"training  {plan.config.epochs} epochs of {n_views:,} views on {_machine(plan)}"
    if not any(isinstance(row, tuple) for row in cells.values()):
        return [first, *rows]
    return [first, _aligned(_HEADER), *rows, *_together(plan), "", *_explanation(plan, notes)]


_HEADER = ("student", "views/s", "reads", "cores", "cached", "live", "gain", "break-even", "")
_WIDTHS = (-10, 8, 11, 6, 9, 9, 6, 11, 4)


def _aligned(row: Iterable[str]) -> str:
    cells = (cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in zip(row, _WIDTHS, strict=True))
    return "".join(cells).rstrip()


def _cells(plan: WholePlan, student: StudentPlan, notes: _Notes) -> tuple[str, ...] | str:
    """What stands behind a student's name: numbers, or why there are none."""
    size = student.size
    if size.n_steps == 0:
        return f"an epoch is smaller than its batch of {size.batch_size:,}: train with --batch-size"
    per_s, seconds, live_s = student.views_per_s, student.seconds, student.live_seconds
    if per_s is None or seconds is None:
        return student.rate.source
    even = student.break_even(plan.extraction_s)
    return (
        human_rate(per_s),
        f"{human_bytes(size.bytes_per_s(per_s))}/s",
        f"{max(1, round(read_cores(per_s, plan.outline.size_px))):,}",
        human_time(seconds),
        "?" if live_s is None else human_time(live_s),
        "?" if live_s is None else f"{live_s / seconds:.1f}x",
        "?" if even is None else f"{even:.2g}",
        notes.mark(student.rate.source),
    )


def _together(plan: WholePlan) -> list[str]:
    """The whole study: one extraction and every student, against every student with a live teacher."""
    cached = [student.seconds for student in plan.students if student.seconds]
    live = [student.live_seconds for student in plan.students if student.live_seconds]
    if plan.extraction_s is None or not len(cached) == len(live) == len(plan.students):
        return []
    total, live_total = plan.extraction_s + sum(cached), sum(live)
    hours = (live_total - total) * plan.hardware.n_gpus / 3600
    unit = "GPU-hours" if plan.hardware.has_gpu else "hours"
    verdict = f"saves {human_rate(hours)} {unit}" if hours > 0 else f"costs {human_rate(-hours)} {unit} more"
    return _labelled(
        "together",
        f"{human_time(total)} with the extraction, {human_time(live_total)} with a live teacher: the cache {verdict}",
    )


def _explanation(plan: WholePlan, notes: _Notes) -> list[str]:
    """How to read the table."""
    size_px, n_views = plan.outline.size_px, plan.cache.size.n_views
    mark = notes.mark(f"a core reads and decodes {_per_core(1 / read_cores(1, size_px), size_px)} (docs/costs.md)")
    text = (
        f"reads, cores {mark}: what keeps training from waiting. live: the teacher runs in every step, on fresh views; "
        f"cached runs see the {n_views} stored views again and again. gain: live over cached. break-even: students "
        "after which extraction and cached training have cost less than live training; below 1, already the first."
    )
    return textwrap.wrap(text, _COLUMNS)


def _per_core(views_per_s: float, size_px: int) -> str:
    scaled = "" if size_px == 224 else ", scaled from 224 px"
    return f"{views_per_s:,.0f} views/s, measured by us{scaled}"
