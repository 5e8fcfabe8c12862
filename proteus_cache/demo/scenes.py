"""Labelled images drawn from a seed, so that a first run needs no data set.

A scene is one textured shape on a patterned background, with things in front of it. Its class is the texture
of the shape; shape, colours, place, size, turn, light, background, occluders and noise say nothing about it, so
untrained features, which mostly tell colours apart, find few neighbours of the right class. The same seed draws
the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field: TypeAlias = NDArray[np.float32]
"""(H, W): one number for every pixel."""

SIDE_PX: Final = 144
"""Side of the square images that are written to disk."""
_JPEG_QUALITY: Final = 92
_JPEG_ERROR: Final = 12.0
"""Mean absolute error, of 255, that a scene read from its file stays below (7 seen); two scenes differ by over 35."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One drawn image with what is known of it."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    shape_mask: NDArray[np.bool_]
    """(H, W): where the shape is seen; occluded parts are not."""
    occluder_mask: NDArray[np.bool_]
    """(H, W): where something stands in front."""


def draw_scene(label: int, random: np.random.Generator, side_px: int = SIDE_PX) -> Scene:
    """Draw one image of a class.

    Args:
        label: index into `CLASSES`.
        random: fixes everything else.
        side_px: side of the square image; sizes follow it.
    """
    texture, shape = CLASSES[label], list(SHAPES)[int(random.integers(len(SHAPES)))]
    y, x = np.mgrid[0:side_px, 0:side_px].astype(np.float32)
    ground = _pick_colour(random)
    colours = _colours_apart(random, ground)
    canvas = _background(x, y, ground, side_px, random)

    radius_px = side_px * random.uniform(0.32, 0.46)
    centre = side_px * random.uniform(0.4, 0.6, 2)
    u, v = _turned(x - centre[0], y - centre[1], random.uniform(-0.35, 0.35))
    cover = _cover(SHAPES[shape](u / radius_px, v / radius_px) * radius_px)
    along, across = _turned(x - centre[0], y - centre[1], random.uniform(-0.35, 0.35))
    period_px = side_px * random.uniform(0.1, 0.15)
    share = np.clip(TEXTURES[texture](along / period_px, across / period_px), 0, 1)[..., None]
    filling = colours[0] + share * (colours[1] - colours[0])
    canvas += cover[..., None] * (filling - canvas)

    hidden = np.zeros((side_px, side_px), np.float32)
    for _ in range(random.integers(0, 3)):
        stripe = _occluder(x, y, side_px, random)
        canvas += stripe[..., None] * (_pick_colour(random) - canvas)
        hidden = np.maximum(hidden, stripe)

    tilt = random.uniform(-0.35, 0.35, 2) / side_px
    light = 1 + tilt[0] * (x - side_px / 2) + tilt[1] * (y - side_px / 2)
    noise = random.standard_normal((side_px, side_px, 3), np.float32) * random.uniform(2, 9)
    pixels = np.clip(canvas * light[..., None] + noise, 0, 255).astype(np.uint8)
    return Scene(pixels, (cover > 0.5) & (hidden <= 0.5), hidden > 0.5)


def is_scene(path: Path, label: int, seed: int) -> bool:
    """Whether an image is the first one of a class in a set of this seed, but for what JPEG makes of it."""
    scene = draw_scene(label, np.random.default_rng([seed, label, 0])).pixels
    with Image.open(path) as image:
        found = np.asarray(image.convert("RGB"), dtype=np.float32)
    return found.shape == scene.shape and float(np.abs(found - scene).mean()) < _JPEG_ERROR


def write_scenes(folder: Path, *, per_class: int, seed: int, progress: Callable[[int, int], None] | None = None) -> int:
    """Write JPEG files in class folders; those that are there are kept.

    Args:
        folder: gets a folder for each of `CLASSES`.
        per_class: images of each.
        seed: of the set; image `i` of a class does not depend on `per_class`.
        progress: called with images done and in all.

    Returns:
        Number of images in the set.
    """
    n_images, done = per_class * len(CLASSES), 0
    for label, name in enumerate(CLASSES):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            path = target / f"{name}_{index:04d}.jpg"
            if not path.exists():
                scene = draw_scene(label, np.random.default_rng([seed, label, index]))
                # Renamed last, so that a killed run leaves no torn image under its name.
                unfinished = path.with_suffix(".part")
                Image.fromarray(scene.pixels).save(unfinished, "JPEG", quality=_JPEG_QUALITY)
                unfinished.replace(path)
            done += 1
            if progress is not None:
                progress(done, n_images)
    return n_images


def _pick_colour(random: np.random.Generator) -> Field:
    return random.uniform(25, 230, 3).astype(np.float32)


def _colours_apart(random: np.random.Generator, ground: Field) -> tuple[Field, Field]:
    """Two colours that differ from each other and from the background, or shape and texture could not be seen."""
    while True:
        first, second = _pick_colour(random), _pick_colour(random)
        if min(np.abs(first - ground).max(), np.abs(second - ground).max()) > 60 and np.abs(first - second).max() > 90:
            return first, second


def _turned(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return _field(x * cos + y * sin), _field(y * cos - x * sin)


def _cover(inside_px: Field) -> Field:
    """Share of each pixel that is covered, from the distance to the edge (positive inside)."""
    return _field(np.clip(inside_px + 0.5, 0, 1))


def _field(values: NDArray[np.floating]) -> Field:
    return np.asarray(values, np.float32)


def _background(x: Field, y: Field, ground: Field, side_px: int, random: np.random.Generator) -> NDArray[np.float32]:
    """(H, W, 3): a colour with clouds and, often, a faint texture like those of the shapes."""
    n_cells = int(random.integers(3, 7))
    cells = random.uniform(-1, 1, (n_cells, n_cells, 3)).astype(np.float32)
    clouds = np.stack(
        [
            np.asarray(Image.fromarray(cells[..., channel]).resize((side_px, side_px), Image.Resampling.BICUBIC))
            for channel in range(3)
        ],
        axis=-1,
    )
    canvas = ground + 22 * clouds
    if random.uniform() < 0.5:
        texture = CLASSES[int(random.integers(len(CLASSES)))]
        along, across = _turned(x, y, random.uniform(0, 2 * np.pi))
        period_px = side_px * random.uniform(0.06, 0.2)
        share = np.clip(TEXTURES[texture](along / period_px, across / period_px), 0, 1)[..., None]
        canvas += share * random.uniform(-28, 28, 3).astype(np.float32)
    return np.asarray(canvas, np.float32)


def _occluder(x: Field, y: Field, side_px: int, random: np.random.Generator) -> Field:
    """(H, W) cover of a bar or an ellipse at the side of the image."""
    along, across = _turned(x - side_px / 2, y - side_px / 2, random.uniform(0, 2 * np.pi))
    offset = side_px * random.uniform(0.12, 0.42)
    if random.uniform() < 0.5:
        return _cover(side_px * random.uniform(0.03, 0.07) - np.abs(across - offset))
    longer, shorter = side_px * random.uniform(0.1, 0.22), side_px * random.uniform(0.07, 0.14)
    return _cover((1 - np.hypot(along / longer, (across - offset) / shorter)) * shorter)


# Shapes: coordinates in radii to the distance inside the edge, in radii (negative outside).


def _disc(u: Field, v: Field) -> Field:
    return _field(0.82 - np.hypot(u, v))


def _triangle(u: Field, v: Field) -> Field:
    return _field(0.5 - _along_spokes(u, v, 3).max(axis=0))


def _star(u: Field, v: Field) -> Field:
    # A point of a pentagram is on the inner side of at least four of its five lines.
    lines = np.float32(0.37) - _along_spokes(u, v, 5)
    return _field(np.partition(lines, 1, axis=0)[1])


def _cross(u: Field, v: Field) -> Field:
    wide, narrow = np.float32(0.92), np.float32(0.3)
    upright = np.minimum(wide - np.abs(v), narrow - np.abs(u))
    lying = np.minimum(wide - np.abs(u), narrow - np.abs(v))
    return _field(np.maximum(upright, lying))


def _along_spokes(u: Field, v: Field, n_spokes: int) -> NDArray[np.float32]:
    """(n_spokes, H, W): how far each point lies out along directions spread over a full turn."""
    angles = np.arange(n_spokes, dtype=np.float32)[:, None, None] * np.float32(2 * np.pi / n_spokes)
    return np.asarray(u * np.cos(angles) + v * np.sin(angles), np.float32)


# Textures: coordinates in periods to the share of the second colour (clipped to 0..1 by the caller).


def _plain(along: Field, across: Field) -> Field:
    return np.zeros_like(along)


def _striped(along: Field, across: Field) -> Field:
    return _field(0.5 + 3 * np.sin(2 * np.pi * along))


def _banded(along: Field, across: Field) -> Field:
    return _field(0.5 + 3 * np.sin(2 * np.pi * across))


def _checked(along: Field, across: Field) -> Field:
    return _field(0.5 + 6 * np.sin(np.pi * along) * np.sin(np.pi * across))


def _dotted(along: Field, across: Field) -> Field:
    distance = np.hypot(along - np.round(along), across - np.round(across))
    return _field((0.33 - distance) * 10)


def _ringed(along: Field, across: Field) -> Field:
    return _field(0.5 + 3 * np.sin(2 * np.pi * np.hypot(along, across)))


SHAPES: Final[dict[str, Callable[[Field, Field], Field]]] = {
    "cross": _cross,
    "disc": _disc,
    "star": _star,
    "triangle": _triangle,
}
TEXTURES: Final[dict[str, Callable[[Field, Field], Field]]] = {
    "banded": _banded,
    "checked": _checked,
    "dotted": _dotted,
    "plain": _plain,
    "ringed": _ringed,
    "striped": _striped,
}
CLASSES: Final[tuple[str, ...]] = tuple(TEXTURES)
"""Names of the classes, in the order of labels and of sorted folders."""
