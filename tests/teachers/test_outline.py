"""An outline says of a teacher what the loaded teacher says of itself."""

from pathlib import Path

import pytest

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.outline import outline_teacher
from proteus_cache.teachers.registry import load_teacher
from tests.makers import make_teacher


@pytest.mark.parametrize(
    ("name", "weights", "size_px"),
    [
        ("dinov2_vits14", "random:0", None),
        ("dinov2_vits14_reg", "random:0", 112),
        ("timm:vit_tiny_patch16_224", "random:0", None),
        ("timm:vit_tiny_patch16_224", "random:0", 112),
        ("demo", None, None),
        ("vit", "{file}", None),
        ("vit", "{file}", 64),
    ],
)
def test_an_outline_is_that_of_the_loaded_teacher(
    name: str, weights: str | None, size_px: int | None, tmp_path: Path
) -> None:
    file = make_teacher(tmp_path / "teacher.safetensors")
    given = None if weights is None else weights.format(file=file)
    teacher = load_teacher(name, weights=given, home=tmp_path, size_px=size_px)

    outline = outline_teacher(name, weights=given, size_px=size_px)

    for field in ("name", "size_px", "patch_px", "width", "depth", "mean", "std"):
        assert getattr(outline, field) == getattr(teacher.identity, field), field
    assert outline.n_prefix_tokens == 1 + teacher.identity.n_register_tokens
    assert outline.n_patches == teacher.n_patches
    for target in ("cls", "patch", "block.0", "block.0.raw"):
        assert outline.target_shape(target) == teacher.target_shape(target)


@pytest.mark.parametrize(
    ("name", "weights", "size_px", "message"),
    [
        ("dinov2_vitg", None, None, "did you mean dinov2_vitg14"),
        ("dinov2_vitg14", None, 225, "try 224 or 238"),
        ("timm:resnet50", None, None, "no plain ViT"),
        ("vit", None, None, "needs --weights"),
        ("demo", "other.safetensors", None, "comes with its weights"),
    ],
)
def test_what_cannot_be_loaded_has_no_outline(
    name: str, weights: str | None, size_px: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        outline_teacher(name, weights=weights, size_px=size_px)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no\.safetensors"):
        outline_teacher("vit", weights=str(tmp_path / "no.safetensors"), size_px=None)


def test_a_target_that_a_teacher_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no target 'block\.12'; it has cls, patch and block\.0 to block\.11"):
        outline_teacher("dinov2_vits14", weights=None, size_px=None).target_shape("block.12")
