from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.random_weights import random_state
from proteus_cache.teachers.registry import load_teacher


@pytest.mark.parametrize(
    ("name", "size_px", "n_registers"),
    [
        ("vit_tiny_patch16_224", 64, 0),
        ("deit_tiny_distilled_patch16_224", 64, 1),
        ("vit_small_patch16_dinov3", 64, 4),
    ],
)
def test_targets_are_timm_s_own_tokens(tmp_path: Path, name: str, size_px: int, n_registers: int) -> None:
    teacher = load_teacher(f"timm:{name}", weights="random:0", home=tmp_path, size_px=size_px)
    views = torch.randint(0, 256, (1, size_px, size_px, 3), dtype=torch.uint8)

    targets = teacher.targets(views, ["cls", "patch"])

    identity = teacher.identity
    assert identity.n_register_tokens == n_registers
    mean, std = torch.tensor(identity.mean), torch.tensor(identity.std)
    pixels = ((views / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    model = timm.create_model(name, num_classes=0, img_size=size_px).eval()
    assert isinstance(model, VisionTransformer | Eva)
    model.load_state_dict(random_state(model, 0))
    with torch.inference_mode():
        tokens = model.forward_features(pixels)
    torch.testing.assert_close(targets["cls"], tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(targets["patch"], tokens[:, 1 + n_registers :], atol=1e-5, rtol=0)


def test_size_and_statistics_are_the_model_s_own(tmp_path: Path) -> None:
    identity = load_teacher("timm:vit_tiny_patch16_224", weights="random:4", home=tmp_path, size_px=None).identity

    assert identity.name == "timm:vit_tiny_patch16_224"
    assert (identity.size_px, identity.patch_px, identity.width, identity.depth) == (224, 16, 192, 12)
    assert identity.mean == identity.std == (0.5, 0.5, 0.5)
    assert identity.architecture == {"model_name": "vit_tiny_patch16_224", "img_size": 224}
    assert identity.weights_source == "random:4"


def test_weights_file_of_the_model_is_loaded_at_any_size(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    path = tmp_path / "tiny.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)

    own = load_teacher("timm:vit_tiny_patch16_224", weights=str(path), home=tmp_path, size_px=None)
    small = load_teacher("timm:vit_tiny_patch16_224", weights=str(path), home=tmp_path, size_px=64)

    views = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    pixels = ((views / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
    assert isinstance(model, VisionTransformer)
    with torch.inference_mode():
        expected = model.eval().forward_features(pixels)
    torch.testing.assert_close(own.targets(views, ["patch"])["patch"], expected[:, 1:], atol=1e-5, rtol=0)
    assert own.identity.weights_source == "tiny.safetensors"
    assert own.identity.weights_sha256 == small.identity.weights_sha256
    assert small.n_patches == 16


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")

    with pytest.raises(WeightsError, match=r"other\.safetensors: .*not of timm:vit_tiny_patch16_224: missing"):
        load_teacher(
            "timm:vit_tiny_patch16_224",
            weights=str(tmp_path / "other.safetensors"),
            home=tmp_path,
            size_px=None,
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_225", "has no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224"),
        ("resnet18", "is no plain ViT"),
        ("vit_base_patch16_siglip_224", "has no CLS token"),
        ("deit3_small_patch16_224.nonsense", "cannot build deit3_small_patch16_224.nonsense"),
        ("eva02_tiny_patch14_224", "has no final norm over its tokens"),
    ],
)
def test_models_that_cannot_teach_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(f"timm:{name}", weights="random:0", home=tmp_path, size_px=None)


def test_size_that_patches_do_not_tile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="size 100 px is no multiple of its patch, 16 px; try 96 or 112"):
        load_teacher("timm:vit_tiny_patch16_224", weights="random:0", home=tmp_path, size_px=100)


def test_published_weights_out_of_reach_say_what_to_do_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(url: str, **how: object) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("the hub client would ask for a minute"))

    with pytest.raises(WeightsError, match=r"from https://huggingface.co/timm/\S+ \(no route to host\).*HF_HOME"):
        load_teacher("timm:vit_tiny_patch16_224", weights=None, home=tmp_path, size_px=None)
    assert len(asked) == 1


def test_weights_that_the_hub_client_holds_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/somewhere/model.safetensors")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("nobody is to be asked"))
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, pretrained, **how: create(*names, **how))

    teacher = load_teacher("timm:vit_tiny_patch16_224", weights=None, home=tmp_path, size_px=None)

    assert teacher.identity.weights_source.startswith("hf-hub:timm/vit_tiny_patch16_224")
