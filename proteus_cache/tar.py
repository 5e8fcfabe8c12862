"""The tar files of caches and packs: plain USTAR, always the same bytes for the same members.

Members are regular files with names `key.extension`, mode 0644, no owner, time 0, data padded to 512 bytes; two zero
blocks end the file and nothing follows. `parse_header` accepts exactly that and nothing else: no links, folders,
extended headers, base-256 numbers or odd names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from proteus_cache.errors import FormatError

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_MEMBER_BYTES = 1 << 30
MEMBER_NAME = re.compile(r"([a-z0-9_]{1,64})\.([a-z0-9]{1,16})\Z")
_HEADER = b"%b%b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00%b0%bustar\x0000%b"


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar."""

    name: str
    offset: int
    """Of its data, in bytes from the start of the tar."""
    size: int

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]

    @property
    def extension(self) -> str:
        return self.name.partition(".")[2]

    @property
    def end(self) -> int:
        """Where the next header (or the end) begins."""
        return self.offset + padded(self.size)


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def member_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: header, data, padding."""
    return BLOCK + padded(size)


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data."""
    if MEMBER_NAME.match(name) is None or not 0 <= size <= MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r} of {size} bytes cannot be a member")
    encoded = name.encode("ascii")
    start = encoded + bytes(100 - len(encoded))
    block = _HEADER % (start, b"", size, b" " * 8, bytes(100), bytes(BLOCK - 265))
    checksum = b"%06o\x00 " % sum(block)
    return block[:148] + checksum + block[156:]


def padding(size: int) -> bytes:
    """The zeros after a member's data."""
    return bytes(padded(size) - size)


def parse_header(block: bytes, offset: int, end: int, what: str) -> Member | None:
    """The member whose header stands at `offset` of a tar of `end` bytes; None for a zero block.

    Raises:
        FormatError: anything that `header` would not have written, or data that would not fit into the file.
    """
    if block == bytes(BLOCK):
        return None
    where = f"{what}: at byte {offset}"
    name = block[: block.find(b"\0")].decode("ascii", errors="replace")
    if len(block) != BLOCK or MEMBER_NAME.match(name) is None or re.fullmatch(rb"[0-7]{11}\0", block[124:136]) is None:
        raise FormatError(f"{where}: not the header of a sample's file")
    size = int(block[124:135], 8)
    if size > MAX_MEMBER_BYTES or block != header(name, size):
        raise FormatError(f"{where}: the header of {name} is damaged or of another kind")
    member = Member(name, offset + BLOCK, size)
    if member.end + len(END) > end:
        raise FormatError(f"{where}: {name} does not fit into the file (cut short?)")
    return member


def members(file: BinaryIO, size: int, what: str, most: int) -> Iterator[Member]:
    """All members of a tar of `size` bytes, in order; reads headers only.

    Args:
        file: the tar.
        size: its bytes.
        what: file, for messages.
        most: members that there may be.

    Raises:
        FormatError: a header is wrong, padding is not zero, there are too many members, or the tar does not end with
            two zero blocks.
    """
    offset = n_members = 0
    while True:
        file.seek(offset)
        member = parse_header(file.read(BLOCK), offset, size, what)
        if member is None:
            break
        n_members += 1
        if n_members > most:
            raise FormatError(f"{what}: holds more than the {most:,} files that it should")
        yield member
        file.seek(member.offset + member.size)
        if any(file.read(member.end - member.offset - member.size)):
            raise FormatError(f"{what}: {member.name} is followed by something that is not padding")
        offset = member.end
    file.seek(offset)
    if file.read(len(END) + 1) != END:
        raise FormatError(f"{what}: does not end with two zero blocks at byte {offset}")
