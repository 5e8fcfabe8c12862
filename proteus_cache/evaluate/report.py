"""What an evaluation found, for machines (`to_json`) and for people (`report_table`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from proteus_cache.evaluate.heads import N_HEADS, Head
from proteus_cache.evaluate.knn import KnnScore
from proteus_cache.evaluate.labelled import TEST_SHARE

Protocol: TypeAlias = Literal["knn", "linear"]
ChosenOn: TypeAlias = Literal["test", "held_out"]

PUBLISHED_STEPS: Final = 25_020
PUBLISHED_BATCH: Final = 512
"""Length of the published probe, on ImageNet-1K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnSettings:
    """What k-NN scores depend on besides the images."""

    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """What the scores of a linear probe depend on besides the images."""

    steps: int
    batch_size: int
    passes: float
    """Over the training images."""
    n_held_out: int
    """Training images that the twins never saw."""
    published_steps: int = PUBLISHED_STEPS
    published_batch_size: int = PUBLISHED_BATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeScore:
    """How often one of the 52 heads was right about the test images."""

    chosen_on: ChosenOn
    """`test`: the best on the test images themselves, as published. `held_out`: the settings whose twin was best on
    held-out training images."""
    head: Head | None
    """Its settings; None where there was nothing to choose on."""
    top1: float | None
    """Share of the test images it was right about."""
    top5: float | None
    """Share of the test images whose class was among its first five."""
    held_out_top1: float | None
    """Share of the held-out images its twin was right about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadScore:
    """The scores of one of the 52 heads of one model."""

    head: Head
    top1: float | None
    top5: float | None
    held_out_top1: float | None
    """Share of the held-out training images its twin, which never saw them, was right about."""


Score: TypeAlias = KnnScore | ProbeScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """The scores of one model."""

    model: str
    """`student`, `ema`, `teacher`, and `untrained` or `start`: the student as it began."""
    weights: str
    """File name, URL or seed that the weights come from."""
    weights_sha256: str
    width: int
    """Length of a CLS token."""
    precision: str
    """Of the forward passes."""
    scores: tuple[Score, ...]
    """k-NN: one for each k. Linear: the best head on the test images, and the one chosen on held-out images."""
    heads: tuple[HeadScore, ...]
    """Linear: all 52. k-NN: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One evaluation of one run."""

    protocol: Protocol
    run: Path
    student: str
    """Name of the student's size."""
    steps: int
    """Training steps of the run."""
    images: Path
    split: str
    """Where the train and test parts come from."""
    seed: int
    """Of the split, where there is one, and of a linear probe."""
    size_px: int
    settings: KnnSettings | ProbeSettings
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
    name = "k-NN" if isinstance(report.settings, KnnSettings) else "linear probe"
    lines = [
        f"{name} accuracy, top-1 / top-5 in percent: {report.student} after {report.steps:,} steps",
        f"{report.n_test:,} test images among {report.n_train:,} training images of {report.n_classes:,} classes, "
        f"{report.size_px} px: {report.images}",
        f"parts: {report.split}",
        *_length(report.settings),
        "",
        *_aligned(_rows(report.models)),
    ]
    explanations = [*_legend(report.settings), *(f"note: {note}" for note in report.notes)]
    explanations += [f"skipped: {reason}" for reason in report.bad_images]
    if report.n_bad_images > len(report.bad_images):
        explanations.append(f"skipped: {report.n_bad_images - len(report.bad_images)} more")
    return "\n".join([*lines, "", *explanations] if explanations else lines)


def _length(settings: KnnSettings | ProbeSettings) -> Iterator[str]:
    if isinstance(settings, ProbeSettings):
        is_published = (settings.steps, settings.batch_size) == (PUBLISHED_STEPS, PUBLISHED_BATCH)
        yield (
            f"probe: {N_HEADS} heads, {settings.steps:,} steps of {settings.batch_size:,} images "
            f"({settings.passes:{',.1f' if settings.passes >= 1 else '.2g'}} passes); "
            + ("as published" if is_published else f"published: {PUBLISHED_STEPS:,} steps of {PUBLISHED_BATCH:,}")
        )


def _legend(settings: KnnSettings | ProbeSettings) -> Iterator[str]:
    if isinstance(settings, ProbeSettings):
        yield (
            f"best on test: the best of {N_HEADS} heads by its score on the test images themselves, as published; "
            "optimistic"
        )
        yield (
            f"by held-out: the head whose settings did best on one training image in {TEST_SHARE} "
            f"({settings.n_held_out:,}), trained without these; no test image had a say"
        )


def _rows(models: Sequence[ModelScores]) -> list[list[str]]:
    """The table's header and a row for each model."""
    columns = [[pair for score in model.scores for pair in _columns(score)] for model in models]
    return [
        ["model", *(title for title, _ in columns[0]), "weights"],
        *(
            [model.model, *(cell for _, cell in pairs), model.weights]
            for model, pairs in zip(models, columns, strict=True)
        ),
    ]


def _columns(score: Score) -> list[tuple[str, str]]:
    """Title and cell of what a score shows."""
    accuracy = f"{_percent(score.top1)} / {_percent(score.top5)}"
    if isinstance(score, KnnScore):
        return [(f"k={score.k}", accuracy)]
    if score.chosen_on == "test":
        return [("best on test", accuracy)]
    return [("by held-out", accuracy), ("its head", "-" if score.head is None else str(score.head))]


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
