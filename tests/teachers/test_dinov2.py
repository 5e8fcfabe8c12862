from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.backbone import build_vision_transformer
from proteus_cache.teachers.dinov2 import fetch_dinov2, resample_positions, to_timm_names
from proteus_cache.teachers.dinov2_models import DINOV2, Dinov2Architecture, official_path, official_url
from proteus_cache.teachers.registry import load_teacher

PUBLISHED_PARAMETERS = {
    "dinov2_vits14": 22_056_576,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vitg14": 1_136_480_768,
}


@pytest.mark.parametrize("name", DINOV2)
def test_models_have_as_many_parameters_as_meta_publishes(name: str) -> None:
    architecture = DINOV2[name]
    model = build_vision_transformer(architecture.timm_arguments(518), (518, 518))

    n_parameters = sum(parameter.numel() for parameter in model.parameters())

    # timm has no mask token (one width less), and with registers folds the CLS position into the CLS token.
    n_folded = 2 if architecture.n_register_tokens else 1
    published = PUBLISHED_PARAMETERS[name.removesuffix("_reg")] + architecture.n_register_tokens * architecture.width
    assert n_parameters == published - n_folded * architecture.width


def test_official_urls() -> None:
    base = "https://dl.fbaipublicfiles.com/dinov2"

    assert official_url("dinov2_vits14") == f"{base}/dinov2_vits14/dinov2_vits14_pretrain.pth"
    assert official_url("dinov2_vitg14_reg") == f"{base}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    assert official_path("dinov2_vitg14_reg", Path("home")) == Path(
        "home/weights/dinov2_vitg14_reg4_pretrain.safetensors"
    )


def test_identity_says_what_made_the_targets(tiny_dinov2: Dinov2Architecture, tmp_path: Path) -> None:
    identity = load_teacher("dinov2_vits14", weights="random:7", home=tmp_path, size_px=None).identity

    assert identity.name == "dinov2_vits14"
    assert re.fullmatch(r"timm \d+\.\d+\S* VisionTransformer", identity.implementation)
    assert identity.weights_source == "random:7"
    assert re.fullmatch("[0-9a-f]{64}", identity.weights_sha256)
    assert (identity.size_px, identity.patch_px, identity.width, identity.depth) == (224, 14, 24, 2)
    assert identity.n_register_tokens == 0
    assert identity.mean == (0.485, 0.456, 0.406)
    assert identity.architecture["img_size"] == 224


def test_weights_digest_does_not_depend_on_size_or_file_form(
    tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor], tmp_path: Path
) -> None:
    timm_form = {name: value.clone() for name, value in to_timm_names(official_state).items()}
    save_file(official_state, tmp_path / "official.safetensors")
    save_file(timm_form, tmp_path / "timm.safetensors")
    torch.save(official_state, tmp_path / "official.pth")

    digests = {
        load_teacher(
            "dinov2_vits14", weights=str(tmp_path / file), home=tmp_path, size_px=size_px
        ).identity.weights_sha256
        for file in ("official.safetensors", "timm.safetensors", "official.pth")
        for size_px in (28, 224)
    }

    assert len(digests) == 1


def test_positions_on_the_native_grid_are_untouched() -> None:
    positions = torch.randn(1, 1 + 37 * 37, 8)

    assert resample_positions(positions, (37, 37), 1, has_registers=False) is positions


def test_positions_of_another_grid_keep_their_prefix_and_place() -> None:
    rows = torch.arange(37.0).repeat_interleave(37).reshape(1, -1, 1)
    positions = torch.cat([torch.full((1, 1, 1), -5.0), rows], dim=1)

    resampled = resample_positions(positions, (16, 22), 1, has_registers=False)

    assert tuple(resampled.shape) == (1, 1 + 16 * 22, 1)
    assert resampled[0, 0, 0] == -5
    grid = resampled[0, 1:, 0].reshape(16, 22)
    # Rows went in, so values rise from row to row and are the same along each.
    assert bool((grid.diff(dim=0) > 0).all())
    torch.testing.assert_close(grid, grid[:, :1].expand(16, 22), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size_px", [0, 13, 225, -14])
def test_sizes_that_patches_do_not_tile_are_refused(size_px: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dinov2_vits14: size -?\d+ px is no multiple of its patch, 14 px; try"):
        load_teacher("dinov2_vits14", weights="random:0", home=tmp_path, size_px=size_px)


def test_weights_of_another_dinov2_are_named(
    tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(official_state, path)

    with pytest.raises(WeightsError) as caught:
        load_teacher("dinov2_vitb14", weights=str(path), home=tmp_path, size_px=None)

    message = str(caught.value)
    assert str(path) in message
    assert "not of dinov2_vitb14: missing blocks.10." in message
    assert "blocks.0.attn.proj.bias is (24,) instead of (768,)" in message
    assert message.endswith("they look like dinov2_vits14")
    assert "\n" not in message


def test_weights_without_registers_do_not_pass_as_those_with(
    tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(official_state, tmp_path / "weights.safetensors")

    with pytest.raises(WeightsError, match="missing reg_token"):
        load_teacher("dinov2_vits14_reg", weights=str(tmp_path / "weights.safetensors"), home=tmp_path, size_px=28)


def test_fetch_downloads_converts_and_keeps_one_file(
    tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor], tmp_path: Path, views: Tensor
) -> None:
    served = tmp_path / "served.pth"
    torch.save(official_state, served)
    steps: list[tuple[int, int | None]] = []

    path = fetch_dinov2("dinov2_vits14", tmp_path, lambda done, total: steps.append((done, total)), served.as_uri())

    assert path == official_path("dinov2_vits14", tmp_path)
    assert [found.name for found in (tmp_path / "weights").iterdir()] == [path.name]
    size = served.stat().st_size
    assert steps[-1] == (size, size)
    downloaded = load_teacher("dinov2_vits14", weights=None, home=tmp_path, size_px=28)
    local = load_teacher("dinov2_vits14", weights=str(served), home=tmp_path, size_px=28)
    assert downloaded.identity.weights_source == official_url("dinov2_vits14")
    assert downloaded.identity.licence == "Apache-2.0"
    assert downloaded.identity.weights_sha256 == local.identity.weights_sha256
    assert torch.equal(downloaded.targets(views, ["patch"])["patch"], local.targets(views, ["patch"])["patch"])


def test_fetch_again_does_not_ask_the_network(
    tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor], tmp_path: Path
) -> None:
    served = tmp_path / "served.pth"
    torch.save(official_state, served)
    first = fetch_dinov2("dinov2_vits14", tmp_path, url=served.as_uri())
    served.unlink()

    assert fetch_dinov2("dinov2_vits14", tmp_path, url=served.as_uri()) == first


def test_offline_says_url_place_and_command(tmp_path: Path) -> None:
    url = (tmp_path / "nothing.pth").as_uri()

    with pytest.raises(WeightsError) as caught:
        fetch_dinov2("dinov2_vitl14_reg", tmp_path, url=url)

    message = str(caught.value)
    assert message.startswith(f"cannot download {url} (")
    assert "`proteus-cache fetch dinov2_vitl14_reg`" in message
    assert str(tmp_path / "weights" / "dinov2_vitl14_reg4_pretrain.safetensors") in message
    assert "--weights" in message
    assert "\n" not in message
    assert not list((tmp_path / "weights").iterdir())


def test_fetch_of_something_else_leaves_nothing(tmp_path: Path) -> None:
    served = tmp_path / "served.pth"
    served.write_bytes(b"<html>404</html>")

    with pytest.raises(WeightsError, match=r"file://\S+served\.pth: (not a readable PyTorch weights file|refused)"):
        fetch_dinov2("dinov2_vits14", tmp_path, url=served.as_uri())

    assert not list((tmp_path / "weights").iterdir())
