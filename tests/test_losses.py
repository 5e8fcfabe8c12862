from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from proteus_cache.losses import Components, block_loss, feature_loss, patch_loss, token_loss
from proteus_cache.students.heads import build_heads

_GOLDEN_HEADS = {"token": "token_head", "feature": "fea_head", "patch": "patch_head"}


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def test_losses_equal_those_of_the_released_code(test_data: Path) -> None:
    golden = load_file(test_data / "golden" / "proteus_losses.safetensors")
    heads = build_heads(("token", "feature", "patch"), student_width=24, teacher_width=40, seed=0)
    for ours, theirs in _GOLDEN_HEADS.items():
        heads[ours].load_state_dict({name: golden[f"{theirs}.{name}"] for name in heads[ours].state_dict()})
    n_masked_images = 3
    masked = golden["mask"][:n_masked_images].nonzero()[:, 1].reshape(n_masked_images, -1)
    cls = heads["token"](golden["student_unmasked_cls"])

    token = token_loss(cls, golden["teacher_cls"])
    feature = feature_loss(
        cls,
        heads["feature"](golden["student_unmasked_patch"]),
        golden["teacher_cls"],
        golden["teacher_patch"],
    )
    patch = patch_loss(
        heads["patch"](_take(golden["student_masked_patch"][:n_masked_images], masked)),
        _take(golden["teacher_patch"][:n_masked_images], masked),
    )

    for name, value in {
        "token_loss": token,
        "fea_loss": feature,
        "patch_loss": patch,
        "loss": token + feature + patch,
    }.items():
        torch.testing.assert_close(value, golden[f"expected.{name}"][0], atol=1e-6, rtol=0)


def test_feature_loss_is_the_mean_over_cls_and_patches_together() -> None:
    cls, patches, target_cls, target_patches = (torch.randn(5, 7), torch.randn(5, 3, 7), *_targets(5, 3, 7))

    loss = feature_loss(cls, patches, target_cls, target_patches)

    together = F.mse_loss(
        torch.cat((cls.unsqueeze(1), patches), dim=1),
        torch.cat((target_cls.unsqueeze(1), target_patches), dim=1),
    )
    torch.testing.assert_close(loss, together)


@given(border=st.integers(1, 7), seed=st.integers(0, 100))
def test_shares_of_a_batch_average_to_the_loss_of_the_whole(border: int, seed: int) -> None:
    torch.manual_seed(seed)
    cls, patches = torch.randn(8, 6), torch.randn(8, 4, 6)
    target_cls, target_patches = _targets(8, 4, 6)
    parts = [slice(0, border), slice(border, 8)]

    shares = [
        feature_loss(cls[part], patches[part], target_cls[part], target_patches[part], n_images=8 / 2) for part in parts
    ]

    whole = feature_loss(cls, patches, target_cls, target_patches)
    torch.testing.assert_close(sum(shares) / torch.tensor(2.0), whole)


def test_a_share_without_masked_images_adds_nothing_and_still_has_gradients() -> None:
    heads = build_heads(("patch",), student_width=3, teacher_width=5, seed=0)

    loss = patch_loss(heads["patch"](torch.empty(0, 2, 3)), torch.empty(0, 2, 5), n_images=4)
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch

    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in heads.parameters())


# Tokens of which some directions are unknown.


@given(n_lead=st.integers(0, 2), n_kept=st.integers(1, 6), n_images=st.integers(0, 4), seed=st.integers(0, 100))
def test_unknown_components_count_as_exact(n_lead: int, n_kept: int, n_images: int, seed: int) -> None:
    """The mean runs over all 6 channels, as if predicted and true were the same along the others."""
    torch.manual_seed(seed)
    predicted, target = torch.randn(2, n_images, 5, 6, dtype=torch.float64)
    predicted[:, n_lead:, n_kept:] = target[:, n_lead:, n_kept:]
    known = [Components(tokens[:, :n_lead], tokens[:, n_lead:, :n_kept]) for tokens in (predicted, target)]

    losses = [
        patch_loss(known[0], known[1], n_images=3.5),
        feature_loss(predicted[:, 0], known[0], target[:, 0], known[1], n_images=3.5),
        block_loss([known[0], predicted], [known[1], target], n_images=3.5),
    ]

    expected = [
        patch_loss(predicted, target, n_images=3.5),
        feature_loss(predicted[:, 0], predicted, target[:, 0], target, n_images=3.5),
        block_loss([predicted, predicted], [target, target], n_images=3.5),
    ]
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=1e-12)


def test_a_share_without_masked_images_adds_nothing_along_components_either() -> None:
    predicted = Components(torch.empty(0, 0, 5), torch.empty(0, 2, 3, requires_grad=True))

    loss = patch_loss(predicted, Components(torch.empty(0, 0, 5), torch.empty(0, 2, 3)), n_images=4)
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch

    assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32(dtype: torch.dtype) -> None:
    predicted = torch.full((4, 1000), 200.0, dtype=dtype)

    loss = token_loss(predicted, torch.zeros(4, 1000))

    assert loss.dtype == torch.float32
    assert loss.item() == 40_000


def _targets(n: int, n_patches: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, width), torch.randn(n, n_patches, width)
