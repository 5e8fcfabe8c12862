from __future__ import annotations

from typing import cast

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.students.vit import clean_and_masked_tokens, clean_tokens, mask_patches

WIDTH, N_PATCHES = 24, 9


@pytest.fixture
def student() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=12, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=3, num_classes=0, init_values=1.0
    )


def _masked_by_a_hook(student: VisionTransformer, pixels: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """Another way to the same pass: timm's own forward with the patch embedding's output changed."""

    def hide(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where(hidden.unsqueeze(-1), mask_token, output)

    handle = student.patch_embed.register_forward_hook(hide)
    try:
        tokens: Tensor = student.forward_features(pixels)
    finally:
        handle.remove()
    return tokens


def test_clean_and_masked_tokens_equal_two_passes_of_timm(student: VisionTransformer) -> None:
    pixels, mask_token = torch.randn(5, 3, 12, 12), torch.randn(1, WIDTH)
    masked = torch.tensor([[0, 3, 8], [1, 2, 7]])
    hidden = torch.zeros(5, N_PATCHES, dtype=torch.bool)
    hidden[1, masked[0]] = hidden[3, masked[1]] = True

    tokens = clean_and_masked_tokens(student, pixels, slice(1, None, 2), masked, mask_token)
    clean, seen = tokens.clean, tokens.masked

    torch.testing.assert_close(clean, student.forward_features(pixels), atol=1e-5, rtol=1e-5)
    twice = _masked_by_a_hook(student, pixels, hidden, mask_token)
    torch.testing.assert_close(seen, twice[1::2], atol=1e-5, rtol=1e-5)
    # What the released code computes a second time for the unmasked half.
    torch.testing.assert_close(clean[0::2], twice[0::2], atol=1e-5, rtol=1e-5)


def test_masked_patches_reach_nothing(student: VisionTransformer) -> None:
    pixels, masked = torch.randn(2, 3, 12, 12), torch.tensor([[0, 4]])
    changed = pixels.clone()
    changed[1, :, :4, :4] += 1.0  # patch 0
    changed[1, :, 4:8, 4:8] -= 1.0  # patch 4
    token = torch.zeros(1, WIDTH)

    seen = clean_and_masked_tokens(student, pixels, slice(1, None, 2), masked, token).masked
    seen_changed = clean_and_masked_tokens(student, changed, slice(1, None, 2), masked, token).masked

    torch.testing.assert_close(seen, seen_changed)


def test_masking_leaves_its_input_as_it_was_and_trains_the_token() -> None:
    patches = torch.randn(2, 4, 3, requires_grad=True)
    before = patches.detach().clone()
    token = torch.zeros(1, 3, requires_grad=True)

    masked = mask_patches(patches, torch.tensor([[1, 2], [0, 3]]), token)
    masked.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch

    assert torch.equal(patches.detach(), before)
    assert not masked[0, 1:3].any()
    assert torch.equal(masked[0, 0], patches[0, 0])
    assert token.grad is not None
    assert token.grad.tolist() == [[4.0, 4.0, 4.0]]
    assert patches.grad is not None
    assert patches.grad[1, :, 0].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_no_masked_image_is_fine(student: VisionTransformer) -> None:
    tokens = clean_and_masked_tokens(
        student,
        torch.randn(1, 3, 12, 12),
        slice(1, None, 2),
        torch.empty(0, 3, dtype=torch.int64),
        torch.zeros(1, WIDTH),
    )

    assert tokens.clean.shape == (1, 1 + N_PATCHES, WIDTH)
    assert tokens.masked.shape == (0, 1 + N_PATCHES, WIDTH)


def test_tokens_of_one_pass_are_timms(student: VisionTransformer) -> None:
    pixels = torch.randn(3, 3, 12, 12)

    tokens = clean_tokens(student, pixels)

    assert torch.equal(tokens.clean, student.forward_features(pixels))
    assert len(tokens.masked) == 0


@pytest.mark.parametrize("is_masked", [False, True])
def test_tapped_blocks_are_what_timm_calls_intermediates(student: VisionTransformer, is_masked: bool) -> None:
    pixels, masked, token = torch.randn(3, 3, 12, 12), torch.tensor([[0, 4]]), torch.randn(1, WIDTH)
    outputs = student.forward_intermediates(
        pixels, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    pairs = cast(list[tuple[Tensor, Tensor]], outputs)
    with_cls = [torch.cat((prefix, patches), dim=1) for patches, prefix in pairs]

    if is_masked:
        tokens = clean_and_masked_tokens(student, pixels, slice(1, None, 2), masked, token, tapped=(0, 1))
    else:
        tokens = clean_tokens(student, pixels, tapped=(0, 1))

    assert sorted(tokens.blocks) == [0, 1]
    for number, expected in enumerate(with_cls):
        torch.testing.assert_close(tokens.blocks[number], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.clean, student.forward_features(pixels), atol=1e-5, rtol=1e-5)


class _Given(nn.Module):
    """Stands where timm's DropPath stands, with factors that are given."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.factors.reshape(-1, 1, 1)


def test_branch_scales_stand_where_timms_drop_path_does(student: VisionTransformer) -> None:
    pixels, masked, token = torch.randn(3, 3, 12, 12), torch.tensor([[0, 4]]), torch.randn(1, WIDTH)
    scales = torch.randint(0, 2, (3, 2, 2, 2)) / 0.7
    hidden = torch.zeros(3, N_PATCHES, dtype=torch.bool)
    hidden[1, masked[0]] = True

    found = clean_and_masked_tokens(student, pixels, slice(1, None, 2), masked, token, branch_scales=scales)
    unmasked = clean_tokens(student, pixels, branch_scales=scales)

    passes = []
    for number in range(2):
        for block, factors in zip(student.blocks, scales[:, number].unbind(1), strict=True):
            block.drop_path1, block.drop_path2 = _Given(factors[:, 0]), _Given(factors[:, 1])
        passes.append(_masked_by_a_hook(student, pixels, hidden if number else torch.zeros_like(hidden), token))
    torch.testing.assert_close(found.clean, passes[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unmasked.clean, passes[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.masked, passes[1][1:2], atol=1e-5, rtol=1e-5)
