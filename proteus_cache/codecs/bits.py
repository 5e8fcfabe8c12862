"""Unsigned integers of 1 to 8 bits in bytes, and back, by shifts and masks alone.

A group of n integers of b bits is written field by field: b is split into its powers of two, the largest first
(5 = 4 + 1, 7 = 4 + 2 + 1), the first field holding the highest bits. A field of w bits takes m = ceil(n w / 8) bytes,
and byte j holds the integers j, j + m, j + 2 m, ... from its lowest bits up; bits without an integer are 0. Integers
that lie side by side thus come from bytes that lie side by side, and no step depends on the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n integers of so many bits take."""
    return sum(-(-n * width // 8) for width in _FIELDS[bits])


def pack(levels: Tensor, bits: int) -> Tensor:
    """Integers to bytes.

    Args:
        levels: (B, n) uint8, below 2 ** bits.
        bits: 1 to 8.

    Returns:
        (B, packed_bytes(n, bits)) uint8.
    """
    fields, below = [], bits
    for width in _FIELDS[bits]:
        below -= width
        fields.append(_pack_field((levels >> below) & ((1 << width) - 1) if len(_FIELDS[bits]) > 1 else levels, width))
    return fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)


def unpack(data: Tensor, n: int, bits: int) -> Tensor:
    """Bytes to integers.

    Args:
        data: (B, packed_bytes(n, bits)) uint8.
        n: integers in each row.
        bits: 1 to 8.

    Returns:
        (B, n) uint8.
    """
    levels: Tensor | None = None
    first = 0
    for width in _FIELDS[bits]:
        end = first + -(-n * width // 8)
        field = _unpack_field(data[:, first:end], n, width)
        levels = field if levels is None else (levels << width).bitwise_or_(field)
        first = end
    assert levels is not None
    return levels


def _pack_field(values: Tensor, width: int) -> Tensor:
    if width == 8:
        return values
    batch, n = values.shape
    slots = 8 // width
    n_bytes = -(-n // slots)
    if n < slots * n_bytes:
        values = torch.nn.functional.pad(values, (0, slots * n_bytes - n))
    planes = values.reshape(batch, slots, n_bytes)
    packed = planes[:, 0].clone()
    for slot in range(1, slots):
        packed.bitwise_or_(planes[:, slot] << (slot * width))
    return packed


def _unpack_field(data: Tensor, n: int, width: int) -> Tensor:
    if width == 8:
        return data
    batch, n_bytes = data.shape
    mask = (1 << width) - 1
    values = torch.empty((batch, 8 // width, n_bytes), dtype=torch.uint8, device=data.device)
    for slot in range(8 // width):
        torch.bitwise_right_shift(data, slot * width, out=values[:, slot])
    return values.bitwise_and_(mask).reshape(batch, -1)[:, :n]
