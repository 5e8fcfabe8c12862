from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from proteus_cache.errors import UsageError
from proteus_cache.teachers.backbone import build_vision_transformer
from proteus_cache.teachers.dinov2_models import DINOV2, Dinov2Architecture
from proteus_cache.teachers.random_weights import random_state
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.weights import state_digest


def meta_model(architecture: Dinov2Architecture) -> VisionTransformer:
    return build_vision_transformer(architecture.timm_arguments(518), (518, 518))


def test_draws_the_official_initialisation() -> None:
    state = random_state(meta_model(DINOV2["dinov2_vits14_reg"]), seed=1)

    linear = state["blocks.3.mlp.fc1.weight"]
    assert abs(linear.std().item() / 0.02 - 1) < 0.01  # 590,000 draws: three standard errors are 0.003
    assert abs(linear.mean().item()) < 0.02 * 0.01
    assert abs(state["pos_embed"].std().item() / 0.02 - 1) < 0.01
    assert 0 < state["cls_token"].abs().max().item() < 1e-5
    assert 0 < state["reg_token"].abs().max().item() < 1e-5
    bound = 1 / math.sqrt(3 * 14 * 14)
    convolution = state["patch_embed.proj.weight"]
    assert bound * 0.99 < convolution.abs().max().item() <= bound
    assert abs(convolution.std().item() / (bound / math.sqrt(3)) - 1) < 0.01
    assert 0 < state["patch_embed.proj.bias"].abs().max().item() <= bound
    assert torch.equal(state["blocks.0.ls1.gamma"], torch.ones(384))
    assert torch.equal(state["blocks.0.norm2.weight"], torch.ones(384))
    assert not state["blocks.11.attn.qkv.bias"].any()
    assert not state["norm.bias"].any()


def test_normal_draws_follow_the_normal_distribution() -> None:
    state = random_state(meta_model(DINOV2["dinov2_vits14"]), seed=2)
    drawn = np.sort(state["blocks.0.mlp.fc1.weight"].numpy().ravel() / 0.02)

    expected = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in drawn[::997]])
    seen = np.arange(drawn.size)[::997] / drawn.size

    # Kolmogorov-Smirnov: beyond 2.0 / sqrt(n) lies a share of 0.0007 of all seeds, and the seed is fixed.
    assert np.abs(expected - seen).max() < 2.0 / math.sqrt(drawn.size)


def test_bits_are_pinned() -> None:
    state = random_state(meta_model(Dinov2Architecture(width=24, depth=2, n_heads=2)), seed=0)

    # A change here gives every `random:SEED` cache another teacher.
    assert state_digest(state) == "f0237c6eb6b63ee978d995990e1b0a92af0e115a49dbf65f5bcbd9d325f73d7c"


def test_a_tensor_depends_on_seed_and_name_alone() -> None:
    shallow = random_state(meta_model(Dinov2Architecture(width=24, depth=1, n_heads=2)), seed=5)
    deep = random_state(meta_model(Dinov2Architecture(width=24, depth=3, n_heads=2)), seed=5)
    other = random_state(meta_model(Dinov2Architecture(width=24, depth=1, n_heads=2)), seed=6)

    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)
    assert not torch.equal(shallow["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(deep["blocks.0.attn.qkv.weight"], deep["blocks.1.attn.qkv.weight"])


def test_global_random_state_is_left_alone(tiny_dinov2: Dinov2Architecture, tmp_path: Path) -> None:
    before = torch.get_rng_state()

    load_teacher("dinov2_vits14", weights="random:0", home=tmp_path, size_px=28)

    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_parameters_are_refused() -> None:
    model = nn.Module()
    model.register_parameter("mystery", nn.Parameter(torch.empty(3)))

    with pytest.raises(UsageError, match="not defined for parameter mystery"):
        random_state(model, seed=0)
