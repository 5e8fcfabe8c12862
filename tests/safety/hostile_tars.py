"""Malformed tars, made from the files of an honest one."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

from numcodecs.zstd import Zstd

from proteus_cache import tar

Files = list[tuple[str, bytes]]


def honest(files: Files) -> bytes:
    """The tar that a pack or a cache would have of these files."""
    return b"".join(member(name, data) for name, data in files) + tar.END


def member(name: str, data: bytes) -> bytes:
    """Header, data and padding."""
    return tar.header(name, len(data)) + data + tar.padding(len(data))


def sealed(block: bytes) -> bytes:
    """A header with its checksum set right."""
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def patched(name: str, size: int, *changes: tuple[int, bytes]) -> bytes:
    """A header with other bytes at some offsets, its checksum right."""
    block = bytearray(tar.header("a_0.json", size))
    block[:100] = name.encode("latin-1")[:100].ljust(100, b"\0")
    for offset, data in changes:
        block[offset : offset + len(data)] = data
    return sealed(bytes(block))


def base256(value: int) -> bytes:
    """A size field as GNU tar writes what octal digits cannot hold."""
    return (value & ((1 << 96) - 1) | (1 << 95)).to_bytes(12, "big")


def malformed(files: Files) -> dict[str, bytes]:
    """Name of the attack to the bytes of the tar."""
    good = honest(files)
    (name, data), rest = files[0], b"".join(member(*file) for file in files[1:]) + tar.END
    tail = data + tar.padding(len(data)) + rest
    size = len(data)
    first_end = tar.BLOCK + tar.padded(size)
    key, _, extension = name.partition(".")
    found = {
        "empty": b"",
        "one byte": b"a",
        "511 bytes": good[:511],
        "only zero blocks": bytes(len(good)),
        "one zero block at the end": good[: -tar.BLOCK],
        "no end blocks": good[: -2 * tar.BLOCK],
        "junk after the end": good + b"junk",
        "a block after the end": good + bytes(tar.BLOCK),
        "cut in a header": good[: first_end + 100],
        "cut in data": good[: tar.BLOCK + size // 2],
        "cut in padding": good[: tar.BLOCK + size + 1],
        "cut between members": good[:first_end],
        "bad checksum": good[:148] + b"000001\0 " + good[156:],
        "padding that is not zero": good[: tar.BLOCK + size] + b"x" + good[tar.BLOCK + size + 1 :],
        "size off by one more": patched(name, size + 1) + tail,
        "size off by one less": patched(name, size - 1) + tail,
        "size larger than the file": patched(name, tar.MAX_MEMBER_BYTES) + tail,
        "size of 8 GiB": patched(name, size, (124, b"77777777777\0")) + tail,
        "overlapping members": patched(name, 0) + tail,
    }
    found |= {f"size {what}": patched(name, size, (124, field)) + tail for what, field in _sizes(size).items()}
    found |= {f"name {what}": patched(text, size) + tail for what, text in _names(key, extension).items()}
    found |= {
        f"type {flag!r}": patched(name, size, (156, flag)) + tail
        for flag in (b"\0", *(bytes([code]) for code in b"1234567xgLKSVMNADZ"))
    }
    found |= {
        "signed checksum": _signed(patched(name, size, (265, b"\xe9\xe9"))) + tail,
        "magic of v7": patched(name, size, (257, bytes(8))) + tail,
        "magic of GNU": patched(name, size, (257, b"ustar  \0")) + tail,
        "prefix field": patched(name, size, (345, b"etc")) + tail,
        "owner": patched(name, size, (265, b"root")) + tail,
        "mode with setuid": patched(name, size, (100, b"0006755\0")) + tail,
        "time": patched(name, size, (136, b"14000000000\0")) + tail,
        "link name": patched(name, size, (157, b"/etc/passwd")) + tail,
    }
    return found | _others(files)


def _sizes(size: int) -> dict[str, bytes]:
    return {
        "negative": base256(-1),
        "of 2^62": base256(1 << 62),
        "of 2^88": base256(1 << 88),
        "in base 256": base256(size),
        "with spaces": b"%11o " % size,
        "not octal": b"0000000009x\0",
        "without an end": b"%012o" % size,
    }


def _names(key: str, extension: str) -> dict[str, str]:
    return {
        "empty": "",
        "unterminated": "a" * 96 + ".jpg",
        "absolute": f"/tmp/{key}.{extension}",
        "upwards": f"../{key}.{extension}",
        "with a backslash": f"..\\{key}.{extension}",
        "with NUL inside": f"{key}\0x.{extension}",
        "not UTF-8": f"\xff\xfe{key}.{extension}",
        "with a line break": f"{key}\n.{extension}",
        "with escape codes": f"\x1b[2J{key}.{extension}",
        "in upper case": f"{key.upper()}.{extension}",
        "with two dots": f"{key}.x.{extension}",
        "with a leading dot": f".{extension}",
        "without extension": key,
        "with a folder": f"v000/{key}.{extension}",
        "of metadata": "__meta__.json",
        "of another sample": f"other_0123456789.{extension}",
    }


def _signed(block: bytes) -> bytes:
    """The checksum as some old programs made it, of signed bytes."""
    whole = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 if byte > 127 else byte for byte in whole)
    return block[:148] + b"%06o\0 " % total + block[156:]


def _others(files: Files) -> dict[str, bytes]:
    good, name = honest(files), files[0][0]
    key, _, extension = name.partition(".")
    found: dict[str, bytes] = {
        "duplicate member": honest([files[0], *files]),
        "members of two samples mixed": honest([files[-1], *files[:-1]]),
        "missing member": honest(files[1:]),
        "extra member": honest([*files, ("z_0123456789.json", b"{}\n")]),
        "gzip": gzip.compress(good, mtime=0),
        "bzip2": bz2.compress(good),
        "xz": lzma.compress(good),
        "zstd": bytes(Zstd().encode(good)),
        "zip after the tar": good + _zip(),
        "zip": _zip(),
        "GNU sparse": _python_tar(files, sparse=True),
        "PAX path": _python_tar(files, pax={"path": "../../evil.json"}),
        "PAX size": _python_tar(files, pax={"size": str(1 << 60)}),
        "PAX global": _python_tar(files, pax_global={"path": "/evil"}),
        "many empty members": b"".join(tar.header(f"k{number}.json", 0) for number in range(100_000)) + tar.END,
    }
    for other in ("pyd", "pkl", "pickle", "pth", "npz", "npy", "gz", "cls", "exe", "pt"):
        found[f"extension {other}"] = honest([(f"{key}.{other}", files[0][1]), *files[1:]])
        found[f"extra member of extension {other}"] = honest([*files, (f"{key}.{other}", b"cos\nsystem\n(S'x'\ntR.")])
    found["extension json.gz"] = patched(f"{key}.{extension}.gz", len(files[0][1])) + good[tar.BLOCK :]
    return found


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.pkl", b"x")
    return buffer.getvalue()


def _python_tar(
    files: Files,
    *,
    pax: dict[str, str] | None = None,
    pax_global: dict[str, str] | None = None,
    sparse: bool = False,
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax_global) as file:
        for number, (name, data) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == 0:
                info.pax_headers = dict(pax or {})
                if sparse:
                    info.pax_headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
