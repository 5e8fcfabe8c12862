from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteus_cache.students.heads import build_heads, keep_components, predict_components


def test_heads_are_norm_and_linear_with_pytorchs_defaults() -> None:
    heads = build_heads(("token", "feature", "patch"), student_width=8, teacher_width=5, seed=0)

    assert list(heads) == ["token", "feature", "patch"]
    for head in heads.values():
        assert isinstance(head, nn.Sequential)
        norm, linear = head
        assert isinstance(norm, nn.LayerNorm)
        assert norm.eps == 1e-5
        assert isinstance(linear, nn.Linear)
        assert linear.bias is not None
        assert (linear.in_features, linear.out_features) == (8, 5)
        assert linear.weight.abs().max() <= 8**-0.5
        assert linear.weight.std() > 0


def test_heads_differ_and_leaving_one_out_changes_no_other() -> None:
    all_heads = build_heads(("token", "feature", "patch"), student_width=4, teacher_width=4, seed=3)

    patch_alone = build_heads(("patch",), student_width=4, teacher_width=4, seed=3)

    torch.testing.assert_close(patch_alone["patch"].state_dict(), all_heads["patch"].state_dict())
    weights = [parameter for name, parameter in all_heads.named_parameters() if name.endswith("1.weight")]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def _head(dtype: torch.dtype) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A head from 8 to 5 channels, a mean, and 3 orthonormal directions."""
    torch.manual_seed(0)
    head = build_heads(("patch",), student_width=8, teacher_width=5, seed=0)["patch"].to(dtype)
    assert isinstance(head, nn.Sequential)
    return head, torch.randn(5, dtype=dtype), torch.linalg.qr(torch.randn(5, 3, dtype=dtype)).Q


def test_components_of_a_prediction_are_predicted_without_it() -> None:
    head, mean, vectors = _head(torch.float64)
    tokens = torch.randn(2, 4, 8, dtype=torch.float64)

    components = predict_components(head, tokens, mean, vectors)

    torch.testing.assert_close(components, (head(tokens) - mean) @ vectors, atol=1e-14, rtol=0)


def test_means_may_be_large_under_autocast() -> None:
    """The product with tokens is in bfloat16; the mean is subtracted before."""
    head, mean, vectors = _head(torch.float32)
    norm, linear = head
    assert isinstance(linear, nn.Linear)
    tokens = torch.randn(2, 4, 8)
    with torch.no_grad():
        linear.bias.add_(4097)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        components = predict_components(head, tokens, mean + 4097, vectors)

    assert components.dtype == torch.bfloat16
    expected = (F.linear(norm(tokens), linear.weight) + (linear.bias - 4097 - mean)) @ vectors
    torch.testing.assert_close(components.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_head_can_be_kept_along_some_directions_and_say_the_mean_along_others() -> None:
    head, mean, vectors = _head(torch.float32)
    tokens = torch.randn(2, 4, 8)
    before = head(tokens)

    head.load_state_dict(keep_components(head.state_dict(), mean, vectors))

    torch.testing.assert_close(head(tokens), mean + (before - mean) @ vectors @ vectors.T, atol=1e-6, rtol=1e-6)
    assert (head(tokens) - before).abs().max() > 0.1
