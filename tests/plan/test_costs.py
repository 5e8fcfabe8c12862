"""FLOPs by formula against published counts and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from proteus_cache.plan.costs import STEP, VitShape, plain_vit, student_shape, teacher_shape
from proteus_cache.teachers.backbone import build_vision_transformer
from proteus_cache.teachers.dinov2_models import DINOV2
from proteus_cache.teachers.outline import outline_teacher

GFLOP_AT_224 = {"vit_ti14": 3.40, "vit_s14": 12.2, "vit_b14": 46.3, "vit_l14": 162.0}


@pytest.mark.parametrize("name", GFLOP_AT_224)
def test_students_cost_what_the_table_of_facts_says(name: str) -> None:
    shape = student_shape(name, size_px=224, patch_px=14)

    assert shape.forward_flops / 1e9 == pytest.approx(GFLOP_AT_224[name], rel=0.01)


@pytest.mark.parametrize(("size_px", "gmac"), [(224, 299.4), (518, 1784.2)])
def test_the_teacher_costs_what_timm_lists_for_it(size_px: int, gmac: float) -> None:
    shape = teacher_shape(outline_teacher("dinov2_vitg14", weights=None, size_px=size_px))

    assert shape.forward_macs / 1e9 == pytest.approx(gmac, rel=0.01)


def test_a_plain_vit_g_costs_what_timm_lists_for_it() -> None:
    mlp = VitShape(width=1408, depth=40, n_patches=256, patch_px=14, block_weights=4 * 1408**2 + 2 * 1408 * 6144)

    assert mlp.forward_macs / 1e9 == pytest.approx(267.2, rel=0.01)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitl14_reg", "dinov2_vitg14"])
def test_the_formula_agrees_with_what_torch_counts_in_a_forward(name: str) -> None:
    model = build_vision_transformer(DINOV2[name].timm_arguments(224), (224, 224))
    with FlopCounterMode(display=False) as counter:
        model.forward_features(torch.empty(1, 3, 224, 224, device="meta"))

    shape = teacher_shape(outline_teacher(name, weights=None, size_px=224))

    assert shape.forward_flops == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_a_timm_model_of_another_family_is_counted_too() -> None:
    shape = teacher_shape(outline_teacher("timm:vit_base_patch16_dinov3", weights=None, size_px=224))

    assert shape.forward_macs / 1e9 == pytest.approx(17.6 * (196 + 5) / 197, rel=0.02)  # ViT-B/16 with four registers


def test_students_have_the_shape_that_they_are_built_with() -> None:
    assert plain_vit(384, 12, size_px=224, patch_px=14) == student_shape("vit_s14", size_px=224, patch_px=14)


def test_a_step_of_three_forwards_and_the_masked_half_gives_the_hours_known_of_two_whole_passes() -> None:
    # 300 epochs with two whole passes at 12, 22, 35 and 42 % of an A100 take 58, 114, 272 and 792 hours.
    known = {"vit_ti14": (0.12, 58), "vit_s14": (0.22, 114), "vit_b14": (0.35, 272), "vit_l14": (0.42, 792)}
    for name, (share, hours) in known.items():
        flops = student_shape(name, size_px=224, patch_px=14).forward_flops
        views_per_s = share * 312e12 / (STEP * flops)

        ours = 300 * 1_281_167 / views_per_s / 3600

        assert ours == pytest.approx(hours * STEP / 6, rel=0.01)
