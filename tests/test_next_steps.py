"""Suggested commands are quoted and will work."""

from typing import Any

import pytest

from proteus_cache import next_steps
from proteus_cache.students.registry import STUDENTS


def cache_of(n_images: int, **changes: Any) -> dict[str, Any]:
    """A summary of a cache of DINOv2-g."""
    return {
        "kind": "cache",
        "path": "/data/my cache",
        "cache_id": "0" * 64,
        "teacher": {"name": "dinov2_vitg14", "width": 1536},
        "targets": {"cls": {}, "patch": {}},
        "images": {"n_images": n_images, "held_out": [3]},
        "shard_size": 100,
        **changes,
    }


def test_a_path_is_quoted_for_the_shell() -> None:
    assert next_steps.train_on(cache_of(2000)) == "proteus-cache train --student vit_s14 --data '/data/my cache'"


@pytest.mark.parametrize(
    ("n_images", "batch"),
    [(1124, None), (1123, 128), (1100, 128), (612, 128), (611, 64), (164, 16), (104, 2), (102, 2)],
)
def test_a_batch_that_the_images_fill_is_added_where_the_published_one_is_larger(
    n_images: int, batch: int | None
) -> None:
    suggested = next_steps.train_on(cache_of(n_images))

    assert suggested is not None
    assert suggested.partition(" --batch-size ")[2] == ("" if batch is None else str(batch))


def test_nothing_is_suggested_that_would_be_refused() -> None:
    assert next_steps.train_on(cache_of(101)) is None
    assert next_steps.train_on(cache_of(2000, targets={"cls": {}})) is None


@pytest.mark.parametrize(
    ("teacher", "width", "student"),
    [
        ("dinov2_vitg14", 1536, "vit_s14"),
        ("dinov2_vitl14", 1024, "vit_s14"),
        ("dinov2_vitb14", 768, "vit_s14"),
        ("dinov2_vits14", 384, "vit_ti14"),
        ("timm:vit_tiny_patch16_224", 192, "vit_demo"),
        ("demo", 192, "vit_demo"),
        ("vit", 24, "vit_demo"),
    ],
)
def test_the_suggested_student_is_smaller_than_its_teacher(teacher: str, width: int, student: str) -> None:
    assert next_steps.suggested_student(teacher, width) == student
    assert student in STUDENTS


def test_a_run_is_evaluated_when_it_is_finished_and_finished_before() -> None:
    finished = {"kind": "run", "path": "/runs/a b", "weights": ["student.safetensors"]}

    assert next_steps.after(finished) == "proteus-cache eval '/runs/a b' --images DIR"
    assert next_steps.after(finished | {"weights": []}) == (
        "proteus-cache train --config '/runs/a b/config.yaml' --resume --out '/runs/a b'"
    )


def test_an_unfinished_cache_is_finished_first() -> None:
    suggested = next_steps.after(cache_of(2000, cache_id=None))

    assert suggested is not None
    assert suggested.startswith("the same `proteus-cache extract` again")
