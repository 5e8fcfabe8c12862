"""Rendering equals timm, torchvision and Pillow pixel by pixel, at every extreme, down to one pixel."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional as tv
from torchvision.transforms.transforms import CenterCrop, Resize

from proteus_cache.views.recipe import OP_NAMES, Box, Erasing, OpName, Recipe, draw_recipe, resolve_op
from proteus_cache.views.render import apply_op, erase, erase_normalised, fill_colour, render, render_normalised
from proteus_cache.views.spec import ViewSpec

SPEC = ViewSpec()
FILL = fill_colour(SPEC.mean)
BICUBIC = tv.InterpolationMode.BICUBIC


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that every op has something to change."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + draws.integers(-20, 21, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def timms_op(image: Image.Image, name: OpName, *arguments: float | int) -> NDArray[np.uint8]:
    function = getattr(auto_augment, name)
    return np.array(function(image, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC))


def timms_view(image: Image.Image, recipe: Recipe, size_px: int) -> NDArray[np.uint8]:
    """The recipe without its erasing, by the functions that timm's transform calls."""
    crop = recipe.crop
    view = tv.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [size_px, size_px], BICUBIC)
    if recipe.flip:
        view = tv.hflip(view)
    for op in recipe.ops:
        arguments = () if op.argument is None else (op.argument,)
        view = Image.fromarray(timms_op(view, op.name, *arguments))
    return np.array(view)


SUBJECTS = {
    "picture": picture(64, 48),
    "one pixel": picture(1, 1),
    "a line": picture(40, 1),
    "black": Image.new("RGB", (16, 16)),
    "white": Image.new("RGB", (16, 16), (255, 255, 255)),
    "two levels": Image.fromarray(np.repeat(np.array([[[0], [255]]], dtype=np.uint8), 3, axis=2)),
}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", OP_NAMES)
def test_every_op_at_both_extremes_equals_timms(name: OpName, subject: str) -> None:
    image = SUBJECTS[subject]
    before = image.tobytes()
    for magnitude, negate in itertools.product((0.0, 5.0, 9.0, 10.0), (False, True)):
        op = resolve_op(name, magnitude, negate)

        ours = apply_op(image, op, FILL)

        assert (ours.mode, ours.size) == ("RGB", image.size)
        arguments = () if op.argument is None else (op.argument,)
        assert np.array_equal(np.asarray(ours), timms_op(image, name, *arguments))
    assert image.tobytes() == before


def test_whole_recipes_equal_timms_steps() -> None:
    image = picture(150, 110)
    n_ops = 0
    for number in range(150):
        drawn = draw_recipe(ViewSpec(size_px=64), f"key_{number}", "v000", 150, 110)
        recipe = drawn.model_copy(update={"erasing": None})

        assert np.array_equal(render(image, recipe, ViewSpec(size_px=64)), timms_view(image, recipe, 64))
        n_ops += len(recipe.ops)
    assert n_ops > 100


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (97, 97), (50, 200), (500, 333), (333, 500)])
@pytest.mark.parametrize("size_px", [32, 224])
def test_no_augmentation_equals_torchvisions_resize_and_centre_crop(width: int, height: int, size_px: int) -> None:
    spec = ViewSpec(augment="none", size_px=size_px)
    image = picture(width, height)

    ours = render(image, draw_recipe(spec, "key", "v000", width, height), spec)

    steps = [Resize(size_px * 8 // 7, interpolation=BICUBIC), CenterCrop(size_px)]
    expected = image
    for step in steps:
        expected = step(expected)
    assert np.array_equal(ours, np.asarray(expected))


@pytest.mark.parametrize(("width", "height"), [(1, 10_000), (10_000, 1), (3, 900)])
def test_no_augmentation_of_a_strip_shows_its_middle(width: int, height: int) -> None:
    spec = ViewSpec(augment="none", size_px=224)
    image = Image.new("RGB", (width, height))
    middle = (width // 2, height // 2)
    image.putpixel(middle, (255, 255, 255))

    pixels = render(image, draw_recipe(spec, "key", "v000", width, height), spec)

    assert pixels.shape == (224, 224, 3)
    assert pixels.max() > 240


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 2), (2, 1), (1, 3_000), (3, 2)])
def test_images_of_few_pixels_render_under_every_recipe(width: int, height: int) -> None:
    spec = ViewSpec(size_px=32)
    image = picture(width, height)
    for number in range(60):
        pixels = render(image, draw_recipe(spec, f"key_{number}", "v000", width, height), spec)
        assert pixels.shape == (32, 32, 3)


def test_view_is_contiguous_writable_and_leaves_the_source() -> None:
    image = picture(40, 30)
    before = image.tobytes()

    pixels = render(image, draw_recipe(SPEC, "key", "v000", 40, 30), SPEC)

    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert image.tobytes() == before


def test_whole_image_at_its_own_size_is_left_as_it_is() -> None:
    image = picture(32, 32)
    before = image.tobytes()
    whole = Box(left=0, top=0, width=32, height=32)
    erasing = Erasing(box=whole, seed=1)
    recipe = Recipe(crop=whole, resized=(32, 32), cut=(0, 0), flip=False, ops=(), erasing=erasing)

    pixels = render(image, recipe, ViewSpec(size_px=32))

    assert image.tobytes() == before
    assert not np.array_equal(pixels, np.asarray(image))


def test_recipe_of_another_image_is_refused() -> None:
    recipe = draw_recipe(SPEC, "key", "v000", 500, 375)

    with pytest.raises(ValueError, match="a recipe for another image"):
        render(picture(50, 40), recipe, SPEC)


def test_recipe_of_another_size_is_refused() -> None:
    recipe = draw_recipe(ViewSpec(size_px=32), "key", "v000", 50, 40)

    with pytest.raises(ValueError, match="a recipe for another size: 64 at"):
        render(picture(50, 40), recipe, ViewSpec(size_px=64))


def erased(seed: int, box: Box, spec: ViewSpec = SPEC, side: int = 64) -> NDArray[np.uint8]:
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    erase(pixels, Erasing(box=box, seed=seed), spec.mean, spec.std)
    return pixels


def test_erasing_fills_its_box_and_nothing_else() -> None:
    box = Box(left=5, top=9, width=31, height=17)

    pixels = erased(3, box)

    outside = np.ones(pixels.shape[:2], dtype=bool)
    outside[9:26, 5:36] = False
    assert not pixels[outside].any()
    assert (pixels[~outside] > 0).mean() > 0.95


def test_erasing_noise_is_pinned() -> None:
    """The noise is part of a recipe's meaning: it must not change with numpy or the machine."""
    pixels = erased(2**53 - 1, Box(left=0, top=0, width=63, height=63))

    assert (
        hashlib.sha256(pixels.tobytes()).hexdigest()
        == "a23cbee9f856c412a370a64754d81973cc7c288730ff244a1778ce9d111708fe"
    )


def test_erasing_noise_follows_the_specification() -> None:
    from statistics import NormalDist

    box = Box(left=0, top=0, width=3, height=1)
    words = np.random.Philox(key=11).random_raw(3).tolist()
    levels = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)][:9]
    statistics = [(SPEC.mean[channel], SPEC.std[channel]) for _ in range(3) for channel in range(3)]
    expected = [
        min(255, max(0, round((NormalDist().inv_cdf((level + 0.5) / 65536) * std + mean) * 255)))
        for level, (mean, std) in zip(levels, statistics, strict=True)
    ]

    assert erased(11, box)[0, :3].reshape(-1).tolist() == expected


def test_erasing_noise_is_timms_rounded_and_clipped() -> None:
    side = 200
    ours = erased(1, Box(left=0, top=0, width=side, height=side), side=side)
    normal = torch.randn((side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
    theirs = ((normal * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()

    n = side * side
    for channel in range(3):
        counts = [np.bincount(pixels[..., channel].reshape(-1), minlength=256) for pixels in (ours, theirs)]
        gap = np.abs(np.cumsum(counts[0]) - np.cumsum(counts[1])).max() / n
        # Two-sample Kolmogorov-Smirnov: the gap that equal distributions pass once in 10,000 samples.
        assert gap < math.sqrt(-math.log(1e-4 / 2) / n)
    correlation = np.corrcoef(ours.reshape(n, 3).T)
    assert np.abs(correlation - np.eye(3)).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**53 - 1])
def test_noise_of_one_pixel_box(seed: int) -> None:
    assert erased(seed, Box(left=63, top=63, width=1, height=1))[:63].sum() == 0


def test_fill_and_noise_take_the_teachers_statistics() -> None:
    spec = ViewSpec(mean=(0.5, 0.5, 0.5), std=(1e-6, 1e-6, 1e-6))

    pixels = erased(0, Box(left=0, top=0, width=64, height=64), spec)

    assert set(np.unique(pixels).tolist()) <= {127, 128}


def test_rendering_draws_from_no_global_generator() -> None:
    before = np.random.get_state(legacy=True), torch.get_rng_state()
    image = picture(40, 30)

    for number in range(40):
        render(image, draw_recipe(SPEC, f"key_{number}", "v000", 40, 30), SPEC)

    after = np.random.get_state(legacy=True)
    assert repr(after) == repr(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_normalised_view_is_the_view_as_torchvision_normalises_it() -> None:
    image, spec = picture(200, 150), ViewSpec(size_px=48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    drawn = (draw_recipe(spec, "key", f"v{number:03d}", 200, 150) for number in range(60))
    recipe = next(recipe for recipe in drawn if recipe.erasing is None)

    values = render_normalised(image, recipe, spec)

    expected = tv.normalize(tv.to_tensor(render(image, recipe, spec)), list(spec.mean), list(spec.std))
    np.testing.assert_allclose(values, expected.permute(1, 2, 0).numpy(), atol=1e-6)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.flags.writeable


def test_a_normalised_view_is_erased_after_normalising_and_nowhere_else() -> None:
    image, spec = picture(200, 150), ViewSpec(size_px=48)
    drawn = (draw_recipe(spec, "key", f"v{number:03d}", 200, 150) for number in range(60))
    recipe = next(recipe for recipe in drawn if recipe.erasing is not None)
    assert recipe.erasing is not None

    values = render_normalised(image, recipe, spec)

    whole = render_normalised(image, recipe.model_copy(update={"erasing": None}), spec)
    box = recipe.erasing.box
    inside = np.zeros(values.shape[:2], bool)
    inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
    assert np.array_equal(values[~inside], whole[~inside])
    assert (values[inside] != whole[inside]).mean() > 0.99


def test_noise_of_a_normalised_view_is_standard_normal_and_has_no_bound() -> None:
    """As timm's RandomErasing in mode "pixel": each channel of each pixel for itself."""
    values = np.zeros((96, 96, 3), np.float32)
    erase_normalised(values, Erasing(box=Box(left=0, top=0, width=96, height=96), seed=5))

    assert abs(values.mean()) < 3 / values.size**0.5
    assert abs(values.std() - 1) < 3 / (2 * values.size) ** 0.5
    assert values.min() < -3.3  # below what black is for any of the usual teachers
    assert values.max() > 3.3
    correlation = np.corrcoef(values.reshape(-1, 3).T)
    assert np.abs(correlation - np.eye(3)).max() < 4 / 96


def test_stored_noise_is_that_of_normalised_views_rounded_and_clipped() -> None:
    box = Box(left=0, top=0, width=64, height=64)
    values = np.zeros((64, 64, 3), np.float32)
    erase_normalised(values, Erasing(box=box, seed=11))

    unbounded = (values.astype(np.float64) * np.array(SPEC.std) + np.array(SPEC.mean)) * 255

    expected = np.clip(np.rint(unbounded), 0, 255).astype(np.uint8)
    assert (erased(11, box) != expected).mean() < 1e-3  # float32 against float64 where a half is rounded
    assert np.abs(erased(11, box).astype(int) - expected).max() <= 1


def test_normalised_noise_is_pinned() -> None:
    """A resumed run must see the same, with any numpy and on any machine."""
    values = np.zeros((63, 63, 3), np.float32)
    erase_normalised(values, Erasing(box=Box(left=0, top=0, width=63, height=63), seed=2**53 - 1))

    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == "64e9ef72ab64b5cd"
