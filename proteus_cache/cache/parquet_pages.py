"""How much the columns of a Parquet file unpack to, by the header of every page: the sums in its footer may lie.

A page header is a struct of Thrift's compact protocol with the size of the page before and after compression and its
encoding. Only encodings that give no more bytes than the page has are accepted, and references into a dictionary.
"""

from __future__ import annotations

from typing import Any

from proteus_cache.errors import FormatError

_SIZE, _STORED_SIZE = 2, 3
_ENCODING = {5: 2, 7: 2, 8: 4}
"""Field of the header of a data page, dictionary page or data page of version 2, to the field of its encoding."""
_ENCODINGS = {0, 2, 3, 8}
"""PLAIN, RLE, and the two names of references into a dictionary."""
_MAX_HEADER_BYTES = 1 << 16
_MOST_DEEP = 3
_TRUE, _FALSE, _I16, _I32, _I64, _BINARY, _STRUCT = 1, 2, 4, 5, 6, 8, 12

Fields = dict[int, Any]
"""Field id to a number, to the fields of a struct, or to None for what is passed over."""


def unpacked_bytes(data: bytes, start: int, size: int, most_pages: int) -> int:
    """Bytes of all pages of one column chunk after decompression.

    Args:
        data: of the file.
        start: of the chunk in it.
        size: of the chunk.
        most_pages: that it may have.

    Raises:
        FormatError: it is not made of pages, has too many, or one with an encoding that can unpack to any size.
    """
    if not 0 <= start <= start + size <= len(data):
        raise FormatError("a column lies outside of the file")
    position, end, total = start, start + size, 0
    for _ in range(most_pages):
        if position == end:
            return total
        header, n_bytes = _page_header(data[position : min(end, position + _MAX_HEADER_BYTES)])
        stored, unpacked = header.get(_STORED_SIZE), header.get(_SIZE)
        if not (isinstance(stored, int) and isinstance(unpacked, int) and stored >= 0 and unpacked >= 0):
            raise FormatError("a page has no size")
        for kind, field in _ENCODING.items():
            if kind in header and (not isinstance(header[kind], dict) or header[kind].get(field) not in _ENCODINGS):
                raise FormatError("a page has an encoding that no cache has")
        position += n_bytes + stored
        total += unpacked
    raise FormatError("it has too many pages")


def _page_header(data: bytes) -> tuple[Fields, int]:
    try:
        return _fields(data, 0, 0)
    except IndexError as error:
        raise FormatError("a page is cut short") from error


def _fields(data: bytes, at: int, depth: int) -> tuple[Fields, int]:
    """The fields of a struct, and where it ends."""
    found: Fields = {}
    number = 0
    while (start := data[at]) != 0:
        at += 1
        kind, step = start & 15, start >> 4
        if step == 0:
            number, at = _number(data, at)
        else:
            number += step
        value: Any = None
        if kind in (_I16, _I32, _I64):
            value, at = _number(data, at)
        elif kind == _BINARY:
            length, at = _varint(data, at)
            at += length
        elif kind == _STRUCT and depth < _MOST_DEEP:
            value, at = _fields(data, at, depth + 1)
        elif kind not in (_TRUE, _FALSE):
            raise FormatError("a page has a header of another kind")
        if number in found:
            raise FormatError("a page header holds a field twice")
        found[number] = value
    return found, at + 1


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(0, 35, 7):
        value |= (data[at] & 127) << place
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise FormatError("a page header holds a number beyond 32 bits")
