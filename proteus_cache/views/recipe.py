"""Recipes: what makes one view of one image, drawn from (seed, key, view index, width, height) alone.

The distributions are those of timm's `create_transform(size, is_training=True, interpolation="bicubic",
auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", re_count=1)`, which DeiT and Proteus train
with. The random numbers are our own counter-based stream, because those of Python, numpy and torch are global
state or change between versions. Ops are recorded with their resolved argument, so a recipe can be rendered
without a draw.

Deviations, each by name:
    posterize-one-bit     timm draws 0 bits now and then, which Pillow refuses: 1 bit is kept instead
    crop-one-pixel        timm draws crops without area from images of a few pixels: such a try is repeated
    centre-of-a-strip     `none` takes the central 4 to 1 part of an image that is longer, then as torchvision
    magnitude-six-digits  magnitudes are rounded to six decimals, so that the last bit of libm cannot show

Source: timm 1.0.31, data/transforms.py, data/auto_augment.py, data/random_erasing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, get_args

from pydantic import Field, ValidationError, model_validator

from proteus_cache.documents import Document, canonical
from proteus_cache.errors import FormatError
from proteus_cache.views.draws import Draws
from proteus_cache.views.spec import MAX_SIZE_PX, ViewSpec, check_view

OpName: TypeAlias = Literal[
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x_rel",
    "translate_y_rel",
]
OP_NAMES: Final[tuple[OpName, ...]] = get_args(OpName)
"""RandAugment's 15 ops in timm's order, by the names of timm's functions."""

MAX_MAGNITUDE = 10.0

_WITHOUT_ARGUMENT: Final = frozenset({"auto_contrast", "equalize", "invert"})

_CROP_AREA = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_FLIP_PROBABILITY = 0.5
_N_OPS = 2
_OP_PROBABILITY = 0.5
_MAGNITUDE = 9.0
_MAGNITUDE_STD = 0.5
_ERASE_PROBABILITY = 0.25
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 1 / 0.3)
_TRIES = 10
_LONGEST = 4
_NOISE_SEEDS = 2**53

_Pixels: TypeAlias = Annotated[int, Field(ge=1)]
_Resized: TypeAlias = Annotated[int, Field(ge=1, le=5 * MAX_SIZE_PX)]
_Offset: TypeAlias = Annotated[int, Field(ge=0)]


class Box(Document):
    """A rectangle of whole pixels."""

    left: _Offset
    top: _Offset
    width: _Pixels
    height: _Pixels


class Op(Document):
    """One RandAugment op with the argument that timm's function of that name takes."""

    name: OpName
    argument: int | Annotated[float, Field(allow_inf_nan=False)] | None
    """Degrees, bits, threshold, amount, factor, shear or share of the side; None where the op takes none."""

    @model_validator(mode="after")
    def _has_its_argument(self) -> Self:
        if (self.argument is None) != (self.name in _WITHOUT_ARGUMENT):
            raise ValueError(f"{self.name} with argument {self.argument}")
        return self


class Erasing(Document):
    """A box of the view that is filled with noise."""

    box: Box
    seed: Annotated[int, Field(ge=0, lt=_NOISE_SEEDS)]


class Recipe(Document):
    """How one view is made: crop, resize, cut, flip, ops, erasing, in this order."""

    crop: Box
    """What is taken of the source image."""
    resized: tuple[_Resized, _Resized]
    """(width, height) that the crop is resized to, bicubic."""
    cut: tuple[_Offset, _Offset]
    """(left, top) of the view in the resized crop."""
    flip: bool
    """Left and right are exchanged."""
    ops: tuple[Op, ...]
    erasing: Erasing | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            FormatError: a field is missing, unknown or out of its range.
        """
        try:
            return cls.model_validate_json(canonical(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise FormatError(f"recipe: {where}: {first['msg']}") from error
        except ValueError as error:
            raise FormatError(f"recipe: {error}") from error


def draw_recipe(spec: ViewSpec, key: str, view: str, width: int, height: int) -> Recipe:
    """Draw how view index `view` of an image is made; a pure function of its arguments.

    Args:
        spec: augmentation, size and seed are used.
        key: the image's sample key.
        view: `v000`, `v001`, ... or `probe`.
        width, height: the source image's sides in pixels.
    """
    check_view(view)
    if spec.augment == "none":
        return _centre(spec.size_px, width, height)
    draws = Draws(spec.seed, key, view)
    return Recipe(
        crop=_draw_crop(draws, width, height),
        resized=(spec.size_px, spec.size_px),
        cut=(0, 0),
        flip=draws.uniform() < _FLIP_PROBABILITY,
        ops=_draw_ops(draws),
        erasing=_draw_erasing(draws, spec.size_px),
    )


def resolve_op(name: OpName, magnitude: float, negate: bool) -> Op:
    """The op at a magnitude from 0 to 10, in timm's increasing form.

    Args:
        name: one of `OP_NAMES`.
        magnitude: strength, 10 the most.
        negate: turn, shear, shift or weaken to the other side; without effect on ops that have no sides.
    """
    return Op(name=name, argument=_ARGUMENTS[name](magnitude / MAX_MAGNITUDE, -1.0 if negate else 1.0))


_Argument: TypeAlias = Callable[[float, float], int | float | None]


def _none(_share: float, _sign: float) -> None:
    return None


def _scaled(largest: float) -> _Argument:
    return lambda share, sign: sign * (share * largest)


def _factor(share: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * (share * 0.9))


_ARGUMENTS: Final[dict[OpName, _Argument]] = {
    "auto_contrast": _none,
    "equalize": _none,
    "invert": _none,
    "rotate": _scaled(30.0),
    "posterize": lambda share, _: max(1, 4 - int(share * 4)),
    "solarize": lambda share, _: 256 - min(256, int(share * 256)),
    "solarize_add": lambda share, _: min(128, int(share * 110)),
    "color": _factor,
    "contrast": _factor,
    "brightness": _factor,
    "sharpness": _factor,
    "shear_x": _scaled(0.3),
    "shear_y": _scaled(0.3),
    "translate_x_rel": _scaled(0.45),
    "translate_y_rel": _scaled(0.45),
}
"""Argument from (magnitude / 10, sign), written as timm writes it, so that results are bit-equal."""


def _centre(size_px: int, width: int, height: int) -> Recipe:
    """Shorter side to 256/224 of the size, centre cut, as torchvision's Resize and CenterCrop."""
    longest = _LONGEST * min(width, height)
    crop = _central_box(min(width, longest), min(height, longest), width, height)
    side = size_px * 8 // 7
    resized = (side, int(side * crop.height / crop.width))
    if crop.width > crop.height:
        resized = (int(side * crop.width / crop.height), side)
    cut = (round((resized[0] - size_px) / 2), round((resized[1] - size_px) / 2))
    return Recipe(crop=crop, resized=resized, cut=cut, flip=False, ops=(), erasing=None)


def _central_box(box_width: int, box_height: int, width: int, height: int) -> Box:
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return Box(left=left, top=top, width=box_width, height=box_height)


def _draw_crop(draws: Draws, width: int, height: int) -> Box:
    area = width * height
    log_ratio = (math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1]))
    for _ in range(_TRIES):
        target_area = draws.between(*_CROP_AREA) * area
        ratio = math.exp(draws.between(*log_ratio))
        crop_width = round(math.sqrt(target_area * ratio))
        crop_height = round(math.sqrt(target_area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = draws.below(height - crop_height + 1)
            left = draws.below(width - crop_width + 1)
            return Box(left=left, top=top, width=crop_width, height=crop_height)
    return _central_crop(width, height)


def _central_crop(width: int, height: int) -> Box:
    """The largest centred crop whose ratio is allowed."""
    low, high = _CROP_RATIO
    crop_width, crop_height = width, height
    if width / height < low:
        crop_height = round(width / low)
    elif width / height > high:
        crop_width = round(height * high)
    return _central_box(crop_width, crop_height, width, height)


def _draw_ops(draws: Draws) -> tuple[Op, ...]:
    names = [OP_NAMES[draws.below(len(OP_NAMES))] for _ in range(_N_OPS)]
    return tuple(_draw_op(draws, name) for name in names if draws.uniform() <= _OP_PROBABILITY)


def _draw_op(draws: Draws, name: OpName) -> Op:
    magnitude = round(_MAGNITUDE + _MAGNITUDE_STD * draws.normal(), 6)
    negate = draws.uniform() > 0.5
    return resolve_op(name, max(0.0, min(magnitude, MAX_MAGNITUDE)), negate)


def _draw_erasing(draws: Draws, size_px: int) -> Erasing | None:
    if draws.uniform() > _ERASE_PROBABILITY:
        return None
    log_ratio = (math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1]))
    for _ in range(_TRIES):
        target_area = draws.between(*_ERASE_AREA) * size_px * size_px
        ratio = math.exp(draws.between(*log_ratio))
        height = round(math.sqrt(target_area * ratio))
        width = round(math.sqrt(target_area / ratio))
        if 0 < width < size_px and 0 < height < size_px:
            top = draws.below(size_px - height + 1)
            left = draws.below(size_px - width + 1)
            box = Box(left=left, top=top, width=width, height=height)
            return Erasing(box=box, seed=draws.below(_NOISE_SEEDS))
    return None
