from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.students.registry import STUDENTS, build_student, student_metadata

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def _build(name: str = "vit_ti14", *, size_px: int = 28, patch_px: int = 14, seed: int = 0) -> VisionTransformer:
    return build_student(name, size_px=size_px, patch_px=patch_px, mean=MEAN, std=STD, seed=seed)


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_ti14", 5.51), ("vit_s14", 21.63), ("vit_b14", 85.73), ("vit_l14", 303.2)]
)
def test_sizes_are_those_of_the_paper(name: str, millions: float) -> None:
    with torch.device("meta"):
        student = _build(name, size_px=224)

    # The paper's counts include DINOv2's mask token, which lives beside our student.
    parameters = sum(parameter.numel() for parameter in student.parameters()) + STUDENTS[name].width
    assert parameters / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vit_s14", "vit_small_patch14_dinov2"),
        ("vit_b14", "vit_base_patch14_dinov2"),
        ("vit_l14", "vit_large_patch14_dinov2"),
    ],
)
def test_weights_have_the_layout_of_timms_own_models(name: str, theirs: str) -> None:
    with torch.device("meta"):
        ours = _build(name, size_px=224).state_dict()
        expected = timm.create_model(theirs, img_size=224, num_classes=0).state_dict()

    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}


def test_initialisation_is_the_released_one() -> None:
    student = _build(size_px=224)

    for name, value in student.state_dict().items():
        if name == "cls_token":
            assert value.std().item() == pytest.approx(1e-6, rel=0.2)
        elif name == "pos_embed" or (name.endswith("weight") and value.ndim == 2):
            assert value.std().item() == pytest.approx(0.02, rel=0.02), name
        elif name.startswith("patch_embed"):
            assert value.abs().max() <= (3 * 14 * 14) ** -0.5
        else:  # LayerScale and norms start at 1, biases at 0
            assert value.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
    norms = [module for module in student.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 25
    assert {norm.eps for norm in norms} == {1e-6}


def test_nothing_drops_anything() -> None:
    student = _build().train()
    pixels = torch.randn(2, 3, 28, 28)

    assert torch.equal(student.forward_features(pixels), student.forward_features(pixels))


def test_a_seed_fixes_the_weights_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()

    first, second, other = _build(seed=1), _build(seed=1), _build(seed=2)

    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed"):
        assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_picture_patch_and_pixel_statistics_come_from_the_arguments() -> None:
    student = _build(size_px=32, patch_px=4)

    assert student.patch_embed.num_patches == 64
    data = resolve_model_data_config(student)  # type: ignore[no-untyped-call]  # untyped in timm
    assert (data["input_size"], data["mean"], data["std"]) == ((3, 32, 32), MEAN, STD)


def test_metadata_rebuild_the_model() -> None:
    metadata = student_metadata("vit_ti14", size_px=28, patch_px=14, mean=MEAN, std=STD)

    rebuilt = VisionTransformer(**json.loads(metadata["timm_vision_transformer"]))

    rebuilt.load_state_dict(_build().state_dict(), strict=True)
    assert json.loads(metadata["pixel_mean"]) == list(MEAN)
    assert json.loads(metadata["pixel_std"]) == list(STD)


def test_an_unknown_student_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown student 'vit_s16'; did you mean vit_s14"):
        _build("vit_s16")


def test_patches_must_tile_the_picture() -> None:
    with pytest.raises(ConfigError, match="patches of 14 px do not tile a picture of 32 px"):
        _build(size_px=32)
