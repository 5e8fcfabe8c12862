from pathlib import Path

import pytest

from proteus_cache.plan.costs import FORWARD, STEP, STEP_WITHOUT_MASKS, plain_vit, student_shape, teacher_shape
from proteus_cache.plan.rates import GPUS, gpu_named, kind_of
from proteus_cache.teachers.outline import outline_teacher


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA A10", None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_slices_and_weaker_boards_are_not(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
    assert gpu_named(name) is (None if kind is None else GPUS[kind])
    assert gpu_named(None) is None


def test_what_was_measured_on_an_h200_is_given_as_it_was_measured() -> None:
    h200 = GPUS["h200"]
    teacher = teacher_shape(outline_teacher("dinov2_vitg14", weights=None, size_px=None))

    rate = h200.rate("dinov2_vitg14", teacher, FORWARD)

    assert rate.views_per_s == 617
    assert "measured by us" in rate.source
    for name, views_per_s in {"vit_ti14": 5340, "vit_s14": 2985, "vit_l14": 448}.items():
        student = h200.rate(name, student_shape(name, size_px=224, patch_px=14), STEP)
        assert student.views_per_s == views_per_s


@pytest.mark.parametrize(("kind", "views_per_s"), [("a100", 232), ("h100", 478), ("rtx3090", 104)])
def test_published_rates_of_another_giant_are_scaled_to_the_teacher(kind: str, views_per_s: int) -> None:
    teacher = teacher_shape(outline_teacher("dinov2_vitg14", weights=None, size_px=None))

    rate = GPUS[kind].rate("dinov2_vitg14", teacher, FORWARD)

    assert rate.views_per_s == pytest.approx(views_per_s, rel=0.005)
    assert rate.source.startswith("published by")


def test_published_training_rates_are_scaled_to_patches_of_14_and_to_the_masked_half() -> None:
    # timm: ViT-S/16 trains at 1,053 views/s; 4.60 GMAC against 6.12, 3 forwards against 4.5.
    rate = GPUS["rtx3090"].rate("vit_s14", student_shape("vit_s14", size_px=224, patch_px=14), STEP)

    assert rate.views_per_s == pytest.approx(1053 * 4.60 / 6.12 * 3 / 4.5, rel=0.005)


@pytest.mark.parametrize("kind", GPUS)
def test_every_rate_names_its_source_and_estimates_are_called_so(kind: str) -> None:
    for known in GPUS[kind].known:
        assert known.source.split(":")[0] in ("published by timm", "published by NVIDIA (NeMo)", "estimate") or (
            known.source.startswith("measured by us")
        )


@pytest.mark.parametrize("kind", GPUS)
def test_tables_go_from_small_to_large_and_larger_models_reach_more_flops(kind: str) -> None:
    known = GPUS[kind].known

    assert [each.forward_flops for each in known] == sorted(each.forward_flops for each in known)
    assert [each.flops_per_s for each in known] == sorted(each.flops_per_s for each in known)


def test_a_model_without_a_rate_lies_between_its_neighbours() -> None:
    h200 = GPUS["h200"]
    rate = h200.rate("vit_b14", student_shape("vit_b14", size_px=224, patch_px=14), STEP)

    assert rate.views_per_s is not None
    assert 448 < rate.views_per_s < 2985
    assert rate.source == "estimate: its FLOPs at 248 TFLOP/s, between vit_s14 and vit_l14"


def test_other_work_of_a_known_model_runs_at_its_flops() -> None:
    h200, shape = GPUS["h200"], student_shape("vit_s14", size_px=224, patch_px=14)

    trained = h200.rate("vit_s14", shape, STEP_WITHOUT_MASKS)
    teaching = h200.rate("dinov2_vits14", shape, FORWARD)

    assert trained.views_per_s == pytest.approx(2985 * 1.5)
    assert teaching.views_per_s == pytest.approx(2985 * 4.5)
    assert trained.source.startswith("estimate")


def test_a_larger_view_is_estimated_by_its_flops() -> None:
    large = teacher_shape(outline_teacher("dinov2_vitg14", weights=None, size_px=518))

    rate = GPUS["h200"].rate("dinov2_vitg14", large, FORWARD)

    assert rate.views_per_s == pytest.approx(617 * 299.4 / 1784, rel=0.01)
    assert rate.source == "estimate: its FLOPs at 369 TFLOP/s, as dinov2_vitg14"


def test_nothing_is_made_up_for_models_far_below_the_table() -> None:
    rate = GPUS["a100"].rate("vit_demo", plain_vit(96, 4, size_px=84, patch_px=14), STEP)

    assert rate.views_per_s is None
    assert "--measure" in rate.source


def test_the_documentation_has_the_same_rates() -> None:
    page = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()
    table = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    rows = {cells[1].strip("` "): cells[2:7] for cells in table}
    teacher = teacher_shape(outline_teacher("dinov2_vitg14", weights=None, size_px=None))

    for kind, gpu in GPUS.items():
        rates = [gpu.rate("dinov2_vitg14", teacher, FORWARD)]
        for name in ("vit_ti14", "vit_s14", "vit_b14", "vit_l14"):
            rates.append(gpu.rate(name, student_shape(name, size_px=224, patch_px=14), STEP))

        stated = [f"{rate.views_per_s:,.0f}" for rate in rates]

        assert [cell.strip() for cell in rows[kind]] == stated
