"""The losses and gradients of a step, against the released method read plainly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.pixels import normalise
from proteus_cache.students.heads import Heads, build_heads
from proteus_cache.students.vit import StudentTokens
from proteus_cache.train import model as model_module
from proteus_cache.train.drop_path import draw_kept, drop_rates
from proteus_cache.train.masking import n_masked_images
from proteus_cache.train.model import Distillation, build_distillation
from tests.train.small_models import (
    BLOCKS,
    DEPTH,
    HEADS,
    MEAN,
    N_PATCHES,
    STD,
    WIDTH,
    check_gradients,
    gradients,
    made_up_batch,
    model_config,
    small_model,
    small_student,
)

_GOLDEN_HEADS = {"token": "token_head", "feature": "fea_head", "patch": "patch_head"}


# The losses of the released code.


def test_losses_of_a_step_equal_those_of_the_released_code(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything between the student's tokens and the sum, on the released code's own tensors and heads."""
    golden = load_file(test_data / "golden" / "proteus_losses.safetensors")
    heads = build_heads(HEADS, student_width=24, teacher_width=40, seed=0)
    for ours, theirs in _GOLDEN_HEADS.items():
        heads[ours].load_state_dict({name: golden[f"{theirs}.{name}"] for name in heads[ours].state_dict()})
    order = [3, 0, 4, 1, 5, 2]  # the released code masks the first half of a batch, we mask odd positions
    masked = golden["mask"][order][1::2].nonzero()[:, 1].reshape(3, -1)

    def tokens(*ignored: object, **options: object) -> StudentTokens:
        clean, seen = (
            torch.cat((golden[f"student_{kind}_cls"].unsqueeze(1), golden[f"student_{kind}_patch"]), dim=1)[order]
            for kind in ("unmasked", "masked")
        )
        return StudentTokens(clean, seen[1::2], {})

    monkeypatch.setattr(model_module, "clean_and_masked_tokens", tokens)
    student = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=0)
    bare = Distillation(student, heads, nn.Parameter(torch.zeros(1, 24)), weights=(1, 1, 1, 0), mean=MEAN, std=STD)

    losses = bare(
        torch.zeros(6, 16, 16, 3, dtype=torch.uint8),
        {"cls": golden["teacher_cls"][order], "patch": golden["teacher_patch"][order]},
        masked,
        1,
        (6, 3),
    )

    expected = torch.cat([golden[f"expected.{name}"] for name in ("loss", "token_loss", "fea_loss", "patch_loss")])
    torch.testing.assert_close(losses[:4], expected, atol=1e-6, rtol=0)
    assert losses[4].isnan()


# The half masked pass, the slices of ranks, and every option, against two whole passes over all images.


class _Factors(nn.Module):
    """Stands where timm's DropPath stands, with factors that are given."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.factors.reshape(-1, 1, 1)


def _pass(student: VisionTransformer, pixels: Tensor, hidden: Tensor, mask_token: Tensor, factors: Tensor) -> Tensor:
    """timm's own forward of all images, with the patch embedding's output and DropPath replaced."""
    for block, two in zip(student.blocks, factors.unbind(1), strict=True):
        block.drop_path1, block.drop_path2 = _Factors(two[:, 0]), _Factors(two[:, 1])
    handle = student.patch_embed.register_forward_hook(
        lambda module, inputs, output: torch.where(hidden.unsqueeze(-1), mask_token, output)
    )
    try:
        tokens: Tensor = student.forward_features(pixels)
    finally:
        handle.remove()
        for block in student.blocks:
            block.drop_path1, block.drop_path2 = nn.Identity(), nn.Identity()
    return tokens


def _pixels(bare: Any, views: Tensor) -> Tensor:
    """Normalised in the module's own precision."""
    pixels: Tensor = (views.permute(0, 3, 1, 2).to(bare.pixel_std.dtype) / 255 - bare.pixel_mean) / bare.pixel_std
    return pixels


def _released(
    bare: Any,  # a Distillation; see _build
    views: Tensor,
    targets: Mapping[str, Tensor],
    masks: NDArray[np.int64],
    kept: Tensor | None = None,
    drop_path: float = 0.0,
    feature_cls_head: str = "token",
) -> Tensor:
    """Token, feature and patch loss as released: all images forwarded twice, half of them masked the second time."""
    pixels = _pixels(bare, views)
    hidden = torch.zeros(len(views), N_PATCHES, dtype=torch.bool)
    for row, patches in zip(range(1, len(views), 2), masks, strict=True):
        hidden[row, patches] = True
    rates = torch.from_numpy(drop_rates(drop_path, DEPTH)).float().reshape(1, -1, 1)
    scales = (1 / (1 - rates)).to(pixels.dtype)
    factors = torch.ones(len(views), 2, DEPTH, 2) if kept is None else kept
    clean, masked = (
        _pass(bare.student, pixels, hidden & is_masked, bare.mask_token, factors[:, number] * scales)
        for number, is_masked in enumerate((False, True))
    )
    token = bare.heads["token"](clean[:, :1])
    cls = token if feature_cls_head == "token" else bare.heads["feature"](clean[:, :1])
    together = torch.cat((cls, bare.heads["feature"](clean[:, 1:])), dim=1)
    return torch.stack(
        [
            F.mse_loss(token[:, 0], targets["cls"]),
            F.mse_loss(together, torch.cat((targets["cls"].unsqueeze(1), targets["patch"]), dim=1)),
            F.mse_loss(bare.heads["patch"](masked[:, 1:])[hidden], targets["patch"][hidden]),
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n_images", "borders"),
    [(6, ()), (7, ()), (8, (4,)), (7, (3,)), (7, (1, 2, 5)), (8, (2, 4, 6))],
)
def test_half_a_masked_pass_gives_the_losses_and_gradients_of_a_whole_one(
    n_images: int, borders: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also cut into the slices of ranks, of odd lengths and without a masked image among them."""
    bare = small_model(dtype)
    views, targets, masks = made_up_batch(n_images, dtype)
    expected_losses = _released(bare, views, targets, masks)
    expected_losses.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    expected = gradients(bare)

    edges = (0, *borders, n_images)
    n_ranks = len(edges) - 1
    counts = (n_images / n_ranks, n_masked_images(n_images) / n_ranks)
    losses = torch.zeros(5, dtype=dtype)
    for begin, end in itertools.pairwise(edges):
        rows = [row for row, position in enumerate(range(1, n_images, 2)) if begin <= position < end]
        of_rank = {name: target[begin:end] for name, target in targets.items()}
        part = bare(views[begin:end], of_rank, torch.from_numpy(masks[rows]), (begin + 1) % 2, counts)
        (part[0] / n_ranks).backward()
        losses += part.detach() / n_ranks

    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(losses[1:4], expected_losses.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(losses[0], losses[1:4].sum(), atol=tolerance, rtol=tolerance)
    check_gradients(gradients(bare), expected, dtype)


def test_the_feature_losss_cls_token_can_go_through_the_feature_head() -> None:
    bare = small_model(torch.float64, feature_cls_head="feature")
    views, targets, masks = made_up_batch(6, torch.float64)
    expected_losses = _released(bare, views, targets, masks, feature_cls_head="feature")
    expected_losses.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    expected = gradients(bare)

    losses = bare(views, targets, torch.from_numpy(masks), 1, (6, 3))
    losses[0].backward()

    torch.testing.assert_close(losses[1:4], expected_losses)
    assert not torch.isclose(losses[2], _released(bare, views, targets, masks)[1])
    check_gradients(gradients(bare), expected, torch.float64)


def test_without_a_token_loss_the_feature_head_may_stand_alone() -> None:
    bare = small_model(feature_cls_head="feature", weight_token=0, weight_patch=0)
    views, targets, _ = made_up_batch(4, torch.float32)

    losses = bare(views, targets, torch.empty(0, 0, dtype=torch.int64), 1, (4, 2))
    losses[0].backward()

    assert list(bare.heads) == ["feature"]
    assert losses[[1, 3, 4]].isnan().all()
    assert losses[0] == losses[2]


@pytest.mark.parametrize("weight_patch", [1, 0])
def test_with_drop_path_half_a_masked_pass_is_still_exact(weight_patch: int) -> None:
    """What an image loses does not depend on the others, so images whose second pass reaches no loss can go."""
    rate, n_images = 0.6, 9
    bare = small_model(torch.float64, drop_path=rate, weight_patch=weight_patch)
    views, targets, masks = made_up_batch(n_images, torch.float64)
    kept = torch.from_numpy(draw_kept(5, 3, np.arange(n_images), drop_path=rate, depth=DEPTH))
    reference = small_model(torch.float64)
    bare.load_state_dict(reference.state_dict(), strict=False)
    expected_losses = _released(reference, views, targets, masks, kept, rate)[: 2 + weight_patch]
    expected_losses.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch

    shown = torch.from_numpy(masks) if weight_patch else torch.empty(0, 0, dtype=torch.int64)
    losses = bare(views, targets, shown, 1, (n_images, n_masked_images(n_images)), kept)
    losses[0].backward()

    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(losses[1 : 3 + weight_patch], expected_losses)
    if weight_patch:
        check_gradients(gradients(bare), gradients(reference), torch.float64)


# Blocks.


def test_the_block_loss_is_the_mean_over_its_targets_of_plain_errors() -> None:
    bare = small_model(torch.float64, BLOCKS, weight_block=0.5)
    views, targets, masks = made_up_batch(6, torch.float64)
    pixels = _pixels(bare, views)
    student = cast(VisionTransformer, bare.student)
    outputs = cast(
        list[tuple[Tensor, Tensor]],
        student.forward_intermediates(
            pixels, return_prefix_tokens=True, output_fmt="NLC", norm=False, intermediates_only=True
        ),
    )
    raw = [torch.cat((prefix, patches), dim=1) for patches, prefix in outputs]
    block = torch.stack(
        [
            F.mse_loss(bare.heads["block_1"](student.norm(raw[0])), targets["block.1"]),
            F.mse_loss(bare.heads["block_3"](student.norm(raw[2])), targets["block.3"]),
            F.mse_loss(bare.heads["block_1_raw"](raw[0]), targets["block.1.raw"]),
        ]
    ).mean()
    (_released(bare, views, targets, masks).sum() + 0.5 * block).backward()  # type: ignore[no-untyped-call]  # likewise
    expected = gradients(bare)

    losses = bare(views, targets, torch.from_numpy(masks), 1, (6, 3))
    losses[0].backward()

    torch.testing.assert_close(losses[4], block)
    torch.testing.assert_close(losses[0], losses[1:4].sum() + 0.5 * block)
    check_gradients(gradients(bare), expected, torch.float64)


@pytest.mark.parametrize("weight_patch", [1, 0])
def test_the_block_loss_leaves_the_others_as_they_are(weight_patch: int) -> None:
    views, targets, masks = made_up_batch(6, torch.float64)
    shown = torch.from_numpy(masks) if weight_patch else torch.empty(0, 0, dtype=torch.int64)

    alone = small_model(torch.float64, weight_patch=weight_patch)
    beside = small_model(torch.float64, BLOCKS, weight_block=1, weight_patch=weight_patch)
    beside.load_state_dict(alone.state_dict(), strict=False)

    torch.testing.assert_close(
        beside(views, targets, shown, 1, (6, 3))[1:4], alone(views, targets, shown, 1, (6, 3))[1:4], equal_nan=True
    )


def test_the_block_loss_can_stand_alone() -> None:
    bare = small_model(torch.float32, {"block.1": 0}, weight_token=0, weight_feature=0, weight_patch=0, weight_block=2)
    views, targets, _ = made_up_batch(4, torch.float32)

    losses = bare(views, targets, torch.empty(0, 0, dtype=torch.int64), 1, (4, 2))

    assert losses[1:4].isnan().all()
    assert losses[0] == 2 * losses[4]
    assert sorted(bare.head_tensors()) == [f"block_1.{layer}.{kind}" for layer in "01" for kind in ("bias", "weight")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_views_are_taken_as_they_are(dtype: torch.dtype) -> None:
    bare = small_model(dtype)
    views, targets, masks = made_up_batch(4, dtype)
    normalised = normalise(views, bare.pixel_mean, bare.pixel_std).permute(0, 2, 3, 1).contiguous()

    stored, fresh = (bare(shown, targets, torch.from_numpy(masks), 1, (4, 2)) for shown in (views, normalised))

    assert normalised.shape == views.shape
    torch.testing.assert_close(fresh[:4], stored[:4], rtol=1e-6, atol=0)


# What is built.


def test_heads_have_their_own_eps_and_the_student_its_own() -> None:
    def found(**settings: float) -> tuple[set[float], set[float]]:
        bare = small_model(torch.float32, {"block.1": 0}, weight_block=1, **settings)
        norms = {
            kind: [m for m in kind.modules() if isinstance(m, nn.LayerNorm)] for kind in (bare.heads, bare.student)
        }
        return tuple({norm.eps for norm in of} for of in norms.values())  # type: ignore[return-value]  # two of them

    assert found() == ({1e-5}, {1e-6})
    assert found(head_norm_eps=1e-6) == ({1e-6}, {1e-6})


def test_nothing_drops_anything_unless_asked_to() -> None:
    bare = small_model().train()
    views, targets, masks = made_up_batch(4, torch.float32)

    first, second = (bare(views, targets, torch.from_numpy(masks), 1, (4, 2)) for _ in range(2))

    assert model_config().drop_path == 0
    assert torch.equal(first[:4], second[:4])
    rates = [m.p for m in bare.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) == {0.0}


def test_a_mask_token_begins_at_zero() -> None:
    bare = build_distillation(model_config(), small_student(), teacher_width=4, mean=MEAN, std=STD)

    assert bare.mask_token is not None
    assert bare.mask_token.shape == (1, WIDTH)
    assert not bare.mask_token.any()
    assert isinstance(bare.heads, Heads)
