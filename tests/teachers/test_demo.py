"""The teacher that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import proteus_cache.teachers
from proteus_cache.demo.scenes import CLASSES, write_scenes
from proteus_cache.errors import UsageError
from proteus_cache.evaluate.knn import knn_scores
from proteus_cache.evaluate.reading import centre_view
from proteus_cache.teachers.registry import fetch_weights, load_teacher
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.teachers.weights import read_metadata

FILE = Path(proteus_cache.teachers.__file__).with_name("demo.safetensors")


def _load(size_px: int | None = None) -> Teacher:
    return load_teacher("demo", weights=None, home=Path("unused"), size_px=size_px)


def test_the_file_is_small_and_says_how_it_was_made() -> None:
    report = json.loads(read_metadata(FILE)["report"])

    assert FILE.stat().st_size < 4e6
    assert report["scene_accuracy"] > 0.9
    assert report["test_scenes"] >= 1000


def test_it_needs_no_weights_and_takes_views_of_its_own_size() -> None:
    teacher = _load()

    assert (teacher.identity.name, teacher.identity.size_px, teacher.identity.patch_px) == ("demo", 84, 14)
    assert teacher.identity.licence == "Apache-2.0"
    assert teacher.target_shape("patch") == (36, 128)


@pytest.mark.parametrize("size_px", [28, 224])
def test_it_takes_other_sizes(size_px: int) -> None:
    teacher = _load(size_px)

    views = torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8)
    patch = teacher.targets(views, ["patch"])["patch"]

    assert patch.shape == (1, (size_px // 14) ** 2, 128)
    assert patch.isfinite().all()


def test_other_weights_are_refused_and_there_is_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes with its weights; leave --weights out"):
        load_teacher("demo", weights="random:0", home=tmp_path, size_px=None)
    with pytest.raises(UsageError, match="nothing to fetch for 'demo': its weights come with proteus-cache"):
        fetch_weights("demo", tmp_path)


def test_its_features_tell_classes_apart_on_images_it_never_saw(tmp_path: Path) -> None:
    """k-NN, 30 neighbours of each class in the bank; the full figure is in docs/demo.md."""
    per_class = {"bank": 30, "asked": 10}
    teacher = _load()
    features, labels = {}, {}
    for seed, (part, count) in enumerate(per_class.items(), start=77):
        write_scenes(tmp_path / part, per_class=count, seed=seed)
        files = sorted((tmp_path / part).rglob("*.jpg"))
        views = torch.from_numpy(np.stack([centre_view(path, 84) for path in files]))
        features[part] = normalize(teacher.targets(views, ["cls"])["cls"], dim=1)
        labels[part] = torch.tensor([CLASSES.index(path.parent.name) for path in files])

    (score,) = knn_scores(
        features["bank"], labels["bank"], features["asked"], labels["asked"], n_classes=len(CLASSES), ks=[20]
    )

    assert score.top1 is not None
    assert score.top1 > 0.85
