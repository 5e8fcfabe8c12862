"""What was measured: the whole report, and its JSON. `table` has it for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from proteus_cache.codecs.record import CodecRecord
from proteus_cache.fidelity.axes import AxisMeasures
from proteus_cache.fidelity.conditional import REACH, Conditional
from proteus_cache.fidelity.curve import Curve
from proteus_cache.fidelity.neighbours import Neighbours
from proteus_cache.fidelity.per_token import percentile
from proteus_cache.fidelity.sample import Sample
from proteus_cache.fidelity.sides import Facts
from proteus_cache.fidelity.stream import Fidelity
from proteus_cache.fidelity.verdict import SLOPE_TOLERANCE, Verdict, axis_word, judge, outside

_NOTED_FROM_DB = 60.0
"""From here on the rounding of a float16 reference shows."""

_NOTED_DOUBT = 0.02
"""Bits."""


@dataclass(frozen=True, slots=True)
class ReportedTarget:
    """One target with its streams."""

    name: str
    codec: CodecRecord
    blob_bytes: int
    """Of the fitted parameters, shared by all views."""
    streams: tuple[Fidelity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityReport:
    """One measurement."""

    side: Facts
    reference: str
    reference_codecs: Mapping[str, str]
    sample: Sample
    device: str
    targets: tuple[ReportedTarget, ...]
    neighbours: tuple[Neighbours, ...]
    curves: tuple[Curve, ...]

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Stream to what is to be said of it."""
        return {found.stream.name: judge(found) for target in self.targets for found in target.streams}

    @property
    def is_good(self) -> bool:
        """Whether no stream failed a gate."""
        return all(verdict.is_good is not False for verdict in self.verdicts.values())

    @property
    def code_bytes(self) -> int:
        """Of a view, all targets."""
        return sum(target.codec.code_bytes for target in self.targets)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know."""
        return tuple(_notes(self))

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """Plain JSON values; null for what is infinite or not known."""
        return {
            "format": "proteus-cache/fidelity",
            "version": 1,
            "path": str(self.side.path),
            "kind": self.side.kind,
            "identity": self.side.identity,
            "teacher": self.side.teacher.name,
            "teacher_weights_sha256": self.side.teacher.weights_sha256,
            "reference": self.reference,
            "reference_codecs": dict(self.reference_codecs),
            "device": self.device,
            "is_held_out": self.sample.is_held_out,
            "n_views": len(self.sample.measured),
            "n_images": self.sample.n_images,
            "views": self.sample.views,
            "n_bank": len(self.sample.bank),
            "code_bytes": self.code_bytes,
            "is_good": self.is_good,
            "targets": {target.name: _target_json(target, self.verdicts) for target in self.targets},
            "neighbours": [asdict(found) for found in self.neighbours],
            "curves": [asdict(curve) for curve in self.curves],
            "notes": list(self.notes),
        }


def _target_json(target: ReportedTarget, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {
        "codec": target.codec.name,
        "code_bytes": target.codec.code_bytes,
        "parameters": target.codec.parameters,
        "parameters_bytes": target.blob_bytes,
        "streams": {found.stream.name: _stream_json(found, verdicts[found.stream.name]) for found in target.streams},
    }


def _stream_json(found: Fidelity, verdict: Verdict) -> dict[str, Any]:
    tokens, rate = found.tokens, found.rate
    return {
        "n_tokens": found.n_tokens,
        "n_images": found.n_images,
        "snr_db": found.snr_db,
        "snr_standard_error_db": found.snr_error_db,
        "relative_error": found.relative_error if math.isfinite(found.relative_error) else None,
        "worst_token": None if tokens.worst is None else asdict(tokens.worst),
        "token_relative_error_p999": tokens.relative_error_p999,
        "cosine": {"mean": tokens.cosine_mean, "p1": tokens.cosine_p1},
        "centred_cosine": {"mean": tokens.centred_cosine_mean, "p1": tokens.centred_cosine_p1},
        "channels": _axes_json(found.channels),
        "components": None if found.components is None else _axes_json(found.components),
        "components_of": "the codec" if found.stream.klt is not None else "the measured tokens",
        "judged_along": f"{axis_word(found)}s",
        "conditional": _conditional_json(found.conditional),
        "rate": {
            "bits_per_value": rate.bits_per_value,
            "code_bytes": rate.code_bytes,
            "gaussian_bound": rate.bound,
            "gap": rate.gap,
            "bound_sampling_doubt": rate.bound_doubt,
            "own_transform_bound": rate.own_bound,
            "own_transform_gap": rate.own_gap,
        },
        "noise_floor": found.loss.noise_floor,
        "n_kept": found.loss.n_kept,
        "width": found.stream.width,
        "dropped_share": found.loss.dropped_share,
        "n_widened_steps": found.n_widened,
        "n_widened_views": found.n_widened_views,
        "verdict": {"is_good": verdict.is_good, "reasons": list(verdict.reasons)},
    }


def _axes_json(axes: AxisMeasures) -> dict[str, Any]:
    worst, slope = int(axes.relative_error.argmax()), axes.slope
    value: dict[str, Any] = {
        "n": axes.n_axes,
        "n_constant": axes.n_constant,
        "relative_error": {
            "median": middle(axes.relative_error),
            "p99": percentile(axes.relative_error, 99),
            "max": float(axes.relative_error[worst]),
            "worst": worst,
        },
        "slope": {"min": float(slope.min()), "median": middle(slope), "max": float(slope.max())},
        "mean_error_max": float(axes.mean_error.abs().max()),
    }
    if axes.slope_error is not None and axes.pooled_slope is not None:
        value["slope"] |= {
            "standard_error_median": middle(axes.slope_error),
            "pooled": axes.pooled_slope.value,
            "pooled_standard_error": axes.pooled_slope.standard_error,
            "n_beyond_3_standard_errors": int(outside(axes.slope, axes.slope_error, 1.0, SLOPE_TOLERANCE, 3.0).sum()),
        }
    return value


def _conditional_json(found: Conditional) -> dict[str, Any]:
    return {
        "reach_sd": REACH,
        "counts": list(found.counts),
        "mean_errors": list(found.mean_errors),
        "standard_errors": list(found.standard_errors),
        "largest": found.largest,
        "rms": found.rms,
    }


def _notes(report: FidelityReport) -> Iterator[str]:
    sample = report.sample
    if not sample.is_held_out:
        yield (
            "no held-out view is stored here, so these are views that the codec may have been fitted to: on others it "
            "does worse; extract at least 10 shards to have some held out"
        )
    for target in report.targets:
        for found in target.streams:
            if report.verdicts[found.stream.name].is_good is None:
                yield f"{found.stream.name}: {'; '.join(report.verdicts[found.stream.name].reasons)}"
            reference = report.reference_codecs.get(target.name)
            if reference == "float16" and found.snr_db is not None and found.snr_db > _NOTED_FROM_DB:
                yield f"{found.stream.name}: the reference is float16, which itself is about 74 dB from exact"
            if found.relative_error > 0 and found.rate.bound is None:
                yield (
                    f"{found.stream.name}: {found.n_tokens:,} tokens of width {found.stream.width} are too few for a "
                    "bound and for components"
                )
            if found.rate.bound is not None and found.rate.bound_doubt > _NOTED_DOUBT:
                yield (
                    f"{found.stream.name}: of {found.n_tokens:,} tokens the bound comes out about "
                    f"{found.rate.bound_doubt:.2f} bit too low"
                )
            if found.channels.n_constant:
                yield (
                    f"{found.stream.name}: {found.channels.n_constant} channels hardly vary and are left out of "
                    "channel figures"
                )
    if not report.neighbours:
        yield "no k-NN: it needs cls or patch targets, and views of other images beside the measured ones"
    elif any(found.exact is None for found in report.neighbours):
        yield "k-NN accuracy is left out: not every image has a label; the neighbours need none"
    for curve in report.curves:
        for missing in curve.missing:
            yield f"not in the plot of {curve.stream}: {missing}"


def middle(values: Tensor) -> float:
    """The median."""
    return percentile(values, 50)
