"""Labelled images in two parts: what is known (train) and what is asked (test).

The parts are the folders `train` and `test` (or `val`) where there are such, else a split by seed. No image
is opened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from proteus_cache.errors import UsageError
from proteus_cache.images import ImageListing, draw_order, list_images

TEST_SHARE: Final = 5
"""One image in so many of each class is asked when the images come without parts, and held out of a linear probe."""
_TEST_NAMES = ("test", "val")

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Images with labels; a column and an array, no object for each image."""

    root: Path
    """Paths are relative to it."""
    paths: pa.ChunkedArray
    """(N,) strings."""
    labels: Labels
    """(N,), numbers into `LabelledImages.classes`."""
    keys: pa.ChunkedArray
    """(N,) sample keys."""

    def __len__(self) -> int:
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """Path of one image below `root`."""
        path: str = self.paths[index].as_py()
        return path

    def key(self, index: int) -> str:
        """Sample key of one image."""
        key: str = self.keys[index].as_py()
        return key


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Both parts of a labelled set."""

    train: Part
    test: Part
    classes: tuple[str, ...]
    """Names by label."""
    split: str
    """Where the parts come from, for people."""
    single_classes: tuple[str, ...]
    """Classes whose only image a split left in the train part, so that they are not asked."""


def find_labelled_images(images: Path, seed: int) -> LabelledImages:
    """List the labelled images of a folder or list and tell train from test.

    Args:
        images: a folder with `train` and `test` (or `val`), each with class folders; or class folders; or a
            text list with labels.
        seed: of the split, for images without parts.

    Raises:
        UsageError: no images (ImageListError), or images without labels.
        StorageError: a folder or the list cannot be read.
    """
    train = images / "train"
    if not _holds_folders(train):
        return _split(_labelled(images), seed)
    for name in _TEST_NAMES:
        if _holds_folders(images / name):
            return _join(_labelled(train), _labelled(images / name), f"folders train and {name}")
    return _split(_labelled(train), seed)


def rows_to_ask(keys: pa.ChunkedArray, labels: Labels, seed: int) -> NDArray[np.bool_]:
    """Which images a split asks: a fifth of each class, at least one; none of a class with one image.

    Which images of a class these are depends on their keys and the seed alone.

    Args:
        keys: (N,) sample keys.
        labels: (N,) from 0 on.
        seed: 0 or more.

    Returns:
        (N,) True for test.
    """
    order = draw_order(keys, seed)
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    n_test = np.where(counts < 2, 0, np.maximum(1, (2 * counts + TEST_SHARE) // (2 * TEST_SHARE)))
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    place = np.arange(len(labels)) - first[labels[by_class]]
    is_test = np.zeros(len(labels), dtype=np.bool_)
    is_test[by_class] = place < n_test[labels[by_class]]
    return is_test


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


@dataclass(frozen=True, slots=True)
class _Listing:
    listing: ImageListing
    classes: tuple[str, ...]
    labels: Labels


def _labelled(images: Path) -> _Listing:
    listing = list_images(images)
    column = listing.table["label"]
    if column.null_count:
        path = listing.table["path"][int(np.argmax(column.is_null().to_numpy()))].as_py()
        raise UsageError(
            f"{images}: {column.null_count:,} of {len(column):,} images have no label (the first is {path}); "
            "give a folder with one folder for each class, or a list with a tab and a label in every line"
        )
    values, labels = np.unique(column.to_numpy(), return_inverse=True)
    names = listing.classes
    classes = tuple(names[value] if names else str(value) for value in values)
    return _Listing(listing, classes, labels.astype(np.int64))


def _split(labelled: _Listing, seed: int) -> LabelledImages:
    is_test = rows_to_ask(labelled.listing.table["key"], labelled.labels, seed)
    single = np.flatnonzero(np.bincount(labelled.labels) == 1)
    return LabelledImages(
        train=_part(labelled, ~is_test),
        test=_part(labelled, is_test),
        classes=labelled.classes,
        split=f"one image in {TEST_SHARE} of each class, split by seed {seed}",
        single_classes=tuple(labelled.classes[number] for number in single),
    )


def _part(labelled: _Listing, chosen: NDArray[np.bool_]) -> Part:
    return Part(
        labelled.listing.root,
        labelled.listing.table["path"].filter(pa.array(chosen)),
        labelled.labels[chosen],
        labelled.listing.table["key"].filter(pa.array(chosen)),
    )


def _join(train: _Listing, test: _Listing, split: str) -> LabelledImages:
    """Give the classes of two listings, which are told by name, common numbers."""
    classes = tuple(sorted({*train.classes, *test.classes}))
    number = {name: index for index, name in enumerate(classes)}
    parts = [
        Part(
            labelled.listing.root,
            labelled.listing.table["path"],
            np.array([number[name] for name in labelled.classes], dtype=np.int64)[labelled.labels],
            labelled.listing.table["key"],
        )
        for labelled in (train, test)
    ]
    return LabelledImages(parts[0], parts[1], classes, split, ())
