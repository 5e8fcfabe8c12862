"""Listing images: what is taken, what it is called, in which order, and what is refused in one line."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_cache.errors import ImageListError, StorageError
from proteus_cache.images import TABLE_SCHEMA, ImageListing, draw_order, list_images, sample_key


def touch(root: Path, *paths: str) -> Path:
    """Make empty files: listing must not need more."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_list(folder: Path, text: str | bytes) -> Path:
    path = folder / "train.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def columns(listing: ImageListing) -> tuple[list[str], list[int | None]]:
    return listing.table["path"].to_pylist(), listing.table["label"].to_pylist()


def test_class_folders_give_labels_by_sorted_name(tmp_path: Path) -> None:
    touch(tmp_path, "zebra/2.JPEG", "ant/b.png", "ant/deep/er/a.jpg", "zebra/1.jpg")

    listing = list_images(tmp_path)

    assert listing.classes == ("ant", "zebra")
    assert columns(listing) == (
        ["ant/b.png", "ant/deep/er/a.jpg", "zebra/1.jpg", "zebra/2.JPEG"],
        [0, 0, 1, 1],
    )
    assert listing.root == tmp_path
    assert listing.table.schema.equals(TABLE_SCHEMA)
    assert listing.table["key"].to_pylist() == [sample_key(path) for path in columns(listing)[0]]


def test_flat_folder_gives_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a.jpeg")
    (tmp_path / "empty").mkdir()

    listing = list_images(tmp_path)

    assert listing.classes is None
    assert columns(listing) == (["a.jpeg", "b.jpg"], [None, None])


def test_folder_without_images_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "ant/1.jpg", "notes/readme.md", "zebra/1.jpg")

    assert list_images(tmp_path).classes == ("ant", "zebra")


def test_hidden_names_and_other_suffixes_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.thumbs/2.jpg", ".git/3.jpg", "a/x.webp", "a/y.webp", "a/LICENSE")
    (tmp_path / "a" / "folder.jpg").mkdir()

    with caplog.at_level(logging.INFO):
        listing = list_images(tmp_path)

    assert columns(listing)[0] == ["a/1.jpg"]
    assert "files=3 suffixes=.webp,none" in caplog.text


def test_only_regular_files_and_links_to_them_count(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "link.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    (tmp_path / "a" / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")

    assert columns(list_images(tmp_path))[0] == ["a/1.jpg", "a/link.jpg"]


def test_linked_class_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "ant/1.jpg")
    images = tmp_path / "images"
    images.mkdir()
    (images / "ant").symlink_to(store / "ant")
    (store / "ant" / "again").symlink_to(store / "ant")

    assert columns(list_images(images))[0] == ["ant/1.jpg"]


def test_listing_opens_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "1.jpg").chmod(0)

    assert columns(list_images(tmp_path))[0] == ["a/1.jpg"]


def test_list_gives_paths_with_and_without_labels(tmp_path: Path) -> None:
    source = write_list(tmp_path, "\ufeffb/2.png\t7\r\n\r\n./a//with space.jpg\nc/1.webp\t0\n")

    listing = list_images(source)

    assert listing.root == tmp_path
    assert listing.classes is None
    assert columns(listing) == (["a/with space.jpg", "b/2.png", "c/1.webp"], [None, 7, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no images in the list"),
        ("\n \n", "no images in the list"),
        ("a.jpg\tcat", "line 1: the label after the tab must be an integer from 0 on, found 'cat'"),
        ("a.jpg\nb.jpg\t-1", "line 2: the label"),
        ("a.jpg\t", "line 1: the label"),
        ("a.jpg\t2147483648", "line 1: the label"),
        ("a.jpg\t" + "9" * 5000, "line 1: the label"),
        ("/etc/passwd", "line 1: '/etc/passwd' does not stay inside"),
        ("a/../../b.jpg", "does not stay inside"),
        ("a.jpg\0.png", "does not stay inside"),
        ("\t3", "line 1: '' does not stay inside"),
        ("a.jpg\nb.jpg\na.jpg", "a.jpg is listed twice"),
        ("a.jpg\nb.jpg\na.jpg\t3", "a.jpg is listed twice"),
        (b"a.jpg\n\xff.jpg\n", "line 2 is not UTF-8"),
    ],
)
def test_unusable_list_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    source = write_list(tmp_path, text)

    with pytest.raises(ImageListError, match=re.escape(message)) as caught:
        list_images(source)

    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.webp", "a/2.webp", "notes.txt")

    with pytest.raises(ImageListError, match=r"no images.*\*\.jpg.*holds 2 named \*\.webp"):
        list_images(tmp_path)


def test_empty_folder_and_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageListError, match=r"no images in it or in its folders"):
        list_images(tmp_path)
    with pytest.raises(ImageListError, match=r"no such folder or list.*--images"):
        list_images(tmp_path / "missing")


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "loose.jpg", "ant/1.jpg")

    with pytest.raises(ImageListError, match=r"both in it \(loose.jpg\) and in folders \(ant/1.jpg\)"):
        list_images(tmp_path)


def test_other_file_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images.csv")

    with pytest.raises(ImageListError, match="neither a folder of images nor a list"):
        list_images(tmp_path / "images.csv")


def test_two_paths_with_one_key_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A true collision of 40 bits takes too long to find.
    monkeypatch.setattr("proteus_cache.images.sample_key", lambda path: "one_key")
    source = write_list(tmp_path, "a.jpg\nb.jpg\n")

    with pytest.raises(ImageListError, match=r"a\.jpg and b\.jpg get the same key one_key"):
        list_images(source)


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jpg")).touch()

    with pytest.raises(ImageListError, match="not UTF-8; rename"):
        list_images(tmp_path)


def test_link_to_itself_is_a_storage_error(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "a" / "2.jpg")

    with pytest.raises(StorageError, match=r"2\.jpg: cannot be read: Too many levels of symbolic links"):
        list_images(tmp_path)


def test_folder_that_vanishes_is_a_storage_error(tmp_path: Path) -> None:
    from proteus_cache.images import _entries

    with pytest.raises(StorageError, match="gone: cannot be read: No such file or directory"):
        _entries(tmp_path / "gone")


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("a/Émile & Zoë-1.tar.jpg", "_mile___zo__1_tar"),
        ("b/" + "X" * 60 + ".png", "x" * 48),
        ("\u212a.jpg", "_"),
        (".jpg", "_jpg"),
    ],
)
def test_key_is_a_harmless_stem_and_a_hash(path: str, stem: str) -> None:
    assert sample_key(path) == f"{stem}_{hashlib.sha256(path.encode()).hexdigest()[:10]}"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_every_path_has_a_key_that_any_tar_reader_takes(path: str) -> None:
    assert re.fullmatch(r"[a-z0-9_]{1,59}", sample_key(path))


def test_same_name_in_two_classes_gives_two_keys() -> None:
    assert sample_key("cat/1.jpg") != sample_key("dog/1.jpg")
    assert sample_key("cat/a.jpg") != sample_key("cat/A.jpg")


def test_order_is_pinned() -> None:
    keys = [f"image_{number}" for number in range(8)]

    assert draw_order(keys, 0).tolist() == [4, 2, 7, 0, 3, 5, 6, 1]
    assert draw_order(keys, 1).tolist() == [3, 1, 2, 0, 7, 4, 5, 6]
    assert draw_order(keys, 0).dtype == np.int64


def test_order_takes_arrow_columns() -> None:
    keys = [f"image_{number}" for number in range(50)]

    assert np.array_equal(draw_order(pa.chunked_array([keys[:20], keys[20:]]), 3), draw_order(keys, 3))
    assert draw_order([], 0).tolist() == []


@given(st.lists(st.text(), unique=True, max_size=30), st.integers(0, 2**63 - 1))
def test_order_of_two_images_depends_on_no_other(keys: list[str], seed: int) -> None:
    whole = [keys[row] for row in draw_order(keys, seed)]
    some = sorted(keys)[::2]

    assert sorted(whole) == sorted(keys)
    assert [some[row] for row in draw_order(some, seed)] == [key for key in whole if key in set(some)]


def test_order_mixes_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    keys = [f"class{label}_{number}" for number, label in enumerate(labels)]

    first = labels[draw_order(keys, 0)][:200]

    assert set(first) == set(range(10))
    assert np.bincount(first).max() < 45


def test_real_photographs_are_listed(test_data: Path) -> None:
    listing = list_images(test_data / "imagenet-sample")

    assert listing.table.num_rows == 400
    assert listing.classes is not None
    assert len(listing.classes) == 400
    assert set(columns(listing)[1]) == set(range(400))
