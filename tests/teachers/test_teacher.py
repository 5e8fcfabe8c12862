from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from proteus_cache.errors import UsageError
from proteus_cache.pixels import channel_values, normalise
from proteus_cache.teachers.dinov2_models import Dinov2Architecture
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Precision, Teacher

NAMES = ["cls", "patch", "block.0", "block.0.raw", "block.1", "block.1.raw"]


@pytest.fixture(params=["dinov2_vits14", "dinov2_vits14_reg"])
def teacher(request: pytest.FixtureRequest, tiny_dinov2: Dinov2Architecture, tmp_path: Path) -> Teacher:
    return load_teacher(str(request.param), weights="random:3", home=tmp_path, size_px=28)


def test_targets_have_the_shapes_that_are_promised(teacher: Teacher, views: Tensor) -> None:
    targets = teacher.targets(views, NAMES)

    assert list(targets) == NAMES
    for name, target in targets.items():
        assert tuple(target.shape) == (2, *teacher.target_shape(name))
        assert target.dtype == torch.float32
        assert target.is_contiguous()
    assert teacher.n_patches == 4
    assert teacher.target_shape("block.1") == (5, 24)


def test_last_block_with_norm_is_cls_and_patches(teacher: Teacher, views: Tensor) -> None:
    targets = teacher.targets(views, ["cls", "patch", "block.1"])

    assert torch.equal(targets["block.1"][:, 0], targets["cls"])
    assert torch.equal(targets["block.1"][:, 1:], targets["patch"])


def test_one_forward_for_all_names_gives_what_one_for_each_gives(teacher: Teacher, views: Tensor) -> None:
    together = teacher.targets(views, NAMES)

    for name in NAMES:
        assert torch.equal(teacher.targets(views, [name])[name], together[name])


def test_a_view_gets_the_same_targets_in_any_batch(teacher: Teacher, views: Tensor) -> None:
    both = teacher.targets(views, ["patch"])["patch"]

    alone = teacher.targets(views[1:], ["patch"])["patch"]

    torch.testing.assert_close(alone[0], both[1], atol=1e-5, rtol=0)  # another batch, another order of sums


def test_strided_views_give_what_contiguous_ones_give(teacher: Teacher, views: Tensor) -> None:
    turned = views.transpose(1, 2)

    targets = teacher.targets(turned, ["cls"])

    assert torch.equal(targets["cls"], teacher.targets(turned.contiguous(), ["cls"])["cls"])


def test_targets_may_take_part_in_a_loss(teacher: Teacher, views: Tensor) -> None:
    target = teacher.targets(views, ["patch"])["patch"]
    student = torch.zeros_like(target, requires_grad=True)

    (gradient,) = torch.autograd.grad(torch.nn.functional.mse_loss(student, target), student)

    assert gradient.any()
    assert not target.requires_grad
    assert not target.is_inference()


def test_bf16_is_near_fp32_and_fp32_comes_back_exactly(teacher: Teacher, views: Tensor) -> None:
    exact = teacher.targets(views, ["patch"])["patch"]

    low = teacher.to("cpu", "bf16").targets(views, ["patch"])["patch"]
    again = teacher.to("cpu", "fp32").targets(views, ["patch"])["patch"]

    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    # bf16 keeps 8 bits: one rounding is up to 1/256, and two blocks of it stay below ten of them.
    assert (low - exact).norm() < 10 / 256 * exact.norm()
    assert torch.equal(again, exact)


def test_a_program_that_allows_tf32_keeps_its_setting(teacher: Teacher, views: Tensor) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        teacher.targets(views, ["cls"])

        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_weights_are_frozen_and_in_eval_mode(teacher: Teacher, views: Tensor) -> None:
    first = teacher.targets(views, ["cls"])["cls"]
    with torch.enable_grad():
        second = teacher.targets(views, ["cls"])["cls"]

    assert torch.equal(first, second)
    assert second.grad_fn is None


@pytest.mark.parametrize(
    "name", ["", "CLS", "block", "block.2", "block.-1", "block.01", "block.0.norm", "block.1 ", "patch.raw"]
)
def test_unknown_target_names_those_there_are(teacher: Teacher, views: Tensor, name: str) -> None:
    with pytest.raises(UsageError, match=r"no target .*cls, patch and block\.0 to block\.1"):
        teacher.target_shape(name)
    with pytest.raises(UsageError, match="no target"):
        teacher.targets(views, ["cls", name])


def test_normalised_views_are_taken_as_they_are(teacher: Teacher, views: Tensor) -> None:
    identity = teacher.identity
    mean, std = (channel_values(values) for values in (identity.mean, identity.std))
    pixels = normalise(views, mean, std).permute(0, 2, 3, 1)

    for name, target in teacher.targets(pixels, NAMES).items():
        assert torch.equal(target, teacher.targets(views, NAMES)[name])
    shifted = teacher.targets(pixels + 0.1, ["cls"])["cls"]
    assert not torch.allclose(shifted, teacher.targets(views, ["cls"])["cls"], atol=1e-3)


def test_views_of_another_size_or_type_are_refused(teacher: Teacher, views: Tensor) -> None:
    for wrong in (views[:, :14], views.int(), views[0], views.permute(0, 3, 1, 2)):
        with pytest.raises(UsageError, match=r"takes views \(B, 28, 28, 3\) uint8, or normalised floating point, got"):
            teacher.targets(wrong, ["cls"])


def test_unknown_precision_is_refused(teacher: Teacher) -> None:
    with pytest.raises(UsageError, match="choose fp32, fp16 or bf16"):
        teacher.to("cpu", "fp8")  # type: ignore[arg-type]  # what a caller without a type checker may pass


def test_no_names_no_targets(teacher: Teacher, views: Tensor) -> None:
    assert teacher.targets(views, []) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_autocast_on_a_gpu_is_near_the_cpu(teacher: Teacher, views: Tensor, precision: Precision) -> None:
    exact = teacher.targets(views, NAMES)

    low = teacher.to("cuda", precision).targets(views.pin_memory(), NAMES)

    for name in NAMES:
        assert low[name].is_cuda
        assert low[name].dtype == torch.float32
        assert (low[name].cpu() - exact[name]).norm() < 10 / 256 * exact[name].norm()
