"""Numbers as people read them: bytes, times, rates."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Decimal units with three digits: 394,752 to "395 KB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """Seconds to "45 s", "12 min", "3.4 h", "1,203 h" or "1,628 y"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    if hours >= 100_000:
        return f"{hours / 8766:,.0f} y"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def human_rate(per_s: float) -> str:
    """Three digits, or all before the point: 0.213, 24.2, 1,270."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"
