"""Rendering: apply a recipe to an image and give the view's pixels.

The ops are Pillow's, called with explicit arguments exactly as timm calls them (tests compare each with
timm's function, pixel by pixel), so a worker that renders needs neither timm nor torch in its memory.

Deviation from timm: erasing fills a box of the uint8 view with normal noise of the pixel mean and standard
deviation, clipped to 0..255, where timm fills the normalised float tensor without a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from proteus_cache.views.recipe import Erasing, Op, OpName, Recipe
from proteus_cache.views.spec import ViewSpec

Pixels: TypeAlias = NDArray[np.uint8]
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
    view = _resize(image, recipe, spec.size_px)
    if recipe.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    fill = fill_colour(spec.mean)
    for op in recipe.ops:
        view = apply_op(view, op, fill)
    pixels: Pixels = np.array(view)
    if recipe.erasing:
        erase(pixels, recipe.erasing, spec.mean, spec.std)
    return pixels


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
    box = erasing.box
    n = box.height * box.width * 3
    words = np.random.Philox(key=erasing.seed).random_raw((n + 3) // 4)
    levels = words.astype("<u8", copy=False).view("<u2")[:n].reshape(box.height, box.width, 3)
    table = _noise_table(mean, std)
    area = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    for channel in range(3):
        area[..., channel] = table[channel][levels[..., channel]]


@lru_cache(maxsize=4)
def _noise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """(3, 65536) uint8: what each 16-bit number stands for in each channel."""
    inverse = NormalDist().inv_cdf
    quantiles = np.array([inverse((level + 0.5) / _LEVELS) for level in range(_LEVELS)])
    values = (quantiles * np.array(std)[:, None] + np.array(mean)[:, None]) * 255
    table: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
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
