from __future__ import annotations

import pytest

from proteus_cache.errors import ConfigError
from proteus_cache.train.blocks import chosen_blocks, is_block, is_raw, parse_blocks, student_block


@pytest.mark.parametrize(
    ("teacher_depth", "student_depth", "expected"),
    [
        (12, 12, list(range(12))),
        (24, 12, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]),
        (12, 24, list(range(1, 24, 2))),
        (4, 2, [0, 0, 1, 1]),
        (40, 12, None),
        (3, 1, [0, 0, 0]),
    ],
)
def test_a_block_faces_the_one_at_its_relative_depth(
    teacher_depth: int, student_depth: int, expected: list[int] | None
) -> None:
    found = [
        student_block(f"block.{n}", teacher_depth=teacher_depth, student_depth=student_depth)
        for n in range(teacher_depth)
    ]

    assert expected is None or found == expected
    assert found[-1] == student_depth - 1
    assert found == sorted(found)
    for n, block in enumerate(found):
        exact = (n + 1) / teacher_depth * student_depth - 1
        assert abs(block - exact) <= 0.5 or (block == 0 and exact < 0)


def test_raw_targets_face_the_same_block() -> None:
    assert student_block("block.5.raw", teacher_depth=12, student_depth=4) == 1
    assert is_raw("block.5.raw")
    assert not is_raw("block.5")


def test_block_targets_are_told_from_others() -> None:
    names = ("cls", "patch", "block.0", "block.39.raw", "block.01", "block.", "block.1.norm", "block.1000")

    assert [name for name in names if is_block(name)] == ["block.0", "block.39.raw"]


def test_a_list_of_blocks_is_read() -> None:
    assert parse_blocks("block.5, block.11.raw") == ("block.5", "block.11.raw")
    assert chosen_blocks(("block.5",), ["cls", "block.1"]) == ("block.5",)
    assert chosen_blocks(None, ["cls", "block.1", "block.0.raw"]) == ("block.1", "block.0.raw")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cls", "comma separated, got 'cls'"),
        ("block.1,,block.2", "comma separated, got ''"),
        ("block.1,block.1", "blocks names block.1 twice"),
    ],
)
def test_a_wrong_list_of_blocks_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_blocks(text)
