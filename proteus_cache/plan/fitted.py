"""What fitting a codec showed, for people and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_cache.codecs.calibration import CalibrationReport


def fitted_lines(fitted: Mapping[str, CalibrationReport]) -> list[str]:
    """Two lines for each target: what its codes hold at how many bits, and what the codec does for it.

    Args:
        fitted: target to its report.
    """
    lines = []
    for target, report in fitted.items():
        lines += [
            f"fitted    {target}: {report.snr_db:.1f} dB at {report.bits_per_value:.2f} bits a value, "
            f"{report.gap_bits:.2f} above the Gaussian bound",
            f"          {_kept(report)}, {_dct(report)}; from {report.n_views:,} views, {report.n_tokens:,} tokens",
        ]
    return lines


def fitted_json(report: CalibrationReport | None) -> dict[str, Any] | None:
    """All fields of a report, by name; None without one."""
    return None if report is None else asdict(report)


def _kept(report: CalibrationReport) -> str:
    if report.n_kept == report.width:
        return f"all {report.width:,} components"
    return f"{report.n_kept:,} of {report.width:,} components"


def _dct(report: CalibrationReport) -> str:
    if report.dct:
        return f"DCT over the grid (saves {report.dct_saves_bits:.2f} bits)"
    if report.dct_saves_bits > 0:
        return f"no DCT (would save {report.dct_saves_bits:.2f} bits)"
    return "no DCT"
