"""What an evaluation found, for machines (`to_json`) and for people (`report_table`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from proteus_cache.evaluate.knn import KnnScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """The scores of one model."""

    model: str
    """`student`, `ema`, `teacher` or `untrained`."""
    weights: str
    """File name, URL or seed that the weights come from."""
    weights_sha256: str
    width: int
    """Length of a feature."""
    precision: str
    """Of the forward passes."""
    scores: tuple[KnnScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One evaluation of one run."""

    protocol: Literal["knn"]
    run: Path
    student: str
    """Name of the student's size."""
    steps: int
    """Training steps of the run."""
    images: Path
    split: str
    """Where the train and test parts come from."""
    seed: int
    """Of the split, where there is one."""
    size_px: int
    temperature: float
    n_classes: int
    n_train: int
    """Training images that were used."""
    n_test: int
    """Test images that were used."""
    device: str
    models: tuple[ModelScores, ...]
    n_bad_images: int
    """Images that were skipped."""
    bad_images: tuple[str, ...]
    """Why the first of them were skipped, with their files."""
    notes: tuple[str, ...]
    """What a reader of the numbers must know."""

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """Plain JSON values; paths as strings."""
        return {
            "format": "proteus-cache/evaluation",
            "version": 1,
            **asdict(self),
            "run": str(self.run),
            "images": str(self.images),
        }


def report_table(report: EvalReport) -> str:
    """The report as lines of plain text; accuracies in percent."""
    header = ["model", *(f"k={score.k}" for score in report.models[0].scores), "weights"]
    rows = [
        [
            model.model,
            *(f"{_percent(score.top1)} / {_percent(score.top5)}" for score in model.scores),
            model.weights,
        ]
        for model in report.models
    ]
    lines = [
        f"k-NN accuracy, top-1 / top-5 in percent: {report.student} after {report.steps:,} steps",
        f"{report.n_test:,} test images among {report.n_train:,} training images of {report.n_classes:,} classes, "
        f"{report.size_px} px: {report.images}",
        f"parts: {report.split}",
        "",
        *_aligned([header, *rows]),
    ]
    if report.notes or report.n_bad_images:
        lines.append("")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"skipped: {reason}" for reason in report.bad_images]
    if report.n_bad_images > len(report.bad_images):
        lines.append(f"skipped: {report.n_bad_images - len(report.bad_images)} more")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first and last to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
