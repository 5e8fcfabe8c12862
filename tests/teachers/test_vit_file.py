from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher

ARCHITECTURE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}
STATISTICS = {"pixel_mean": "[0.5, 0.4, 0.3]", "pixel_std": "[0.2, 0.2, 0.25]"}


def write_vit(folder: Path, architecture: dict[str, object], metadata: dict[str, str]) -> Path:
    model = VisionTransformer(**{**ARCHITECTURE, **architecture})  # type: ignore[arg-type]  # checked arguments
    path = folder / "vit.safetensors"
    save_file(model.state_dict(), path, metadata)
    return path


def load(path: Path, size_px: int | None = None) -> Teacher:
    return load_teacher("vit", weights=str(path), home=path.parent, size_px=size_px)


def described(**changes: object) -> dict[str, str]:
    return {"timm_vision_transformer": json.dumps({**ARCHITECTURE, **changes}), **STATISTICS}


def test_the_file_says_how_to_build_and_normalise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**ARCHITECTURE, reg_tokens=2).eval()  # type: ignore[arg-type]  # checked arguments
    path = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), path, {**described(reg_tokens=2), "licence": "MIT"})
    views = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)

    teacher = load(path)
    targets = teacher.targets(views, ["cls", "patch", "block.0.raw"])

    pixels = (views / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.2, 0.25])
    with torch.inference_mode():
        tokens = model.forward_features(pixels.permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(targets["cls"], tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(targets["patch"], tokens[:, 3:], atol=1e-5, rtol=0)
    assert tuple(targets["block.0.raw"].shape) == (2, 17, 24)
    assert teacher.identity.weights_source == "vit.safetensors"
    assert teacher.identity.licence == "MIT"
    assert teacher.identity.std == (0.2, 0.2, 0.25)
    assert teacher.identity.n_register_tokens == 2


def test_a_classifier_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = write_vit(tmp_path, {"num_classes": 10}, described(num_classes=10))

    teacher = load(path)

    assert teacher.identity.architecture["num_classes"] == 0


def test_another_size_resamples_positions(tmp_path: Path) -> None:
    path = write_vit(tmp_path, {}, described())

    teacher = load(path, size_px=48)

    assert teacher.n_patches == 36
    assert teacher.identity.architecture["img_size"] == teacher.identity.size_px == 48
    assert teacher.identity.weights_sha256 == load(path).identity.weights_sha256


def test_the_cifar_teacher_loads_and_separates_classes(test_data: Path, tmp_path: Path) -> None:
    teacher = load_teacher(
        "vit", weights=str(test_data / "teachers" / "cifar10_vit.safetensors"), home=tmp_path, size_px=None
    )

    targets = teacher.targets(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["cls", "patch"])

    assert {name: tuple(target.shape) for name, target in targets.items()} == {
        "cls": (1, 128),
        "patch": (1, 64, 128),
    }
    assert teacher.identity.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("weights", [None, "random:0", "file.pth"])
def test_vit_needs_a_file_that_describes_it(tmp_path: Path, weights: str | None) -> None:
    with pytest.raises(UsageError, match=r"vit needs --weights FILE\.safetensors"):
        load_teacher("vit", weights=weights, home=tmp_path, size_px=None)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "have no timm_vision_transformer"),
        ({"timm_vision_transformer": "{"}, "timm_vision_transformer is not valid JSON"),
        ({"timm_vision_transformer": "[]"}, "not a JSON object"),
        ({"timm_vision_transformer": json.dumps(ARCHITECTURE)}, "have no pixel_mean"),
        ({**described(), "pixel_std": "[1, 0, 1]"}, "pixel_std holds a number that is not positive"),
        ({**described(), "pixel_mean": "[1, 2]"}, "pixel_mean is not a JSON list of three numbers"),
        ({**described(), "pixel_mean": "[1, 2, NaN]"}, "pixel_mean is not a JSON list of three numbers"),
        ({**described(), "pixel_mean": '["1", 2, 3]'}, "pixel_mean is not a JSON list of three numbers"),
        ({**described(), "pixel_std": f"[1, 2, {10**400}]"}, "pixel_std is not a JSON list of three numbers"),
        (described(embed_dim=25), "num_heads does not divide embed_dim"),
        (described(depth=3), "its metadata say 3 blocks, it holds 2"),
        (described(depth=128), "its metadata say 128 blocks, it holds 2"),
        (described(depth=65536), "has depth = 65536, which teacher vit does not take"),
        (described(depth=2.5), "depth = 2.5, which"),
        (described(depth=True), "depth = True, which"),
        (described(embed_dim=1 << 40), "embed_dim = 1099511627776, which"),
        (described(img_size=[32, 32]), r"img_size = \[32, 32\], which"),
        (described(mlp_ratio=float("nan")), "mlp_ratio = nan, which"),
        (described(in_chans=4), "in_chans = 4, which"),
        (described(class_token=False), "class_token = False, which"),
        (described(mlp_layer="os.system"), "mlp_layer = 'os.system', which"),
        (described(block_fn="x"), "block_fn = 'x', which"),
        (described(patch_size=4), r"patch_embed\.proj\.weight is \(24, 3, 8, 8\) instead of \(24, 3, 4, 4\)"),
        (described(init_values=1.0), r"missing blocks\.0\.ls1\.gamma and 3 more"),
        ({**STATISTICS, "timm_vision_transformer": '{"img_size": 32}'}, "lacks patch_size"),
    ],
)
def test_a_description_that_cannot_be_is_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = write_vit(tmp_path, {}, metadata)

    with pytest.raises(WeightsError, match=message) as caught:
        load(path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_final_norm_is_refused(tmp_path: Path) -> None:
    path = write_vit(tmp_path, {"final_norm": False}, described(final_norm=False))

    with pytest.raises(UsageError, match="no final norm over its tokens"):
        load(path)
