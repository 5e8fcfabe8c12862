from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proteus_cache.errors import UsageError
from proteus_cache.teachers.registry import TEACHERS, check_teacher_name, fetch_weights, load_teacher


def test_names_of_all_teachers() -> None:
    plain: tuple[str, ...] = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")

    assert (*plain, *(f"{name}_reg" for name in plain), "demo", "vit") == TEACHERS


def test_unknown_name_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown teacher 'dinov2_vitg'; did you mean dinov2_vitg14"):
        load_teacher("dinov2_vitg", weights="random:0", home=tmp_path, size_px=None)


def test_a_name_like_no_other_lists_all() -> None:
    for name in ("", "timm:", "qqq"):
        with pytest.raises(UsageError, match=r"choose dinov2_vits14, .*vit or timm:NAME"):
            check_teacher_name(name)


def test_fetch_is_for_teachers_with_published_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to fetch for 'vit'"):
        fetch_weights("vit", tmp_path)
    with pytest.raises(UsageError, match="unknown teacher"):
        fetch_weights("dinov3_vits14", tmp_path)


def test_names_are_known_without_torch() -> None:
    code = "import sys, proteus_cache.teachers.registry; assert not {'torch', 'timm'} & sys.modules.keys()"

    subprocess.run([sys.executable, "-c", code], check=True)
