from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.students.vit import clean_and_masked_tokens, mask_patches

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

    clean, seen = clean_and_masked_tokens(student, pixels, slice(1, None, 2), masked, mask_token)

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

    _, seen = clean_and_masked_tokens(student, pixels, slice(1, None, 2), masked, token)
    _, seen_changed = clean_and_masked_tokens(student, changed, slice(1, None, 2), masked, token)

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
    clean, masked = clean_and_masked_tokens(
        student,
        torch.randn(1, 3, 12, 12),
        slice(1, None, 2),
        torch.empty(0, 3, dtype=torch.int64),
        torch.zeros(1, WIDTH),
    )

    assert clean.shape == (1, 1 + N_PATCHES, WIDTH)
    assert masked.shape == (0, 1 + N_PATCHES, WIDTH)
