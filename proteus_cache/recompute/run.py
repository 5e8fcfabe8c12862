"""Computing views again, and the report of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proteus_cache import stores
from proteus_cache.cache.layout import shard_stem, views_tar
from proteus_cache.cache.verify import Finding
from proteus_cache.codecs.recomputed import PRECISION, TargetComparison
from proteus_cache.devices import or_explain, use_device
from proteus_cache.errors import DamageError, StorageError
from proteus_cache.extract.memory import smaller_batch
from proteus_cache.extract.run import default_batch
from proteus_cache.fidelity.sides import Entry, Side
from proteus_cache.pack.samples import tar_name
from proteus_cache.recompute.choice import Drawn
from proteus_cache.recompute.teacher import load_recorded_teacher
from proteus_cache.teachers.teacher import Precision, Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeReport:
    """What computing views again showed."""

    n_views: int
    """That were compared."""
    seed: int
    device: str
    precision: str
    """Of the teacher's forward now."""
    targets: dict[str, dict[str, Any]]  # numbers, and null where there is none
    """Target name to `lowest_cosine`, `mean_cosine`, `largest_error`, `tolerance` (of that view), `between_views`
    (median distance of different views, null for one view), `n_failed`."""
    findings: list[Finding]
    """A finding for each view that failed, and for what could not be read."""

    def to_json(self) -> dict[str, Any]:
        """For machines; the findings stand beside it."""
        return {
            "n_views": self.n_views,
            "seed": self.seed,
            "device": self.device,
            "precision": self.precision,
            "targets": self.targets,
        }

    def lines(self) -> list[str]:
        """For people."""
        head = f"recomputed {self.n_views:,} view{'s' * (self.n_views != 1)} in {self.precision} on {self.device}"
        lines = [f"{head}, seed {self.seed}"]
        for name, numbers in self.targets.items():
            if numbers["largest_error"] is None:
                continue
            lines.append(
                f"{name:<9} cosine {numbers['lowest_cosine']:.6f} at least, {numbers['mean_cosine']:.6f} in the mean; "
                f"relative error {numbers['largest_error']:.5f} at most, {numbers['tolerance']:.5f} allowed"
            )
            between = numbers["between_views"]
            if between is not None and between / 2 < PRECISION[self.precision]:
                lines.append(f"          views differ by {between:.5f} only: {name} can hardly tell one from another")
        return lines


def recompute(
    path: Path,
    n_views: int,
    *,
    seed: int,
    weights: str | None = None,
    home: Path,
    device: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    download_progress: Callable[[int, int | None], None] | None = None,
) -> RecomputeReport:
    """Run the teacher again over stored views and compare with the stored targets.

    Args:
        path: a cache or pack.
        n_views: drawn by `seed` from all stored views, the probe's among them.
        seed: of the draw.
        weights: as for extract; None takes those that extract would.
        home: PROTEUS_HOME.
        device: "cuda", "cpu" or None for the best there is. The precision is the recorded one on a GPU, fp32 on a CPU.
        batch_size: views in one forward; None as in extract.
        progress: called with (views done, views in all, 0).
        download_progress: of weights.

    Raises:
        UsageError: `path` is no cache or pack, holds no view, or the device does not exist.
        WeightsError: the weights cannot be had or are not those that the store names.
        DamageError: the store's document is damaged.
    """
    chosen_device = use_device(device)
    drawn = Drawn(path, n_views, seed)
    side = drawn.side
    made = side.facts.teacher
    teacher = load_recorded_teacher(made, path, weights=weights, home=home, progress=download_progress)
    teacher.to(chosen_device, made.precision if chosen_device.type == "cuda" else "fp32")
    now, findings = teacher.precision, [_unreadable(side, unit, why) for unit, why in drawn.damaged.items()]
    comparisons: dict[str, TargetComparison] = {}
    for name in side.facts.targets:
        try:
            comparisons[name] = TargetComparison(name, side.codec(name).to(chosen_device), side.facts.kind == "pack")
        except (DamageError, StorageError) as error:
            findings.append(Finding(f"codec ({name})", None, str(error), f"run `{stores.repair_command(path)}`"))
    compared: list[Entry] = []
    at_once = batch_size or default_batch(chosen_device)
    for start in range(0, len(drawn.entries), at_once):
        part = drawn.entries[start : start + at_once]
        then = [drawn.precisions.get((entry.view, entry.shard), made.precision) for entry in part]
        coarser = [max(now, before, key=PRECISION.__getitem__) for before in then]
        readable, unreadable = _one_batch(side, teacher, comparisons, part, coarser)
        compared += readable
        findings += unreadable
        if progress is not None:
            progress(min(start + at_once, len(drawn.entries)), len(drawn.entries), 0)
    for comparison in comparisons.values():
        findings += _judge(side, comparison, compared)
    return RecomputeReport(
        n_views=len(compared) if comparisons else 0,
        seed=seed,
        device=str(chosen_device),
        precision=now,
        targets={name: _numbers(comparison) for name, comparison in comparisons.items()},
        findings=findings,
    )


def _one_batch(
    side: Side,
    teacher: Teacher,
    comparisons: dict[str, TargetComparison],
    entries: Sequence[Entry],
    precisions: Sequence[str],
) -> tuple[list[Entry], list[Finding]]:
    """Compare a batch: the views that were compared, and of each that cannot be read, why."""
    readable, pixels, codes = [], [], []
    findings = []
    for entry, precision in zip(entries, precisions, strict=True):
        try:
            view = side.pixels([entry])[0]
            stored = {name: side.codes([entry], name)[0] for name in comparisons}
        except (DamageError, StorageError) as error:
            findings.append(_finding(side, entry, str(error)))
            continue
        readable.append((entry, precision))
        pixels.append(torch.from_numpy(np.array(view)))
        codes.append(stored)
    if not readable:
        return [], findings
    tokens = _targets(teacher, torch.stack(pixels), list(comparisons))
    for name, comparison in comparisons.items():
        stacked = torch.from_numpy(np.stack([stored[name] for stored in codes])).to(teacher.device)
        comparison.add(tokens[name], stacked, [precision for _, precision in readable])
    return [entry for entry, _ in readable], findings


def _targets(teacher: Teacher, pixels: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """What the teacher says; in fp32 where the precision is too narrow for these views, as extract does it."""
    found = or_explain(
        lambda: teacher.targets(pixels, names),
        len(pixels),
        lambda n: teacher.targets(pixels[:n], names),
        smaller_batch(len(pixels)),
    )
    if teacher.precision == "fp32" or all(bool(values.isfinite().all()) for values in found.values()):
        return found
    before: Precision = teacher.precision
    logger.warning("views are not finite in precision=%s and were run again in fp32", before)
    found = teacher.to(teacher.device, "fp32").targets(pixels, names)
    teacher.to(teacher.device, before)
    return found


def _judge(side: Side, comparison: TargetComparison, compared: Sequence[Entry]) -> list[Finding]:
    findings = []
    for measured, limit in comparison.failures():
        entry = compared[measured.place]
        problem = (
            f"target {comparison.name} of {entry.key} is not what the teacher says of this view: relative "
            f"error {measured.error:.4f}, {limit:.4f} allowed, cosine {measured.cosine:.4f}"
        )
        findings.append(_finding(side, entry, problem))
    return findings


def _numbers(comparison: TargetComparison) -> dict[str, Any]:
    views, distance = comparison.views, comparison.distance
    finite = [view for view in views if np.isfinite(view.error) and np.isfinite(view.cosine)]
    worst = max(finite, key=lambda view: view.error, default=None)
    return {
        "lowest_cosine": min((view.cosine for view in finite), default=None),
        "mean_cosine": float(np.mean([view.cosine for view in finite])) if finite else None,
        "largest_error": worst.error if worst else None,
        "tolerance": comparison.tolerance(worst) if worst else None,
        "between_views": distance,
        "n_failed": len(comparison.failures()),
    }


def _unreadable(side: Side, unit: tuple[str, int], why: str) -> Finding:
    name = f"{unit[0]}/{shard_stem(unit[1])}"
    return Finding(_path(side, *unit), name, why, f"run `{stores.repair_command(side.facts.path)}`")


def _finding(side: Side, entry: Entry, problem: str) -> Finding:
    unit = f"{entry.view}/{shard_stem(entry.shard)}"
    if side.facts.kind == "cache":
        remedy = f"run `{stores.repair_command(side.facts.path, '--unit', unit)}`: it redoes this unit"
    else:
        remedy = "the cache has the same: verify it with --recompute, repair its units, and pack it to a new folder"
    return Finding(_path(side, entry.view, entry.shard), unit, problem, remedy)


def _path(side: Side, view: str, shard: int) -> str:
    return views_tar(view, shard) if side.facts.kind == "cache" else tar_name(view, shard)
