"""The picture of a demo: loss curves, k-NN accuracies, and what teacher and student see in eight images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from proteus_cache import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK: Final = "#24292f"
_FAINT: Final = "#8b949e"
_LOSS_COLOURS: Final = {"token": "#d1495b", "feature": "#2e86ab", "patch": "#edae49"}
_BAR_COLOURS: Final = {"teacher": "#5b7f3a", "student": "#2e86ab", "untrained": "#b0b7bf"}
_SMOOTHED_OVER: Final = 0.02
"""Share of the run that the drawn curve averages over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is drawn."""

    title: str
    metrics: Path
    """`metrics.jsonl` of the run."""
    accuracies: Mapping[str, float]
    """k-NN accuracy, 0 to 1, by model; empty without labels."""
    images: Sequence[NDArray[np.uint8]]
    """(H, W, 3) each."""
    maps: Mapping[str, NDArray[np.float32]]
    """Row name to (images, h, w, 3) colours in 0..1, over the same part of each image."""
    margin: float
    """Share of an image's side that the maps leave out at each edge."""


def draw_picture(picture: Picture, path: Path) -> None:
    """Write the PNG, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    figure = Figure(figsize=(15, 5.9), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(
        1, 2, width_ratios=[1, 2.45], left=0.065, right=0.992, top=0.875, bottom=0.085, wspace=0.1
    )
    figure.suptitle(picture.title, x=0.012, y=0.975, ha="left", fontsize=15, color=_INK, fontweight="bold")
    has_bars = bool(picture.accuracies)
    panels = halves[0].subgridspec(2 if has_bars else 1, 1, height_ratios=[1.9, 1][: 1 + has_bars], hspace=0.42)
    _draw_losses(figure.add_subplot(panels[0]), picture.metrics)
    if has_bars:
        _draw_accuracies(figure.add_subplot(panels[1]), picture.accuracies)
    rows = {"view": None, **picture.maps}
    cells = halves[1].subgridspec(len(rows), len(picture.images), wspace=0.04, hspace=0.04)
    for row, (name, colours) in enumerate(rows.items()):
        for column, image in enumerate(picture.images):
            axes = figure.add_subplot(cells[row, column])
            if colours is None:
                axes.imshow(_inner(image, picture.margin))
            else:
                axes.imshow(colours[column], interpolation="bilinear")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.set_ylabel(name, fontsize=11, color=_INK)
            if row == 0 and column == 0:
                axes.set_title("patch features as colours, one basis for all rows", loc="left", fontsize=11, color=_INK)
    storage.write_whole(path, lambda: [_png(figure)])


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _inner(image: NDArray[np.uint8], margin: float) -> NDArray[np.uint8]:
    edge = round(margin * len(image))
    return image[edge : len(image) - edge, edge : len(image) - edge]


def _draw_losses(axes: Axes, metrics: Path) -> None:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]  # those of epochs have other numbers
    steps = [line["step"] for line in lines]
    _style(axes)
    for name, colour in _LOSS_COLOURS.items():
        values = np.array([line[f"loss_{name}"] for line in lines], np.float64)
        axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.7)
        smooth = _smoothed(values, max(1, round(_SMOOTHED_OVER * len(values))))
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step", fontsize=10, color=_INK)
    axes.set_title("loss (mean squared error)", loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, fontsize=10, labelcolor=_INK)


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """A centred mean that shrinks towards both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window, 0), np.minimum(places + window + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _draw_accuracies(axes: Axes, accuracies: Mapping[str, float]) -> None:
    _style(axes)
    names = list(accuracies)[::-1]
    shares = [100 * accuracies[name] for name in names]
    bars = axes.barh(names, shares, color=[_BAR_COLOURS[name] for name in names], height=0.62)
    axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=4, fontsize=10, color=_INK)
    axes.set_xlim(0, 118)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.set_title("k-NN accuracy on held-out images", loc="left", fontsize=11, color=_INK)


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
