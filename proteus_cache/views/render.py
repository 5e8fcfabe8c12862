"""Rendering: apply a recipe to an image and give the view's pixels.

The ops are Pillow's, called with explicit arguments exactly as timm calls them (tests compare each with
timm's function, pixel by pixel), so a worker that renders needs neither timm nor torch in its memory.

timm erases the normalised float tensor: its noise has no bound. So does `render_normalised`, whose views are never
stored. Deviation of stored views, from `render`: the same noise, times the pixel standard deviation, plus the mean,
rounded and clipped to 0..255.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from proteus_cache.views.recipe import Erasing, Op, OpName, Recipe
from proteus_cache.views.spec import ViewSpec

Pixels: TypeAlias = NDArray[np.uint8]
Values: TypeAlias = NDArray[np.float32]
Colour: TypeAlias = tuple[int, int, int]

_BICUBIC = Image.Resampling.BICUBIC
_LEVELS = 1 << 16


def render(image: Image.Image, recipe: Recipe, spec: ViewSpec) -> Pixels:
    """The view that `recipe` describes.

    Args:
        image: the source, mode RGB; left as it is.
        recipe: drawn for this image's size.
        spec: size, mean and standard deviation are used.

    Returns:
        (H, W, 3) uint8, contiguous and writable, H = W = `spec.size_px`.

    Raises:
        ValueError: the recipe was drawn for an image of another size.
    """
    pixels = _render_whole(image, recipe, spec)
    if recipe.erasing:
        erase(pixels, recipe.erasing, spec.mean, spec.std)
    return pixels


def render_normalised(image: Image.Image, recipe: Recipe, spec: ViewSpec) -> Values:
    """The view that `recipe` describes, normalised before a box of it is erased, as the published training does.

    Args:
        image: the source, mode RGB; left as it is.
        recipe: drawn for this image's size.
        spec: size, mean and standard deviation are used.

    Returns:
        (H, W, 3) float32, contiguous and writable: pixels over 255, minus mean, over standard deviation.

    Raises:
        ValueError: the recipe was drawn for an image of another size.
    """
    pixels = _render_whole(image, recipe, spec)
    table = _normal_table(spec.mean, spec.std)
    values: Values = np.stack([table[channel][pixels[..., channel]] for channel in range(3)], axis=-1)
    if recipe.erasing:
        erase_normalised(values, recipe.erasing)
    return values


def _render_whole(image: Image.Image, recipe: Recipe, spec: ViewSpec) -> Pixels:
    """The view with nothing erased."""
    view = _resize(image, recipe, spec.size_px)
    if recipe.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    fill = fill_colour(spec.mean)
    for op in recipe.ops:
        view = apply_op(view, op, fill)
    return np.array(view)


def fill_colour(mean: tuple[float, float, float]) -> Colour:
    """The colour of what an op moves in from outside: the pixel mean."""
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return red, green, blue


def apply_op(image: Image.Image, op: Op, fill: Colour) -> Image.Image:
    """One RandAugment op on an RGB image, equal to timm's function of that name."""
    if op.argument is None:
        return _PLAIN[op.name](image)
    if op.name in _MOVES:
        return _MOVES[op.name](image, float(op.argument), fill)
    return _STRENGTHS[op.name](image, op.argument)


def erase(pixels: Pixels, erasing: Erasing, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Fill the box with noise, in place.

    The words of Philox 4x64 under the key `seed` are cut into 16-bit numbers u (little-endian, the low ones
    first), one for each channel of each pixel, row by row; u stands for the quantile (u + 1/2) / 65536 of the
    normal distribution with the channel's mean and standard deviation, times 255, rounded and clipped to
    0..255.
    """
    levels = _noise_levels(erasing)
    table = _noise_table(mean, std)
    area = _erased(pixels, erasing)
    for channel in range(3):
        area[..., channel] = table[channel][levels[..., channel]]


def erase_normalised(values: Values, erasing: Erasing) -> None:
    """Fill the box of a normalised view with the same noise in place, but with mean 0 and standard deviation 1, neither
    rounded nor clipped."""
    _erased(values, erasing)[...] = _quantiles()[_noise_levels(erasing)]


_Array = TypeVar("_Array", Pixels, Values)


def _erased(view: _Array, erasing: Erasing) -> _Array:
    """The part of a view that is erased."""
    box = erasing.box
    return view[box.top : box.top + box.height, box.left : box.left + box.width]


def _noise_levels(erasing: Erasing) -> NDArray[np.uint16]:
    """(height, width, 3) 16-bit numbers of the box."""
    box = erasing.box
    n = box.height * box.width * 3
    words = np.random.Philox(key=erasing.seed).random_raw((n + 3) // 4)
    levels: NDArray[np.uint16] = words.astype("<u8", copy=False).view("<u2")[:n].reshape(box.height, box.width, 3)
    return levels


@lru_cache(maxsize=1)
def _quantiles() -> NDArray[np.float64]:
    """(65536,): the quantile of the standard normal distribution that each 16-bit number stands for."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse((level + 0.5) / _LEVELS) for level in range(_LEVELS)])


@lru_cache(maxsize=4)
def _noise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """(3, 65536) uint8: what each 16-bit number stands for in each channel."""
    values = (_quantiles() * np.array(std)[:, None] + np.array(mean)[:, None]) * 255
    table: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return table


@lru_cache(maxsize=4)
def _normal_table(mean: tuple[float, ...], std: tuple[float, ...]) -> Values:
    """(3, 256) float32: the normalised value of each level of each channel, as `pixels.normalise` computes it."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    table: Values = (levels - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    return table


def _resize(image: Image.Image, recipe: Recipe, size_px: int) -> Image.Image:
    """Crop, resize and cut in three steps, as torchvision does.

    One step with Pillow's `box` gives other pixels: those outside of the crop weigh in at its edges, and the
    order of the two passes can change.
    """
    crop = recipe.crop
    right, bottom = crop.left + crop.width, crop.top + crop.height
    if right > image.width or bottom > image.height:
        raise ValueError(f"a recipe for another image: {crop} reaches out of {image.width} x {image.height} pixels")
    left, top = recipe.cut
    if left + size_px > recipe.resized[0] or top + size_px > recipe.resized[1]:
        raise ValueError(f"a recipe for another size: {size_px} at {recipe.cut} reaches out of {recipe.resized}")
    if (crop.width, crop.height) != image.size:
        image = image.crop((crop.left, crop.top, right, bottom))
    image = image.resize(recipe.resized, _BICUBIC)
    if recipe.resized == (size_px, size_px):
        return image
    return image.crop((left, top, left + size_px, top + size_px))


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Colour) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=_BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    table = [min(255, level + int(amount)) if level < 128 else level for level in range(256)]
    return image.point(table * 3)


_PLAIN: Final[dict[OpName, Callable[[Image.Image], Image.Image]]] = {
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
}

_STRENGTHS: Final[dict[OpName, Callable[[Image.Image, float], Image.Image]]] = {
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "solarize_add": _solarize_add,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}

_MOVES: Final[dict[OpName, Callable[[Image.Image, float, Colour], Image.Image]]] = {
    "rotate": lambda image, degrees, fill: image.rotate(degrees, resample=_BICUBIC, fillcolor=fill),
    "shear_x": lambda image, shear, fill: _affine(image, (1, shear, 0, 0, 1, 0), fill),
    "shear_y": lambda image, shear, fill: _affine(image, (1, 0, 0, shear, 1, 0), fill),
    "translate_x_rel": lambda image, share, fill: _affine(image, (1, 0, share * image.width, 0, 1, 0), fill),
    "translate_y_rel": lambda image, share, fill: _affine(image, (1, 0, 0, 0, 1, share * image.height), fill),
}
