from __future__ import annotations

import torch
from torch import nn

from proteus_cache.students.heads import build_heads


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
