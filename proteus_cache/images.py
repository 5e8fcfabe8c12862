"""Where images come from: class folders, a flat folder or a text list, as one table.

Listing reads folders only and opens no image, so a million files cost seconds. The result is the frozen list
of a cache: sorted by path, every key once. `draw_order` then mixes it, so that a shard holds images of many
classes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from proteus_cache.errors import ImageListError, StorageError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
"""What a folder listing takes for an image, in any case; what a file truly is decides its content."""

TABLE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
    ]
)

_STEM_CHARS = 48
_OTHER = re.compile(r"[^A-Za-z0-9]")
_DIGITS = re.compile(r"[0-9]{1,10}")
_MAX_LABEL = 2**31 - 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageListing:
    """All images of a source, sorted by path."""

    root: Path
    """The folder that the paths are relative to."""
    table: pa.Table
    """Columns `key` string, `path` string (relative, with /), `label` int32 or null."""
    classes: tuple[str, ...] | None
    """Class names by label, from the names of class folders; None for a flat folder or a list."""


def list_images(source: Path) -> ImageListing:
    """List the images of a folder or of a text list; no image is opened.

    A folder holds either one folder for each class (with more folders in it, if need be) or images only.
    Names that start with a dot are passed over, and so are files whose suffix is not one of `IMAGE_SUFFIXES`
    (their number is logged). In a list each line is a path, or a path, a tab and an integer label; blank
    lines are passed over, and paths are relative to the list's folder and stay inside it.

    Args:
        source: the folder, or a file whose name ends in `.txt`.

    Raises:
        ImageListError: nothing there, no images, images beside class folders, a line that cannot be used, or
            two images with one key.
        StorageError: a folder or the list cannot be read.
    """
    with _reported(source):
        is_folder, is_list, exists = source.is_dir(), _is_list(source), source.exists()
    if is_folder:
        root, rows, classes = source, *_list_folder(source)
    elif is_list:
        root, rows, classes = source.parent, _list_lines(source), None
    elif exists:
        raise ImageListError(
            f"{source}: neither a folder of images nor a list whose name ends in .txt; give one of these with --images"
        )
    else:
        raise ImageListError(f"{source}: no such folder or list of images; give one with --images")
    return ImageListing(root, _as_table(source, sorted(rows, key=lambda row: row[0])), classes)


def sample_key(relative_path: str) -> str:
    """The name of one image in every stage: its stem made harmless, and 10 hex digits of its path's SHA-256.

    Args:
        relative_path: path below the image root, with / between its parts.

    Returns:
        The stem's first 48 characters, A to Z in lower case and every character but a to z and 0 to 9 as `_`,
        then `_` and the first 10 hex digits of the SHA-256 of the path in UTF-8.
    """
    stem = PurePosixPath(relative_path).stem[:_STEM_CHARS]
    digest = hashlib.sha256(relative_path.encode("utf-8")).hexdigest()
    return f"{_OTHER.sub('_', stem).lower()}_{digest[:10]}"


def draw_order(keys: Iterable[str] | pa.Array | pa.ChunkedArray, seed: int) -> np.ndarray:
    """A class-mixed order of images: the permutation that sorts their keyed hashes.

    Which of two images comes first depends on their keys and the seed alone, never on the other images.

    Args:
        keys: sample keys, each once.
        seed: 0 or more.

    Returns:
        (n,) int64, row numbers in the new order: sorted by BLAKE2b-128 of the key, keyed with `seed` as 8
        little-endian bytes, read as a big-endian number.
    """
    names = keys.to_pylist() if isinstance(keys, pa.Array | pa.ChunkedArray) else keys
    keyed = hashlib.blake2b(key=seed.to_bytes(8, "little"), digest_size=16)
    digests = bytearray()
    for name in names:
        state = keyed.copy()
        state.update(name.encode("utf-8"))
        digests += state.digest()
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0])).astype(np.int64, copy=False)


_Row: TypeAlias = tuple[str, int | None]
"""Relative path and label."""


def _list_folder(root: Path) -> tuple[list[_Row], tuple[str, ...] | None]:
    other: Counter[str] = Counter()
    flat: list[_Row] = []
    folders: list[str] = []
    for entry in _entries(root):
        if _is_folder(entry):
            folders.append(entry.name)
        elif _is_image(entry, other):
            flat.append((entry.name, None))

    by_class = {name: list(_walk(root / name, name, other)) for name in sorted(folders)}
    classes = tuple(name for name, paths in by_class.items() if paths)
    if other:
        kinds = ",".join(suffix or "none" for suffix, _ in other.most_common(5))
        logger.info("passed over files=%d suffixes=%s folder=%s", sum(other.values()), kinds, root)
    if flat and classes:
        raise ImageListError(
            f"{root}: images both in it ({flat[0][0]}) and in folders ({by_class[classes[0]][0]}), so the "
            "classes are unclear; move the images into class folders, or give a .txt list of paths"
        )
    if not flat and not classes:
        raise ImageListError(f"{root}: no images in it or in its folders; {_what_was_there(other)}")
    labelled = [(path, label) for label, name in enumerate(classes) for path in by_class[name]]
    return flat or list(labelled), classes or None


def _what_was_there(other: Counter[str]) -> str:
    wanted = "files named " + ", ".join("*" + suffix for suffix in IMAGE_SUFFIXES) + " are read"
    if not other:
        return wanted
    suffix, count = other.most_common(1)[0]
    return f"{wanted}, and it holds {count:,} named {'*' + suffix if suffix else 'without a suffix'}"


def _walk(folder: Path, relative: str, other: Counter[str], above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Relative paths of the images in `folder` and below; a link back to a folder above is not followed."""
    with _reported(folder):
        status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        path = f"{relative}/{entry.name}"
        if _is_folder(entry):
            yield from _walk(folder / entry.name, path, other, (*above, here))
        elif _is_image(entry, other):
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with _reported(folder), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with _reported(entry.path):
        return entry.is_dir()


def _is_image(entry: os.DirEntry[str], other: Counter[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    with _reported(entry.path):
        if suffix in IMAGE_SUFFIXES and entry.is_file():
            return True
    other[suffix] += 1
    return False


@contextmanager
def _reported(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path}: cannot be read: {reason}; make it readable for this user and run the same command again"
        ) from error


def _is_list(source: Path) -> bool:
    return source.suffix.lower() == ".txt" and source.is_file()


def _list_lines(source: Path) -> list[_Row]:
    with _reported(source):
        data = source.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ImageListError(f"{source}: line {line} is not UTF-8; save the list as UTF-8") from error
    rows = []
    for number, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            rows.append(_parse_line(row.rstrip("\r"), f"{source}: line {number}"))
    return rows


def _parse_line(line: str, where: str) -> _Row:
    path, tab, digits = line.rpartition("\t")
    if not tab:
        path, digits = line, ""
    if tab and not (_DIGITS.fullmatch(digits) and int(digits) <= _MAX_LABEL):
        raise ImageListError(f"{where}: the label after the tab must be an integer from 0 on, found {digits[:40]!r}")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        raise ImageListError(
            f"{where}: {path!r} does not stay inside the list's folder; put the list beside or above the "
            "images and give paths relative to it"
        )
    return str(pure), int(digits) if tab else None


def _as_table(source: Path, rows: list[_Row]) -> pa.Table:
    if not rows:
        raise ImageListError(f"{source}: no images in the list; give one path on each line")
    paths = [path for path, _ in rows]
    for path in paths:
        try:
            path.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ImageListError(f"{source}: the name {path!a} is not UTF-8; rename that file") from error
    keys = [sample_key(path) for path in paths]
    _refuse_duplicates(source, keys, paths)
    columns = [
        pa.array(keys, pa.string()),
        pa.array(paths, pa.string()),
        pa.array([label for _, label in rows], pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=TABLE_SCHEMA)


def _refuse_duplicates(source: Path, keys: list[str], paths: list[str]) -> None:
    if len(set(keys)) == len(keys):
        return
    first: dict[str, str] = {}
    for key, path in zip(keys, paths, strict=True):
        if key not in first:
            first[key] = path
        elif first[key] == path:
            raise ImageListError(f"{source}: {path} is listed twice; remove one of the lines")
        else:
            raise ImageListError(f"{source}: {first[key]} and {path} get the same key {key}; rename one of them")
