"""The corpus of image files: each becomes the documented pixels, a bad image with its reason, or a file-system error.

Every file is read twice and gives the same; none takes a second, warns, or takes more memory than its pixels need.
"""

import hashlib
import io
import os
import re
import time
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus_cache.errors import BadImageError, StorageError
from proteus_cache.images import list_images
from proteus_cache.views import source
from proteus_cache.views.make import make_view
from proteus_cache.views.source import read_source
from proteus_cache.views.spec import ViewSpec
from tests.views.corpus import AS_JPEG, BAD, GOOD, JPEG, PIXELS, PNG

N_FILES = 84
"""In CI: image files by content; nine more cases are of the file system and of names."""
MOST_SECONDS = 1.0
MOST_BYTES = 64 << 20
"""Of memory, beyond what the process has."""
PAGE = Path(__file__).parents[2] / "docs" / "views.md"


def measured(work: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> None:
    """Do it twice, within its time and memory, without a word on the terminal."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _memory("VmRSS"), time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [work(), work()]
    assert time.thread_time() - started < 2 * MOST_SECONDS
    assert _memory("VmHWM") - before < MOST_BYTES
    assert results[0] == results[1]
    assert capfd.readouterr() == ("", "")


def _memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def test_the_corpus_is_as_large_as_stated() -> None:
    assert len(GOOD) + len(BAD) == N_FILES


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_gives_the_documented_pixels(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    case, path = GOOD[name], tmp_path / "image.JPEG"
    path.write_bytes(case.data)
    expected = case.pixels
    if expected is None:
        expected = np.asarray(Image.open(io.BytesIO(case.data)).convert("RGB"))
        assert not np.array_equal(expected, AS_JPEG)  # only digests tell

    def read() -> tuple[str, str]:
        found = read_source(path)
        pixels = np.asarray(found.image)
        assert found.sha256 == hashlib.sha256(case.data).hexdigest()
        assert (found.width, found.height) == pixels.shape[1::-1]
        np.testing.assert_array_equal(pixels, expected)
        return found.sha256, found.image.mode

    measured(read, capfd)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    case, path = BAD[name], tmp_path / "image.JPEG"
    path.write_bytes(case.data)

    def read() -> str:
        with pytest.raises(BadImageError, match=case.reason) as caught:
            read_source(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    measured(read, capfd)


def test_the_page_lists_the_kinds_of_the_corpus_and_no_others() -> None:
    section = PAGE.read_text().split("## 1. The source image")[1].split("\n## ")[0]
    tables = [
        re.findall(r"^\| ([^|]+) \|", part, re.MULTILINE)[2:] for part in section.split("\n\n") if part.startswith("|")
    ]

    assert set(tables[0]) == {case.kind for case in GOOD.values()}
    assert set(tables[1]) == {case.kind for case in BAD.values()}


def test_the_page_names_imagenets_odd_files() -> None:
    named = re.findall(r"\bn\d{8}_\d+\b", PAGE.read_text())

    assert len(named) == len(set(named)) == 24  # 22 CMYK, one PNG, one with damaged EXIF


def kept_out(path: Path) -> None:
    path.write_bytes(PNG)
    path.chmod(0)


SYSTEM: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda path: None, "No such file"),
    "folder": (Path.mkdir, "not a regular file"),
    "pipe": (os.mkfifo, "not a regular file"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "not readable": (kept_out, "Permission denied"),
}


@pytest.mark.parametrize("name", SYSTEM)
def test_what_cannot_be_read_is_an_error_of_the_file_system(tmp_path: Path, name: str) -> None:
    make, reason = SYSTEM[name]
    path = tmp_path / "image.JPEG"
    make(path)

    found = said_by_someone_else(path) if name == "not readable" and os.geteuid() == 0 else said(path)

    assert re.fullmatch(rf"{re.escape(str(path))}: cannot be read: {reason}.*; put the file back .* again", found)


def said(path: Path) -> str:
    with pytest.raises(StorageError) as caught:
        read_source(path)
    return str(caught.value)


def said_by_someone_else(path: Path) -> str:
    """The same in a process of a user without rights; root may read everything."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(writer, said(path).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        found = answer.read().decode()
    os.waitpid(child, 0)
    return found


def test_a_file_that_grows_is_read_again_until_it_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.JPEG"
    path.write_bytes(JPEG[:-10])
    look, n_looks = os.fstat, 0

    def grow(descriptor: int) -> os.stat_result:
        nonlocal n_looks
        status = look(descriptor)
        n_looks += 1
        if n_looks == 1 or n_looks > 10:
            with open(path, "ab") as file:
                file.write(JPEG[-10:])
        return status

    monkeypatch.setattr(os, "fstat", grow)
    monkeypatch.setattr(source, "READ_AGAIN_S", (0.0, 0.0))

    assert np.array_equal(np.asarray(read_source(path).image), AS_JPEG)
    n_looks = 10
    with pytest.raises(StorageError, match="changed while it was read"):
        read_source(path)


def test_links_twins_and_names_of_any_alphabet_are_images_of_their_own(tmp_path: Path) -> None:
    names = ["a/one.png", "b/one.png", "a/two.png", "a/ü-日本.png", "b/" + unicodedata.normalize("NFD", "ü") + ".png"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(PNG)
    (tmp_path / "images/b/link.png").symlink_to(tmp_path / "images/a/one.png")

    table = list_images(tmp_path / "images").table
    views = {
        row["key"]: make_view(tmp_path / "images" / row["path"], row["path"], row["key"], row["label"], "v000", SPEC)
        for row in table.to_pylist()
    }

    assert table["path"].to_pylist() == sorted([*names, "b/link.png"])
    assert len(views) == 6
    assert len({view.source_sha256 for view in views.values()}) == 1
    assert len({view.digest for view in views.values()}) == 6  # each key draws its own view


SPEC = ViewSpec(size_px=32)


def test_the_picture_shows_every_side() -> None:
    """Else a turned or mirrored image could pass for the right one."""
    turned = [np.rot90(PIXELS, 2), PIXELS[::-1], PIXELS[:, ::-1]]

    assert not any(np.array_equal(PIXELS, other) for other in turned)
