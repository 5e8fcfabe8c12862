"""What the gaps between the losses after an epoch ask for: more views, or more images. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

THRESHOLD: Final = 0.1
"""Relative gap from which a remedy is named."""
VIEWS: Final = {
    "seen": "views that were trained on",
    "probe": "unseen views of the same images",
    "held_out": "images that are held out",
}
"""What each kind of views is, for people."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What a gap between two losses asks for."""

    remedy: str
    """"more views" or "more images"."""
    gap: float
    """Relative."""
    text: str
    """For people."""


def advise(after_epoch: Mapping[str, float | None]) -> list[Advice]:
    """What the losses after an epoch ask for; nothing where no gap passes the threshold.

    The gap between two kinds of views is that of the loss where it is widest: the CLS token is learned by heart before
    the patches are, and the sum of the losses hardly shows it.

    Args:
        after_epoch: a line of `metrics.jsonl` for an epoch: `seen`, `probe`, `held_out`, and `seen_token`, ... Without
            a probe the gap from seen views to held-out images is that of views and images together, and asks for
            either.
    """
    found = []
    if after_epoch.get("probe"):
        found.append(_compare(after_epoch, "seen", "probe", "more views", "extract the same images with more --views"))
        remedy = "extract from more images, or train for fewer epochs"
        found.append(_compare(after_epoch, "probe", "held_out", "more images", remedy))
    else:
        remedy = "a cache with --probe-images tells which"
        found.append(_compare(after_epoch, "seen", "held_out", "more views or more images", remedy))
    return [advice for advice in found if advice is not None]


def _compare(after_epoch: Mapping[str, float | None], low: str, high: str, remedy: str, how: str) -> Advice | None:
    """Advice where a loss on views of the kind `high` is well above that on `low`."""
    widest, name, pair = THRESHOLD, "", (0.0, 0.0)
    for suffix in ("", "_token", "_feature", "_patch", "_block"):
        below, above = after_epoch.get(low + suffix), after_epoch.get(high + suffix)
        if below and above and above / below - 1 > widest:
            widest, name, pair = above / below - 1, suffix.removeprefix("_"), (below, above)
    if pair == (0.0, 0.0):
        return None
    below, above = pair
    text = (
        f"{remedy} would help: the {name + ' ' if name else ''}loss is {widest:.0%} higher on {VIEWS[high]} "
        f"({above:.4g}) than on {VIEWS[low]} ({below:.4g}); {how}"
    )
    return Advice(remedy, widest, text)
