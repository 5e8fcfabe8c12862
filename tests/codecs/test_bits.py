"""bits: the bytes of packed integers, and the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_cache.codecs.bits import pack, packed_bytes, unpack


@settings(max_examples=60)
@given(bits=st.integers(1, 8), n=st.integers(1, 70), batch=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_integers_come_back(bits: int, n: int, batch: int, seed: int) -> None:
    levels = torch.randint(0, 1 << bits, (batch, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

    data = pack(levels, bits)

    assert data.shape == (batch, packed_bytes(n, bits))
    assert torch.equal(unpack(data, n, bits), levels)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_view_takes_no_more_than_its_bits_and_one_byte_a_field(bits: int) -> None:
    assert packed_bytes(256, bits) == 32 * bits
    assert packed_bytes(257, bits) <= 32 * bits + bits.bit_count() + 1


def test_bytes_are_the_documented_ones() -> None:
    three_bits = torch.tensor([[5, 0, 7, 2, 6]], dtype=torch.uint8)
    # High two bits 2, 0, 3, 1, 3 in two bytes: byte j holds integers j, j + 2, j + 4. Low bits 1, 0, 1, 0, 0 in one.
    assert pack(three_bits, 3).tolist() == [[2 | 3 << 2 | 3 << 4, 0 | 1 << 2, 1 | 1 << 2]]
    nibbles = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert pack(nibbles, 4).tolist() == [[1 | 3 << 4, 2]]


def test_bits_without_an_integer_are_zero() -> None:
    ones = torch.full((1, 9), 1, dtype=torch.uint8)
    assert pack(ones, 1).tolist() == [[0b00011111, 0b00001111]]
