"""What a linear probe reads of a model, against a plain forward block by block and the official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from proteus_cache.evaluate.features import last_block_features, n_last_blocks
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from tests.makers import make_teacher
from tests.teachers.test_golden import build, read_golden


def _plain(model: VisionTransformer, pixels: Tensor) -> Tensor:
    """[CLS of the last n blocks, mean patch of the last], final norm applied to each; no timm helper but the blocks."""
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        after = []
        for block in model.blocks:
            tokens = block(tokens)
            after.append(model.norm(tokens))
    last = after[-4:]
    mean_patch = last[-1][:, model.num_prefix_tokens :].mean(dim=1)
    return torch.cat([*(each[:, 0] for each in last), mean_patch], dim=1)


def _register_teacher(path: Path) -> Path:
    """A ViT with two register tokens, which are no patches."""
    architecture = {
        "img_size": 28,
        "patch_size": 14,
        "embed_dim": 24,
        "depth": 5,
        "num_heads": 2,
        "num_classes": 0,
        "reg_tokens": 2,
        "init_values": 1.0,
        "global_pool": "token",
    }
    torch.manual_seed(0)
    model = VisionTransformer(**architecture)  # type: ignore[arg-type]  # one dict of arguments
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    metadata = {
        "timm_vision_transformer": json.dumps(architecture),
        "pixel_mean": "[0.5, 0.4, 0.3]",
        "pixel_std": "[0.2, 0.25, 0.3]",
    }
    save_file(model.state_dict(), path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("name", "weights", "size_px", "n_blocks"),
    [
        ("demo", None, 28, 4),
        ("dinov2_vits14", "random:0", 28, 4),
        ("timm:vit_tiny_patch16_224", "random:0", 32, 4),
        ("vit", "{registers}", 28, 4),
        ("vit", "{two_blocks}", 32, 2),
    ],
)
def test_features_are_the_cls_of_the_last_blocks_and_the_mean_patch(
    name: str, weights: str | None, size_px: int, n_blocks: int, tmp_path: Path
) -> None:
    files = {
        "registers": _register_teacher(tmp_path / "registers.safetensors"),
        "two_blocks": make_teacher(tmp_path / "two.safetensors"),
    }
    weights = None if weights is None else weights.format(**files)
    teacher = load_teacher(name, weights=weights, home=tmp_path, size_px=size_px)
    views = torch.randint(0, 256, (5, size_px, size_px, 3), dtype=torch.uint8)

    features = last_block_features(teacher, views, batch_size=2)

    model = teacher._model
    assert isinstance(model, VisionTransformer)
    mean, std = (torch.tensor(values) for values in (teacher.identity.mean, teacher.identity.std))
    expected = _plain(model, ((views / 255 - mean) / std).permute(0, 3, 1, 2))
    assert n_last_blocks(teacher) == n_blocks
    assert features.shape == (5, (n_blocks + 1) * teacher.identity.width)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("golden_name", ["dinov2_mlp", "dinov2_mlp_reg4"])
def test_features_are_those_of_the_official_code(golden_name: str, test_data: Path) -> None:
    """The golden models have three blocks; the official output of the first and the last is at hand."""
    golden = read_golden(test_data, golden_name)
    teacher: Teacher = build(golden, (224, 224))
    width = teacher.identity.width
    views = golden.tensors["224x224/pixels"].float().permute(0, 2, 3, 1)  # normalised already

    features = last_block_features(teacher, views, batch_size=8)

    def same(columns: slice, expected: Tensor) -> None:
        torch.testing.assert_close(features[:, columns], expected, atol=1e-5, rtol=0)

    assert features.shape[1] == 4 * width
    same(slice(0, width), golden.tensors["224x224/block0_norm_cls"])
    same(slice(2 * width, 3 * width), golden.tensors["224x224/x_norm_clstoken"])
    same(slice(3 * width, 4 * width), golden.tensors["224x224/x_norm_patchtokens"].mean(dim=1))
