"""tar: the bytes of Python's own USTAR writer, and a reader that takes nothing else."""

import io
import tarfile

import pytest

from proteus_cache import tar
from proteus_cache.errors import FormatError


def _tar(*files: tuple[str, bytes]) -> bytes:
    return b"".join(tar.header(name, len(data)) + data + tar.padding(len(data)) for name, data in files) + tar.END


_FILES = (("a_0.jpg", b"x" * 1000), ("a_0.json", b"{}\n"), ("b_1.png", b""), ("b_1.json", b"y" * 512))


def _read(data: bytes) -> list[tuple[str, bytes]]:
    members = tar.members(io.BytesIO(data), len(data), "t.tar", most=100)
    return [(member.name, data[member.offset : member.offset + member.size]) for member in members]


def test_members_come_back_in_order() -> None:
    assert _read(_tar(*_FILES)) == list(_FILES)


def test_headers_are_those_of_tarfile() -> None:
    for name, data in _FILES:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        assert tar.header(name, len(data)) == info.tobuf(tarfile.USTAR_FORMAT)


def test_tarfile_reads_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(_tar(*_FILES))) as file:
        found = [(member.name, file.extractfile(member).read()) for member in file]  # type: ignore[union-attr]

    assert found == list(_FILES)


def test_every_flipped_bit_of_a_header_is_found() -> None:
    data = _tar(("a_0.jpg", b"x" * 700))

    for position in range(512):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(FormatError, match="t.tar"):
                _read(bytes(damaged))


def test_every_cut_is_found() -> None:
    data = _tar(*_FILES)

    for length in range(0, len(data), 64):
        with pytest.raises(FormatError):
            _read(data[:length])


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "/a.jpg",
        "a/b.jpg",
        "A.jpg",
        "a",
        "a.b.c",
        ".jpg",
        "a.",
        "é.jpg",
        "a\n.jpg",
        "a" * 65 + ".jpg",
    ],
)
def test_names_that_no_sample_has_are_refused(name: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = 3
    data = info.tobuf(tarfile.USTAR_FORMAT)[:512] + b"abc" + bytes(509) + tar.END

    with pytest.raises(FormatError):
        _read(data)
    with pytest.raises(ValueError, match="cannot be a member"):
        tar.header(name, 3)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"7", b"x", b"g", b"L", b"K", b"S", b"\0"])
def test_other_kinds_of_members_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("a_0.jpg")
    info.type = kind

    with pytest.raises(FormatError):
        _read(info.tobuf(tarfile.USTAR_FORMAT) + tar.END)


def test_a_size_beyond_the_file_is_refused_at_once() -> None:
    for size in (1 << 20, 1 << 62, 1 << 80):
        info = tarfile.TarInfo("a_0.jpg")
        info.size = size
        with pytest.raises(FormatError):
            _read(info.tobuf(tarfile.GNU_FORMAT) + tar.END)


def test_what_follows_the_end_and_odd_padding_are_refused() -> None:
    data = _tar(("a_0.jpg", b"x" * 100))

    for damaged in (data + bytes(512), data + b"x", data[:700] + b"x" + data[701:]):
        with pytest.raises(FormatError):
            _read(damaged)
