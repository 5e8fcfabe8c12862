"""Recipes: pure, pinned, inside the image, and distributed as timm's own transform draws."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torchvision.transforms import InterpolationMode

from proteus_cache.documents import canonical
from proteus_cache.errors import ConfigError, FormatError
from proteus_cache.views.recipe import OP_NAMES, Op, OpName, Recipe, draw_recipe, resolve_op
from proteus_cache.views.render import fill_colour, render
from proteus_cache.views.spec import ViewSpec

SPEC = ViewSpec()

# timm's transforms carry no types.
TimmCrop: Any = RandomResizedCropAndInterpolation
TimmErasing: Any = RandomErasing
TIMM_ARGUMENTS: dict[str, Any] = dict(auto_augment.LEVEL_TO_ARG)

TIMM_NAMES: dict[OpName, str] = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x_rel": "TranslateXRel",
    "translate_y_rel": "TranslateYRel",
}


@pytest.fixture(scope="module")
def timms() -> list[Any]:
    """The steps of timm's own DeiT transform."""
    transform = create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    return list(transform.transforms)


@pytest.fixture
def timm_seed() -> Iterator[None]:
    """Give timm's draws, which come from global generators, a seed, and put the generators back."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    yield
    random.setstate(state)
    np.random.set_state(numpy_state)


def recipes(n: int, width: int = 500, height: int = 375, spec: ViewSpec = SPEC) -> Iterator[Recipe]:
    return (draw_recipe(spec, f"key_{number}", "v000", width, height) for number in range(n))


def assert_same_distribution(ours: list[float], timms: list[float]) -> None:
    """Two-sample Kolmogorov-Smirnov; both samples come from fixed seeds, so the outcome never changes."""
    a, b = np.sort(ours), np.sort(timms)
    points = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, points, side="right") / len(a) - np.searchsorted(b, points, side="right") / len(b))
    # The gap that equal distributions pass once in 10,000 samples.
    assert gap.max() < math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(a) + 1 / len(b)))


def assert_same_share(ours: int, timms: int, n: int) -> None:
    share = (ours + timms) / (2 * n)
    assert abs(ours - timms) / n < 4 * math.sqrt(2 * share * (1 - share) / n) + 1e-9


def test_timms_transform_is_the_one_we_copy(timms: list[Any]) -> None:
    crop, flip, ops, _, _, erasing = timms

    assert [type(step).__name__ for step in timms] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert (ops.num_layers, ops.choice_weights) == (2, None)
    assert [op.name for op in ops.ops] == [TIMM_NAMES[name] for name in OP_NAMES]
    assert {(op.prob, op.magnitude, op.magnitude_std, op.magnitude_max) for op in ops.ops} == {(0.5, 9, 0.5, None)}
    assert ops.ops[0].kwargs == {"fillcolor": fill_colour(SPEC.mean), "resample": Image.Resampling.BICUBIC}
    assert [op.aug_fn.__name__ for op in ops.ops] == list(OP_NAMES)
    assert (erasing.probability, erasing.min_area, erasing.max_area) == (0.25, 0.02, 1 / 3)
    assert erasing.log_aspect_ratio == (math.log(0.3), math.log(1 / 0.3))
    assert (erasing.per_pixel, erasing.min_count, erasing.max_count) == (True, 1, 1)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (60, 900), (900, 60), (9, 7)])
def test_crops_are_drawn_as_timm_draws_them(width: int, height: int, timm_seed: None) -> None:
    n = 10_000
    image = Image.new("L", (width, height))
    crop = TimmCrop(224, interpolation="bicubic")
    drawn = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(n)]
    ours = [recipe.crop for recipe in recipes(n, width, height)]

    assert_same_distribution([box.top for box in ours], [top for top, _, _, _ in drawn])
    assert_same_distribution([box.left for box in ours], [left for _, left, _, _ in drawn])
    assert_same_distribution([box.height for box in ours], [height for _, _, height, _ in drawn])
    assert_same_distribution([box.width for box in ours], [width for _, _, _, width in drawn])
    assert_same_distribution(
        [box.width * box.height for box in ours], [height * width for _, _, height, width in drawn]
    )
    assert_same_distribution([box.width / box.height for box in ours], [w / h for _, _, h, w in drawn])


@pytest.mark.parametrize(("width", "height"), [(10, 10_000), (10_000, 10)])
def test_crop_of_a_strip_is_timms_central_one(width: int, height: int, timm_seed: None) -> None:
    crop = TimmCrop(224)
    image = Image.new("L", (width, height))
    top, left, crop_height, crop_width = crop.get_params(image, (1.0, 1.0), crop.ratio)

    centred = Counter(
        (box.top, box.left, box.height, box.width) for box in (r.crop for r in recipes(50, width, height))
    )

    assert centred == {(top, left, crop_height, crop_width): 50}


def test_flips_half(timm_seed: None) -> None:
    assert abs(sum(recipe.flip for recipe in recipes(4_000)) - 2_000) < 4 * math.sqrt(1_000)


def test_ops_are_drawn_as_timm_draws_them(timms: list[Any], timm_seed: None) -> None:
    n = 40_000
    augment = timms[2]
    names = {timm_name: name for name, timm_name in TIMM_NAMES.items()}
    drawn: list[list[tuple[str, float]]] = []
    originals = [op.aug_fn for op in augment.ops]

    def recorder(name: str) -> Callable[..., None]:
        return lambda image, *arguments, **_: drawn[-1].append((name, *arguments))

    for op in augment.ops:
        op.aug_fn = recorder(names[op.name])
    for _ in range(n):
        drawn.append([])
        augment(None)
    for op, original in zip(augment.ops, originals, strict=True):
        op.aug_fn = original
    ours = [recipe.ops for recipe in recipes(n)]

    for n_ops in range(3):
        assert_same_share(sum(len(ops) == n_ops for ops in ours), sum(len(ops) == n_ops for ops in drawn), n)
    pairs = Counter(tuple(op.name for op in ops) for ops in ours if len(ops) == 2)
    assert len(pairs) == 15 * 15
    for name in OP_NAMES:
        mine = [op.argument for ops in ours for op in ops if op.name == name]
        theirs = [call[1:] for ops in drawn for call in ops if call[0] == name]
        assert_same_share(len(mine), len(theirs), n)
        if mine[0] is None:
            assert not any(theirs)
        else:
            clamp = 1 if name == "posterize" else -math.inf
            assert_same_distribution(
                [float(value) for value in mine if value is not None],
                [max(clamp, value) for (value,) in theirs],
            )


@pytest.mark.parametrize("name", OP_NAMES)
def test_arguments_are_timms_at_every_magnitude(name: OpName, monkeypatch: pytest.MonkeyPatch) -> None:
    level_to_argument = TIMM_ARGUMENTS[TIMM_NAMES[name]]
    for negate in (False, True):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, negate=negate: -value if negate else value)
        for magnitude in np.round(np.linspace(0, 10, 1_001), 6).tolist():
            ours = resolve_op(name, magnitude, negate).argument
            if level_to_argument is None:
                assert ours is None
                continue
            (theirs,) = level_to_argument(magnitude, {"translate_const": 100})
            if name == "posterize":
                theirs = max(1, theirs)
            assert ours == theirs
            assert type(ours) is type(theirs)


@pytest.mark.parametrize("size_px", [32, 224])
def test_erasing_boxes_are_drawn_as_timm_draws_them(size_px: int, timm_seed: None) -> None:
    n = 20_000
    erasing = TimmErasing(probability=0.25, mode="pixel", max_count=1, device="cpu")
    drawn: list[tuple[slice, slice]] = []

    class Recorder:
        def __setitem__(self, where: tuple[slice, slice, slice], noise: torch.Tensor) -> None:
            drawn.append(where[1:])

    for _ in range(n):
        erasing._erase(Recorder(), 0, size_px, size_px, torch.float32)
    boxes = [recipe.erasing.box for recipe in recipes(n, spec=ViewSpec(size_px=size_px)) if recipe.erasing]

    assert_same_share(len(boxes), len(drawn), n)
    assert_same_distribution([box.top for box in boxes], [rows.start for rows, _ in drawn])
    assert_same_distribution([box.left for box in boxes], [columns.start for _, columns in drawn])
    assert_same_distribution([box.height for box in boxes], [rows.stop - rows.start for rows, _ in drawn])
    assert_same_distribution([box.width for box in boxes], [columns.stop - columns.start for _, columns in drawn])


def test_hundred_thousand_recipes_contain_none_that_fails() -> None:
    sides = [(500, 375), (375, 500), (1, 1), (1, 10_000), (10_000, 1), (2, 3), (64, 64), (9_459, 9_459)]
    spec = ViewSpec(size_px=32)
    arguments: dict[str, set[int | float | None]] = {name: set() for name in OP_NAMES}
    for number in range(100_000):
        width, height = sides[number % len(sides)]
        recipe = draw_recipe(spec, f"key_{number}", "v000", width, height)
        crop = recipe.crop
        assert crop.left + crop.width <= width
        assert crop.top + crop.height <= height
        for op in recipe.ops:
            arguments[op.name].add(op.argument)
        if recipe.erasing:
            box = recipe.erasing.box
            assert box.left + box.width <= 32
            assert box.top + box.height <= 32

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    plain = draw_recipe(ViewSpec(size_px=32, augment="none"), "key", "v000", 32, 32)
    for name in OP_NAMES:
        for argument in _sample(arguments[name]):
            drawn = plain.model_copy(update={"ops": (Op(name=name, argument=argument),)})
            assert render(image, drawn, spec).shape == (32, 32, 3)


def _sample(values: set[int | float | None]) -> list[int | float | None]:
    """All whole numbers; of the others the extremes and 30 between them."""
    numbers = sorted(value for value in values if value is not None)
    if len(numbers) < 40:
        return list(values)
    return [numbers[round(place)] for place in np.linspace(0, len(numbers) - 1, 32)]


def test_recipes_are_pinned() -> None:
    text = b"\n".join(canonical(recipe.to_json()) for recipe in recipes(500))

    assert canonical(next(recipes(1)).to_json()).decode() == (
        '{"crop":{"height":284,"left":12,"top":0,"width":376},"cut":[0,0],"erasing":null,"flip":true,"ops":[{'
        '"argument":1.78380496,"name":"sharpness"}],"resized":[224,224]}'
    )
    assert hashlib.sha256(text).hexdigest() == "f8d6b3b53f96b49247ae9c4031b61881316b4723df19fc9339715ced9189ce28"


def test_recipe_is_a_pure_function() -> None:
    before = random.getstate(), torch.get_rng_state()
    first = list(recipes(20))

    again = [draw_recipe(ViewSpec(), f"key_{number}", "v000", 500, 375) for number in reversed(range(20))]

    assert list(reversed(again)) == first
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    "other",
    [
        draw_recipe(ViewSpec(seed=1), "key_0", "v000", 500, 375),
        draw_recipe(SPEC, "key_1", "v000", 500, 375),
        draw_recipe(SPEC, "key_0", "v001", 500, 375),
        draw_recipe(SPEC, "key_0", "probe", 500, 375),
        draw_recipe(SPEC, "key_0", "v000", 800, 375),
    ],
)
def test_recipe_depends_on_every_argument(other: Recipe) -> None:
    assert other != draw_recipe(SPEC, "key_0", "v000", 500, 375)


def test_pixel_statistics_and_format_do_not_move_a_recipe() -> None:
    other = ViewSpec(view_format="png", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    assert draw_recipe(other, "key_0", "v000", 500, 375) == draw_recipe(SPEC, "key_0", "v000", 500, 375)


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.sampled_from(["deit", "none"]), st.integers(8, 1_000))
def test_crops_stay_inside_images_of_any_size(width: int, height: int, augment: Any, size_px: int) -> None:
    recipe = draw_recipe(ViewSpec(augment=augment, size_px=size_px), "key", "v000", width, height)

    assert recipe.crop.left + recipe.crop.width <= width
    assert recipe.crop.top + recipe.crop.height <= height
    assert recipe.cut[0] + size_px <= recipe.resized[0] <= 5 * size_px
    assert recipe.cut[1] + size_px <= recipe.resized[1] <= 5 * size_px


def test_no_augmentation_draws_nothing() -> None:
    spec = ViewSpec(augment="none")
    recipe = draw_recipe(spec, "key", "v000", 500, 375)

    assert recipe == draw_recipe(ViewSpec(augment="none", seed=9), "other", "probe", 500, 375)
    assert recipe.resized == (341, 256)
    assert recipe.cut == (58, 16)
    assert (recipe.flip, recipe.ops, recipe.erasing) == (False, (), None)


def test_json_brings_a_recipe_back() -> None:
    for recipe in recipes(200):
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_documented_recipe_and_ops_are_the_real_ones() -> None:
    page = (Path(__file__).parents[2] / "docs" / "views.md").read_text(encoding="utf-8")
    block = re.search(r"^\{\"crop\".*?\}\}$", page, re.DOTALL | re.MULTILINE)
    assert block is not None

    recipe = Recipe.from_json(json.loads(block.group()))

    assert recipe.ops == (Op(name="color", argument=1.9),)
    assert [name for name in re.findall(r"`(\w+)`", page.split("| Op |")[1]) if name in OP_NAMES] == list(OP_NAMES)


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """A good recipe's JSON with one value changed, or taken out for None."""
    base: dict[str, Any] = {
        "crop": {"left": 0, "top": 0, "width": 5, "height": 5},
        "resized": [224, 224],
        "cut": [0, 0],
        "flip": False,
        "ops": [{"name": "rotate", "argument": 27.5}],
        "erasing": {"box": {"left": 0, "top": 0, "width": 5, "height": 5}, "seed": 3},
    }
    place: Any = base
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return base


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("flip",), None),
        (("flip",), 1),
        (("extra",), 1),
        (("crop", "width"), 0),
        (("crop", "left"), -1),
        (("crop", "left"), 1.5),
        (("resized",), [224]),
        (("resized",), [224, 10**9]),
        (("ops", 0, "name"), "exec"),
        (("ops", 0, "argument"), "27"),
        (("ops", 0, "argument"), math.inf),
        (("ops", 0), {"name": "rotate", "argument": None}),
        (("ops", 0), {"name": "invert", "argument": 1.0}),
        (("erasing", "seed"), -1),
        (("erasing", "seed"), 2**53),
    ],
)
def test_json_of_no_recipe_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(FormatError, match=r"\Arecipe: [^\n]+\Z"):
        Recipe.from_json(changed(path, value))


@pytest.mark.parametrize("view", ["v0", "0", "v00a", "Probe", "", "v000\n", "../v000"])
def test_view_with_another_name_is_refused(view: str) -> None:
    with pytest.raises(ValueError, match="a view index is named"):
        draw_recipe(SPEC, "key", view, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "strong"}, "unknown augment 'strong'; choose deit or none"),
        ({"view_format": "webp"}, "unknown view format 'webp'; choose jpeg or png"),
        ({"size_px": 7}, "size_px must be from 8 to 4096, got 7"),
        ({"size_px": 4097}, "size_px"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**63}, "seed"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers from 0 to 1"),
        ({"mean": (124.0, 116.0, 104.0)}, "mean"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be three numbers above 0"),
        ({"std": (1.0, 1.0, math.nan)}, "std"),
    ],
)
def test_spec_refuses_what_no_cache_can_have(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewSpec(**arguments)


def test_fill_is_the_pixel_mean() -> None:
    assert fill_colour((0.485, 0.456, 0.406)) == (124, 116, 104)
    assert fill_colour((1.0, 0.0, 0.5)) == (255, 0, 128)
