"""Parts of a labelled set: found by folder name, else split by seed, class by class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_cache.errors import ImageListError, UsageError
from proteus_cache.evaluate.labelled import find_labelled_images, rows_to_ask


def _touch(root: Path, *paths: str) -> Path:
    """Files that look like images from outside; listing opens none."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def _asked(labels: list[int], seed: int, prefix: str = "image") -> list[bool]:
    keys = pa.chunked_array([[f"{prefix}{number}_{label}" for number, label in enumerate(labels)]])
    return [bool(asked) for asked in rows_to_ask(keys, np.array(labels, dtype=np.int64), seed)]


@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 2**40))
def test_a_split_asks_a_fifth_of_each_class_and_keeps_one_to_train(counts: list[int], seed: int) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]

    asked = np.array(_asked(labels, seed))

    for label, count in enumerate(counts):
        n_asked = int(asked[np.array(labels) == label].sum())
        assert n_asked == (0 if count == 1 else max(1, round(count / 5)))
        assert count - n_asked >= 1


def test_a_split_is_the_same_every_time_and_another_for_another_seed() -> None:
    labels = [0] * 50 + [1] * 50

    assert _asked(labels, 7) == _asked(labels, 7)
    assert _asked(labels, 7) != _asked(labels, 8)


def test_what_a_class_is_asked_does_not_depend_on_other_classes() -> None:
    alone = _asked([0] * 30, seed=1)
    beside_another = _asked([0] * 30 + [1] * 20, seed=1)

    assert beside_another[:30] == alone


def test_class_folders_are_split(tmp_path: Path) -> None:
    images = _touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(10)))

    labelled = find_labelled_images(images, seed=0)

    assert labelled.classes == ("cat", "dog")
    assert (len(labelled.train), len(labelled.test)) == (16, 4)
    assert labelled.split == "one image in 5 of each class, split by seed 0"
    paths = {part.relative_path(row) for part in (labelled.train, labelled.test) for row in range(len(part))}
    assert len(paths) == 20
    for part in (labelled.train, labelled.test):
        for row in range(len(part)):
            assert part.relative_path(row).startswith(labelled.classes[part.labels[row]] + "/")


def test_a_class_with_one_image_trains_and_is_named(tmp_path: Path) -> None:
    images = _touch(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")

    labelled = find_labelled_images(images, seed=0)

    assert labelled.single_classes == ("dog",)
    assert [labelled.classes[label] for label in labelled.test.labels] == ["cat"]


@pytest.mark.parametrize(("present", "used"), [(["test"], "test"), (["val"], "val"), (["test", "val"], "test")])
def test_parts_are_found_by_name(tmp_path: Path, present: list[str], used: str) -> None:
    images = _touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", *(f"{name}/dog/3.jpg" for name in present))

    labelled = find_labelled_images(images, seed=0)

    assert labelled.split == f"folders train and {used}"
    assert labelled.test.root == images / used
    assert [labelled.classes[label] for label in labelled.test.labels] == ["dog"]


def test_classes_of_both_parts_are_told_by_name(tmp_path: Path) -> None:
    images = _touch(tmp_path, "train/b/1.jpg", "train/d/1.jpg", "val/a/1.jpg", "val/b/1.jpg", "val/d/1.jpg")

    labelled = find_labelled_images(images, seed=0)

    assert labelled.classes == ("a", "b", "d")
    assert labelled.train.labels.tolist() == [1, 2]
    assert labelled.test.labels.tolist() == [0, 1, 2]


def test_a_train_folder_alone_is_split(tmp_path: Path) -> None:
    images = _touch(tmp_path, *(f"train/{name}/{number}.jpg" for name in "ab" for number in range(5)))

    labelled = find_labelled_images(images, seed=0)

    assert labelled.classes == ("a", "b")
    assert (len(labelled.train), len(labelled.test)) == (8, 2)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    images = _touch(tmp_path, "train/1.jpg", "train/2.jpg", "tram/1.jpg", "tram/2.jpg")

    labelled = find_labelled_images(images, seed=0)

    assert labelled.classes == ("train", "tram")


def test_labels_of_a_list_become_classes(tmp_path: Path) -> None:
    _touch(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    (tmp_path / "list.txt").write_text("1.jpg\t7\n2.jpg\t7\n3.jpg\t100000\n4.jpg\t100000\n")

    labelled = find_labelled_images(tmp_path / "list.txt", seed=0)

    assert labelled.classes == ("7", "100000")
    assert sorted([*labelled.train.labels, *labelled.test.labels]) == [0, 0, 1, 1]


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "list.txt").write_text("1.jpg\t0\n2.jpg\n")

    with pytest.raises(UsageError, match=r"2 of 2 images have no label .*one folder for each class"):
        find_labelled_images(tmp_path, seed=0)
    with pytest.raises(UsageError, match=r"1 of 2 images have no label \(the first is 2.jpg\)"):
        find_labelled_images(tmp_path / "list.txt", seed=0)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageListError, match="no images"):
        find_labelled_images(tmp_path, seed=0)
