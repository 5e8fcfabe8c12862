"""Reading samples: the bytes that were packed, or an error that says where."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_cache.errors import ChecksumError, DamageError, FormatError, StorageError
from proteus_cache.pack import samples
from proteus_cache.pack.reader import Pack
from proteus_cache.pack.samples import Part
from tests.pack.synthetic import expected_codes, expected_view

ROWS = [row for row in range(12) if row != 4]


def read(pack: Pack, view: str, numbers: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    codes = np.empty((len(numbers), pack.code_bytes), dtype=np.uint8)
    views = np.empty((len(numbers), pack.side_px, pack.side_px, 3), dtype=np.uint8)
    pack.sample_reader().read(Part(view, np.array(numbers), np.arange(len(numbers))), codes, views)
    return codes, views


def test_samples_are_those_that_were_packed(whole_pack: Pack) -> None:
    numbers = [10, 0, 3, 4, 3]

    codes, views = read(whole_pack, "v001", numbers)

    for place, number in enumerate(numbers):
        row = ROWS[number]
        assert np.array_equal(codes[place], np.concatenate(expected_codes("v001", row, whole_pack.targets)))
        assert np.array_equal(views[place], expected_view("v001", row, whole_pack.side_px))


def test_two_parts_fill_the_rows_they_name(whole_pack: Pack) -> None:
    codes = np.empty((5, whole_pack.code_bytes), dtype=np.uint8)
    views = np.empty((5, whole_pack.side_px, whole_pack.side_px, 3), dtype=np.uint8)
    reader = whole_pack.sample_reader()

    reader.read(Part("v001", np.array([3, 0]), np.array([4, 0])), codes, views)
    reader.read(Part("v000", np.array([7, 3, 3]), np.array([1, 2, 3])), codes, views)

    for place, (view, number) in enumerate([("v001", 0), ("v000", 7), ("v000", 3), ("v000", 3), ("v001", 3)]):
        assert np.array_equal(codes[place], np.concatenate(expected_codes(view, ROWS[number], whole_pack.targets)))
        assert np.array_equal(views[place], expected_view(view, ROWS[number], whole_pack.side_px))


def test_raw_samples_are_the_members_themselves(whole_pack: Pack) -> None:
    reader = whole_pack.sample_reader()
    numbers = np.array([5, 1])
    sizes = reader.view_sizes("v000", numbers)

    raw = reader.read_raw(
        "v000", numbers, np.empty((2, whole_pack.code_bytes), np.uint8), np.empty(sizes.sum() + 9, np.uint8)
    )

    assert raw.ends == np.cumsum(sizes).tolist()
    assert raw.view_bytes.size == sizes.sum()
    assert raw.view_bytes[:8].tobytes() == raw.view_bytes[raw.ends[0] :][:8].tobytes() == b"\x89PNG\r\n\x1a\n"
    assert reader.bytes_read == sizes.sum() + 2 * whole_pack.code_bytes


def test_a_buffer_that_is_too_small_is_refused(whole_pack: Pack) -> None:
    codes = np.empty((1, whole_pack.code_bytes), np.uint8)

    with pytest.raises(ValueError, match="do not fit"):
        whole_pack.sample_reader().read_raw("v000", np.array([0]), codes, np.empty(3, np.uint8))


def test_any_flipped_byte_of_codes_view_or_document_is_found(pack_copy: Pack) -> None:
    record = pack_copy.sample_reader().index("v000").read(np.array([4]))[0]
    path = pack_copy.path / samples.tar_name("v000", int(record["tar"]))
    whole = path.read_bytes()

    for name in ("codes", "view", "json"):
        for place in range(int(record[f"{name}_size"])):
            damaged = bytearray(whole)
            damaged[int(record[f"{name}_offset"]) + place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ChecksumError, match=r"s00001\.tar: image row 5"):
                pack_copy.sample_reader().read_json("v000", 4) if name == "json" else read(pack_copy, "v000", [4])


def test_the_message_names_tar_row_and_byte(pack_copy: Pack) -> None:
    path = pack_copy.path / "v000" / "s00001.tar"
    data = bytearray(path.read_bytes())
    data[512] ^= 255
    path.write_bytes(data)

    with pytest.raises(
        ChecksumError, match=r"v000/s00001\.tar: image row 3, byte 512: the codes .*proteus-cache repair"
    ):
        read(pack_copy, "v000", [3])


def test_a_tar_that_is_cut_missing_or_a_link_is_refused(pack_copy: Pack) -> None:
    path = pack_copy.path / "v000" / "s00000.tar"
    data = path.read_bytes()

    path.write_bytes(data[:600])
    with pytest.raises(FormatError, match=r"s00000\.tar: image row 2: the tar is cut short"):
        read(pack_copy, "v000", [2])
    path.unlink()
    with pytest.raises(StorageError, match=r"s00000\.tar: cannot open: No such file"):
        read(pack_copy, "v000", [2])
    path.with_name("elsewhere").write_bytes(data)
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(StorageError, match=r"s00000\.tar: cannot open: Too many levels"):
        read(pack_copy, "v000", [2])
    folder = pack_copy.path / "v001"
    folder.rename(pack_copy.path / "elsewhere")
    folder.symlink_to(pack_copy.path / "elsewhere")
    with pytest.raises(StorageError, match=r"v001/s00000\.tar: cannot open: Not a directory"):
        read(pack_copy, "v001", [2])


def test_short_reads_are_continued(whole_pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(whole_pack, "v000", [0, 5])
    preadv = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [np.asarray(buffers[0])[:7].data], offset)

    monkeypatch.setattr(os, "preadv", short)
    pieces = read(whole_pack, "v000", [0, 5])

    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_an_error_of_the_disk_is_not_damage(whole_pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)

    with pytest.raises(StorageError, match=r"s00000\.tar: image row 0: cannot read: Input/output error"):
        read(whole_pack, "v000", [0])


def test_few_tars_stay_open(whole_pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_OPEN_TARS", 2)
    reader = whole_pack.sample_reader()
    codes = np.empty((22, whole_pack.code_bytes), dtype=np.uint8)
    views = np.empty((22, 8, 8, 3), dtype=np.uint8)

    for view in ("v000", "v001"):
        reader.read(Part(view, np.array([*range(11), *range(11)]), np.arange(22)), codes, views)

    assert len(reader._tars) == 2
    reader.close()
    assert len(reader._tars) == 0


def test_a_view_that_does_not_decode_is_named(pack_copy: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise FormatError("view: cannot be decoded")

    monkeypatch.setattr(samples, "decode_view", refuse)

    with pytest.raises(DamageError, match=r"s00000\.tar: image row 1: view: cannot be decoded"):
        read(pack_copy, "v000", [1])


def test_an_index_that_names_another_tar_is_caught(pack_copy: Pack, tmp_path: Path) -> None:
    first, second = (pack_copy.path / "v000" / f"s{number:05d}.tar" for number in (0, 3))
    first.write_bytes(second.read_bytes())

    with pytest.raises(ChecksumError):
        read(pack_copy, "v000", [0])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "run `proteus-cache repair PACK`"),
        (errno.EACCES, "make it readable for this user"),
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.ESTALE, "look at the disk"),
    ],
)
def test_a_file_that_cannot_be_opened_or_read_says_what_to_do(
    whole_pack: Pack, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    reader = whole_pack.sample_reader()
    reader.read_json("v000", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=rf"v000/s00000\.tar: image row 0: cannot read: .*{remedy}"):
            reader.read_json("v000", 0)
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError, match=rf"v000/s00000\.tar: cannot open: .*{remedy}"):
        samples.open_tar(whole_pack.path / "v000/s00000.tar")
    with pytest.raises(StorageError, match=rf"v001\.idx: cannot open the index: .*{remedy}"):
        whole_pack.sample_reader().read_json("v001", 0)
