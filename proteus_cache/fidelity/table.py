"""What was measured, as lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from proteus_cache.fidelity.axes import AxisMeasures, Estimate
from proteus_cache.fidelity.neighbours import Neighbours
from proteus_cache.fidelity.per_token import percentile
from proteus_cache.fidelity.report import FidelityReport, middle
from proteus_cache.fidelity.stream import Fidelity
from proteus_cache.fidelity.verdict import Verdict, axis_word
from proteus_cache.plan.human import human_bytes


def report_lines(report: FidelityReport) -> list[str]:
    """The report as lines of plain text."""
    found = [stream for target in report.targets for stream in target.streams]
    blobs = sum(target.blob_bytes for target in report.targets)
    sample = report.sample
    n_raw = sum(2 * math.prod(target.shape) for target in report.side.targets.values())
    parts = ", ".join(f"{target.name} {target.codec.name}" for target in report.targets)
    kind = "held-out views" if sample.is_held_out else "views that the codec may have been fitted to"
    return [
        f"fidelity of {report.side.kind} {report.side.path}, against {report.reference}",
        f"codes     {human_bytes(report.code_bytes)} a view ({parts}); float16 would take {human_bytes(n_raw)}",
        f"shared    {human_bytes(blobs)} of fitted parameters, once for all views",
        f"measured  {len(sample.measured):,} {kind} of {sample.n_images:,} images ({', '.join(sample.views)})",
        "",
        *aligned([_CLOSE_HEADER, *(_close_row(each) for each in found)]),
        "",
        *aligned([_BIAS_HEADER, *(_bias_row(each, report.verdicts[each.stream.name]) for each in found)]),
        "",
        *aligned([_REST_HEADER, *(_rest_row(each) for each in found)]),
        *_neighbour_lines(report.neighbours),
        "",
        *_LEGEND,
        *(f"failed: {name}: {reason}" for name, verdict in report.verdicts.items() for reason in _failures(verdict)),
        *(f"note: {note}" for note in report.notes),
    ]


_LEGEND = (
    "dB: about the mean; above bound: bits a value more than a Gaussian source of this covariance needs (own: of the "
    "variances in the codec's transform)",
    "token: squared error over squared deviation from the mean; centred: with the mean taken off; noise floor: take it "
    "off losses",
    "slope: of decoded on exact, 1 is unbiased; +- a standard error over images; mean error, and binned by the exact "
    "value: in standard deviations",
)

_CLOSE_HEADER = (
    *("target", "codec", "bits/value", "dB", "above bound", "above own", "token 99.9 %", "worst token"),
    *("cosine", "1 %", "centred", "1 %"),
)
_BIAS_HEADER = ("target", "along", "slope", "min", "median", "max", "mean error", "binned", "largest", "verdict")
_REST_HEADER = (
    *("target", "worst channel", "channel 99 %", "worst component", "kept", "dropped", "noise floor", "widened"),
)


def _close_row(found: Fidelity) -> list[str]:
    tokens, rate = found.tokens, found.rate
    return [
        found.stream.name,
        found.stream.coding,
        f"{rate.bits_per_value:.2f}",
        _decibel(found),
        "-" if rate.gap is None else f"{rate.gap:+.2f}",
        "-" if rate.own_gap is None else f"{rate.own_gap:+.2f}",
        _small(tokens.relative_error_p999),
        "-" if tokens.worst is None else _small(tokens.worst.relative_error),
        f"{tokens.cosine_mean:.5f}",
        f"{tokens.cosine_p1:.5f}",
        f"{tokens.centred_cosine_mean:.5f}",
        f"{tokens.centred_cosine_p1:.5f}",
    ]


def _bias_row(found: Fidelity, verdict: Verdict) -> list[str]:
    axes = found.judged
    largest = found.conditional.largest
    return [
        found.stream.name,
        f"{axes.n_axes} {axis_word(found)}s",
        "-" if axes.pooled_slope is None else _estimate(axes.pooled_slope),
        _slope_at(axes, int(axes.slope.argmin())),
        f"{middle(axes.slope):.4f}",
        _slope_at(axes, int(axes.slope.argmax())),
        f"{float(axes.mean_error.abs().max()):.4f}",
        f"{found.conditional.rms:.4f}",
        "-" if largest is None else f"{largest:.4f}",
        {True: "good", False: "FAILED", None: "not judged"}[verdict.is_good],
    ]


def _rest_row(found: Fidelity) -> list[str]:
    channels = found.channels.relative_error
    return [
        found.stream.name,
        _largest(channels),
        _small(percentile(channels, 99)),
        "-" if found.components is None else _largest(found.components.relative_error),
        f"{found.loss.n_kept} of {found.stream.width}",
        f"{100 * found.loss.dropped_share:.3g} %",
        _small(found.loss.noise_floor),
        f"{found.n_widened:,}",
    ]


def _neighbour_lines(found: Sequence[Neighbours]) -> Iterator[str]:
    if not found:
        return
    yield ""
    yield from aligned(
        [
            ("k-NN on", "exact", "decoded", "shared neighbours", "same first"),
            *(
                (
                    each.feature,
                    _percent(each.exact),
                    _percent(each.decoded),
                    _percent(each.shared),
                    _percent(each.same_first),
                )
                for each in found
            ),
        ]
    )
    first = found[0]
    yield (
        f"{first.n_queries:,} measured views, each with its {first.k} nearest of {first.n_bank:,} views of other "
        "images; in percent"
    )


def _failures(verdict: Verdict) -> tuple[str, ...]:
    return verdict.reasons if verdict.is_good is False else ()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left, all others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _decibel(found: Fidelity) -> str:
    if found.snr_db is None:
        return "exact" if found.relative_error == 0 else "-"
    return f"{found.snr_db:.2f}"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} +- {estimate.standard_error:.4f}"


def _slope_at(axes: AxisMeasures, axis: int) -> str:
    assert axes.slope_error is not None
    return _estimate(Estimate(float(axes.slope[axis]), float(axes.slope_error[axis])))


def _largest(values: Tensor) -> str:
    return f"{_small(float(values.max()))} (no. {int(values.argmax())})" if bool(values.any()) else "0"


def _small(number: float) -> str:
    return "0" if number == 0 else f"{number:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
