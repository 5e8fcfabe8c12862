"""What makes a teacher this teacher: the record that a manifest keeps. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Argument: TypeAlias = int | float | bool | str | None
"""A JSON-able argument of a timm model."""
Statistics: TypeAlias = tuple[float, float, float]
"""Red, green, blue; of pixels in 0..1."""

IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherIdentity:
    """Everything that decides which numbers a teacher gives, but the precision it runs in."""

    name: str
    """As asked for: `dinov2_vitg14`, `timm:NAME` or `vit`."""
    implementation: str
    """Library, version and class that run the forward."""
    architecture: Mapping[str, Argument]
    """Arguments that build the model there; `model_name` and `img_size` for `timm:NAME`."""
    weights_source: str
    """`random:SEED`, the URL of a download, or the name of a local file."""
    weights_sha256: str
    """`weights.state_digest` of the backbone's tensors (timm key names, float32, no classifier)."""
    licence: str
    """Licence of the weights as far as it is known."""
    size_px: int
    """Side of the square view."""
    patch_px: int
    """Side of one patch."""
    width: int
    """Length of one token, D."""
    depth: int
    """Number of blocks."""
    n_register_tokens: int
    """Tokens between CLS and patches."""
    mean: Statistics
    """Subtracted from pixels in 0..1, per channel."""
    std: Statistics
    """Divides pixels after that, per channel."""
