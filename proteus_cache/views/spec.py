"""What makes the views of a cache: augmentation, size, encoding, seed and pixel statistics."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError

Augment: TypeAlias = Literal["deit", "none"]
ViewFormat: TypeAlias = Literal["jpeg", "png"]

MAX_SIZE_PX = 4096
MIN_SIZE_PX = 8
_VIEW = re.compile(r"v[0-9]{3,6}|probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """Every setting that changes a view; the same for all views of a cache."""

    augment: Augment = "deit"
    """`deit`: random crop, flip, RandAugment and erasing as DeiT trains; `none`: the image's centre."""
    size_px: int = 224
    """Side of the square view."""
    view_format: ViewFormat = "jpeg"
    """`jpeg`: quality 95, 4:4:4; `png`: lossless."""
    seed: int = 0
    """The cache's seed: with another one every recipe is another."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """The teacher's pixel mean in 0 to 1: of erasing noise, and the colour of what ops leave empty."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """The teacher's pixel standard deviation in 0 to 1: of the erasing noise."""

    def __post_init__(self) -> None:
        check_names(self.augment, self.view_format)
        if not MIN_SIZE_PX <= self.size_px <= MAX_SIZE_PX:
            raise ConfigError(f"size_px must be from {MIN_SIZE_PX} to {MAX_SIZE_PX}, got {self.size_px}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean):
            raise ConfigError(f"mean must be three numbers from 0 to 1, got {self.mean}")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ConfigError(f"std must be three numbers above 0, got {self.std}")


def check_names(augment: str | None, view_format: str | None) -> None:
    """Refuse what is no augmentation or no format of views; None passes.

    Raises:
        ConfigError: names the nearest that there is.
    """
    if augment is not None and augment not in get_args(Augment):
        raise ConfigError(unknown("augment", augment, get_args(Augment)))
    if view_format is not None and view_format not in get_args(ViewFormat):
        raise ConfigError(unknown("view format", view_format, get_args(ViewFormat)))


def check_view(view: str) -> None:
    """Raise ValueError unless `view` is the name of a view index: `v000`, `v001`, ... or `probe`."""
    if not _VIEW.fullmatch(view):
        raise ValueError(f"a view index is named v000, v001, ... or probe, got {view!r}")
