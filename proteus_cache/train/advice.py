"""What the gaps between the losses after an epoch ask for: more views, or more images. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

THRESHOLD: Final = 0.1
"""Relative gap from which a remedy is named."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What a gap between two losses asks for."""

    remedy: str
    """"more views" or "more images"."""
    gap: float
    """Relative."""
    text: str
    """For people."""


def advise(losses: Mapping[str, float]) -> list[Advice]:
    """What the losses after an epoch ask for; nothing where no gap passes the threshold.

    Args:
        losses: by `seen`, `probe` and `held_out`, those that there are. Without a probe the gap from seen views to
            held-out images is that of views and images together, and asks for either.
    """
    seen, probe, held_out = (losses.get(kind) for kind in ("seen", "probe", "held_out"))
    found = []
    if seen and probe and probe / seen - 1 > THRESHOLD:
        gap = probe / seen - 1
        found.append(
            Advice(
                "more views",
                gap,
                f"more views would help: the loss is {gap:.0%} higher on views of trained images that were not trained "
                f"on ({probe:.4g}, and {seen:.4g} on those that were); extract the same images with more --views",
            )
        )
    if held_out and probe and held_out / probe - 1 > THRESHOLD:
        gap = held_out / probe - 1
        found.append(
            Advice(
                "more images",
                gap,
                f"more images would help: the loss is {gap:.0%} higher on held-out images ({held_out:.4g}, and "
                f"{probe:.4g} on unseen views of trained ones); extract from more images, or train for fewer epochs",
            )
        )
    if held_out and seen and not probe and held_out / seen - 1 > THRESHOLD:
        gap = held_out / seen - 1
        found.append(
            Advice(
                "more views or more images",
                gap,
                f"more views or more images would help: the loss is {gap:.0%} higher on held-out images "
                f"({held_out:.4g}, and {seen:.4g} on trained views); a cache with --probe-images tells which",
            )
        )
    return found
