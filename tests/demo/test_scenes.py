from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_cache.demo.scenes import CLASSES, SIDE_PX, draw_scene, is_scene, write_scenes
from proteus_cache.images import list_images


def test_a_scene_is_a_function_of_class_and_seed() -> None:
    first, again, other = (draw_scene(2, np.random.default_rng([seed])) for seed in (5, 5, 6))

    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)


def test_a_file_tells_the_seed_of_its_set(tmp_path: Path) -> None:
    write_scenes(tmp_path, per_class=1, seed=3)

    files = [(label, tmp_path / name / f"{name}_0000.jpg") for label, name in enumerate(CLASSES)]

    assert all(is_scene(file, label, 3) for label, file in files)
    assert not any(is_scene(file, label, seed) for label, file in files for seed in (0, 1, 2, 4))


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_the_class_changes_the_texture_and_nothing_else(label: int) -> None:
    """Same draws, another class: what is not shape stays as it is, pixel by pixel."""
    scene, plain = (draw_scene(number, np.random.default_rng([1])) for number in (label, CLASSES.index("plain")))

    assert np.array_equal(scene.shape_mask, plain.shape_mask)
    outside = ~_grown(scene.shape_mask)
    assert np.array_equal(scene.pixels[outside], plain.pixels[outside])
    inside_differs = (scene.pixels != plain.pixels)[scene.shape_mask].mean()
    assert inside_differs > 0.2 or CLASSES[label] == "plain"


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and the half-covered pixels about it."""
    grown = mask.copy()
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            grown |= np.roll(grown, step, axis)
    return grown


def test_shapes_are_seen_and_sometimes_occluded() -> None:
    scenes = [draw_scene(seed % len(CLASSES), np.random.default_rng([seed])) for seed in range(40)]

    shares = [scene.shape_mask.mean() for scene in scenes]
    assert min(shares) > 0.02
    assert 0.1 < np.mean(shares) < 0.5
    assert 0 < sum(scene.occluder_mask.any() for scene in scenes) < 40
    assert not any((scene.shape_mask & scene.occluder_mask).any() for scene in scenes)
    assert all(scene.pixels.shape == (SIDE_PX, SIDE_PX, 3) for scene in scenes)


def test_files_are_in_class_folders_and_kept(tmp_path: Path) -> None:
    counted: list[int] = []

    n_images = write_scenes(tmp_path, per_class=2, seed=3, progress=lambda done, _: counted.append(done))
    kept = tmp_path / "dotted" / "dotted_0000.jpg"
    before = kept.stat().st_mtime_ns, kept.read_bytes()
    (tmp_path / "dotted" / "dotted_0001.jpg").unlink()
    write_scenes(tmp_path, per_class=2, seed=3)

    listing = list_images(tmp_path)
    assert listing.classes == CLASSES == tuple(sorted(CLASSES))
    assert n_images == len(listing.table) == 2 * len(CLASSES)
    assert counted == list(range(1, n_images + 1))
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before
    assert not list(tmp_path.rglob("*.part"))


def test_more_images_of_a_class_leave_the_first_as_they_are(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", per_class=1, seed=0)
    write_scenes(tmp_path / "more", per_class=2, seed=0)

    for path in (tmp_path / "few").rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(tmp_path / "few")).read_bytes()
