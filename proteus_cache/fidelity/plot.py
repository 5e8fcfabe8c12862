"""The picture of a measurement: rate against distortion, every codec, the bound, and where this store stands."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from proteus_cache.fidelity.curve import Curve, CurvePoint
from proteus_cache.fidelity.report import FidelityReport
from proteus_cache.fidelity.stream import Fidelity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK: Final = "#24292f"
_FAINT: Final = "#8b949e"
_COLOURS: Final = {"klt": "#2e86ab", "int4": "#c77f0a", "int8": "#d1495b", "float16": "#5b7f3a", "float32": "#5b7f3a"}
_TICKS: Final = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
_HEADROOM_DB: Final = 10
_LABEL_AT: Final = 0.6
"""Of the height: where the bound is named."""
_NOT_SHOWN_DB: Final = 60
"""The axis ends near here: beyond it no codec differs for use."""


def draw(report: FidelityReport) -> bytes:
    """A PNG with one panel for each compared target."""
    n = len(report.curves)
    figure = Figure(figsize=(7.6 * n, 5.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, n, squeeze=False)[0]
    streams = {found.stream.name: found for target in report.targets for found in target.streams}
    for axes, curve in zip(panels, report.curves, strict=True):
        _panel(axes, curve, streams[curve.stream], report)
    figure.tight_layout(pad=1.4, w_pad=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, curve: Curve, found: Fidelity, report: FidelityReport) -> None:
    shown = [point for point in curve.points if point.snr_db is not None]
    own_db = found.snr_db
    top = max([point.snr_db or 0.0 for point in shown] + [own_db or 0.0, 20.0])
    top = min(top, _NOT_SHOWN_DB) + _HEADROOM_DB
    lowest = min([point.bits_per_value for point in curve.points] + [found.rate.bits_per_value, 0.5])
    _frame(axes, lowest * 0.7, top)
    views = "held-out" if report.sample.is_held_out else "measured"
    axes.set_ylabel(f"fidelity on {views} views (dB, higher is better)", fontsize=10, color=_INK)
    axes.set_title(
        f"{curve.stream} tokens of {report.side.teacher.name}: what each codec keeps",
        loc="left",
        fontsize=12,
        color=_INK,
    )
    _bound(axes, curve, lowest * 0.7, top)
    _klt(axes, [point for point in shown if point.codec.startswith("klt")])
    for point in curve.points:
        if not point.codec.startswith("klt"):
            _dot(axes, point, top, is_named=point.codec != found.stream.codec.name)
    _own(axes, found, report.side.kind, top)


def _frame(axes: Axes, left: float, top: float) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, 36)
    axes.set_ylim(0, top)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick >= left]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("rate (bits a value, all overhead counted)", fontsize=10, color=_INK)


def _bound(axes: Axes, curve: Curve, left: float, top: float) -> None:
    drawn = [(bits, decibel) for bits, decibel in curve.bound if bits > 0]
    if not drawn:
        return
    bits, decibels = zip(*drawn, strict=True)
    axes.plot(bits, decibels, color=_INK, linewidth=1.2)
    axes.fill_betweenx(decibels, left, [max(left, each) for each in bits], color="#f3f5f7", linewidth=0)
    place = min(drawn, key=lambda point: abs(point[1] - top * _LABEL_AT))
    axes.annotate(
        "Gaussian bound",
        place,
        xytext=(-8, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_INK,
    )


def _klt(axes: Axes, points: list[CurvePoint]) -> None:
    if not points:
        return
    pairs = sorted((point.bits_per_value, point.snr_db or 0.0) for point in points)
    axes.plot(*zip(*pairs, strict=True), color=_COLOURS["klt"], marker="o", markersize=5, linewidth=1.4)
    axes.annotate("klt", pairs[0], xytext=(8, -12), textcoords="offset points", fontsize=10, color=_COLOURS["klt"])


def _dot(axes: Axes, point: CurvePoint, top: float, *, is_named: bool) -> None:
    """A codec without a goal. Its name is left out where the store's own label says it."""
    colour = _COLOURS[point.codec]
    if point.snr_db is None or point.snr_db > top:
        said = "exact here" if point.snr_db is None else f"{point.snr_db:.0f} dB"
        axes.plot(point.bits_per_value, top * 0.985, marker="^", markersize=7, color=colour, clip_on=False)
        label, place = f"{point.codec}\n{said}", (point.bits_per_value, top * 0.985)
        if is_named:
            axes.annotate(label, place, xytext=(8, -14), textcoords="offset points", fontsize=10, color=colour)
        return
    axes.plot(point.bits_per_value, point.snr_db, marker="o", markersize=6, color=colour)
    if is_named:
        place = (point.bits_per_value, point.snr_db)
        axes.annotate(point.codec, place, xytext=(8, -4), textcoords="offset points", fontsize=10, color=colour)


def _own(axes: Axes, found: Fidelity, kind: str, top: float) -> None:
    decibel = found.snr_db
    place = (found.rate.bits_per_value, top * 0.985 if decibel is None or decibel > top else decibel)
    axes.plot(*place, marker="o", markersize=15, markerfacecolor="none", markeredgecolor=_INK, markeredgewidth=1.6)
    unknown = "exact" if found.relative_error == 0 else "not judged"
    value = unknown if decibel is None else f"{decibel:.1f} dB"
    axes.annotate(
        f"this {kind}: {found.stream.coding}\n{found.rate.bits_per_value:.2f} bits, {value}",
        place,
        xytext=(12, -12),
        textcoords="offset points",
        va="top",
        fontsize=10,
        fontweight="bold",
        color=_INK,
    )
