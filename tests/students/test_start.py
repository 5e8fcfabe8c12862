"""Start weights: files of every kind that a student may begin with, and those that are refused."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from proteus_cache.errors import WeightsError
from proteus_cache.students.registry import STUDENTS, StudentSize, build_student, student_metadata
from proteus_cache.students.start import load_start
from proteus_cache.students.vit import clean_tokens
from proteus_cache.teachers.dinov2 import resample_positions
from tests.teachers.test_golden import TOLERANCE, read_golden

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
NAME, WIDTH = "vit_ti14", 192


def _student(seed: int = 0, size_px: int = 28, patch_px: int = 14) -> VisionTransformer:
    return build_student(NAME, size_px=size_px, patch_px=patch_px, mean=MEAN, std=STD, seed=seed)


def _other(size_px: int = 28) -> dict[str, Tensor]:
    """Tensors that are not those of `_student()`, all different from each other."""
    state = _student(seed=9, size_px=size_px).state_dict()
    torch.manual_seed(3)
    return {name: value + torch.randn_like(value) for name, value in state.items()}


def _write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=metadata)
    return path


def _check(student: VisionTransformer, expected: Mapping[str, Tensor]) -> None:
    found = student.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_our_own_student_is_taken_as_it_is(tmp_path: Path) -> None:
    state = _other()
    metadata = student_metadata(NAME, size_px=28, patch_px=14, mean=MEAN, std=STD)
    student = _student()

    mask_token = load_start(_write(tmp_path / "student.safetensors", state, metadata), student, NAME)

    assert mask_token is None
    _check(student, state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_official_file_is_resampled_by_the_official_rule(tmp_path: Path, suffix: str) -> None:
    state = _other(size_px=70)  # 5 x 5 positions to 2 x 2
    official = state | {"mask_token": torch.randn(1, WIDTH)}
    path = tmp_path / f"dinov2{suffix}"
    if suffix == ".pth":
        torch.save(OrderedDict(official), path)
    else:
        _write(path, official)
    student = _student()

    mask_token = load_start(path, student, NAME)

    assert mask_token is not None
    assert torch.equal(mask_token, official["mask_token"])
    positions = resample_positions(state["pos_embed"], (2, 2), 1, has_registers=False)
    assert positions.shape == (1, 5, WIDTH)
    _check(student, state | {"pos_embed": positions})


@pytest.mark.parametrize("size", ["224x224", "518x518"])
def test_a_student_that_begins_with_an_official_file_gives_the_official_numbers(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    golden = read_golden(test_data, "dinov2_mlp")
    sizes = cast(dict[str, StudentSize], STUDENTS)
    monkeypatch.setitem(sizes, NAME, StudentSize(width=48, depth=3, heads=3))
    student = _student(size_px=int(size.split("x")[0]))

    mask_token = load_start(_write(tmp_path / "official.safetensors", golden.weights), student, NAME)

    tokens = clean_tokens(student, golden.tensors[f"{size}/pixels"].float()).clean
    for name, found in {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}.items():
        torch.testing.assert_close(found, golden.tensors[f"{size}/{name}"], atol=TOLERANCE, rtol=0)
    assert mask_token is not None
    assert torch.equal(mask_token, golden.weights["mask_token"])


def test_the_student_of_a_released_proteus_checkpoint_is_found_among_the_rest(tmp_path: Path) -> None:
    state = _other()
    wrapper = {f"student.backbone.{name}": value for name, value in state.items()}
    wrapper["student.backbone.mask_token"] = torch.randn(1, WIDTH)
    wrapper |= {"teacher.backbone.cls_token": torch.zeros(1, 1, 9), "token_head.0.weight": torch.zeros(WIDTH)}
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    path = tmp_path / "checkpoint.pth"
    arguments = argparse.Namespace(model="vit_tiny", lr=1e-3)
    torch.save({"model": wrapper, "model_ema": average, "epoch": 299, "args": arguments}, path)
    student = _student()

    mask_token = load_start(path, student, NAME)

    assert mask_token is not None
    assert torch.equal(mask_token, wrapper["student.backbone.mask_token"])
    _check(student, state)


def test_a_state_dict_of_timm_is_taken_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", patch_size=14, img_size=28, init_values=1.0, num_classes=7, pretrained=False
    )
    student = _student()

    load_start(_write(tmp_path / "timm.safetensors", model.state_dict()), student, NAME)

    _check(student, {name: value for name, value in model.state_dict().items() if not name.startswith("head.")})


def test_a_vit_without_layer_scale_begins_with_the_same_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=28, patch_size=14, embed_dim=WIDTH, depth=12, num_heads=3, num_classes=0).eval()
    student = _student().eval()
    pixels = torch.randn(2, 3, 28, 28)

    load_start(_write(tmp_path / "plain.safetensors", model.state_dict()), student, NAME)

    torch.testing.assert_close(student.forward_features(pixels), model.forward_features(pixels), atol=1e-5, rtol=1e-5)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in _other().items()}
    student = _student()

    load_start(_write(tmp_path / "half.safetensors", state), student, NAME)

    _check(student, {name: value.float() for name, value in state.items()})


def _without(state: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: _without(state, "norm.bias", "norm.weight"), "missing norm.bias and 1 more"),
        (lambda state: state | {"reg_token": torch.zeros(1, 4, WIDTH)}, "unexpected reg_token"),
        (lambda state: state | {"norm_pre.weight": torch.zeros(WIDTH)}, "unexpected norm_pre.weight"),
        (lambda state: _without(state, "blocks.3.ls1.gamma"), "missing blocks.3.ls1.gamma"),
        (
            lambda state: {f"module.{name}": value for name, value in state.items()},
            "missing .*; unexpected module.blocks",
        ),
        (lambda state: state | {"mask_token": torch.zeros(1, 5)}, r"mask_token is \(1, 5\) instead of \(1, 192\)"),
        (
            lambda state: state | {"pos_embed": torch.zeros(1, 4, WIDTH)},
            r"pos_embed is \(1, 4, 192\) instead of \(1, 5, 192\)",
        ),
        (
            lambda state: state | {"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 16, 16)},
            r"patch_embed.proj.weight is \(192, 3, 16, 16\) instead of \(192, 3, 14, 14\)",
        ),
        (lambda state: {"teacher.cls_token": torch.zeros(1)}, "these weights are not of the student vit_ti14: missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_loaded(
    tmp_path: Path, change: object, message: str
) -> None:
    assert callable(change)
    path = _write(tmp_path / "other.safetensors", change(_other()))
    student = _student()
    before = {name: value.clone() for name, value in student.state_dict().items()}

    with pytest.raises(WeightsError, match=message) as caught:
        load_start(path, student, NAME)

    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    _check(student, before)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"num_heads": 6}, "it describes a model with num_heads 6, and vit_ti14 has 3"),
        ({"act_layer": "quick_gelu"}, "it describes a model with act_layer 'quick_gelu', and vit_ti14 has 'gelu'"),
    ],
)
def test_what_the_shapes_do_not_show_is_read_in_the_description(
    tmp_path: Path, described: dict[str, object], message: str
) -> None:
    metadata = student_metadata(NAME, size_px=28, patch_px=14, mean=MEAN, std=STD)
    arguments = json.loads(metadata["timm_vision_transformer"]) | described
    path = _write(
        tmp_path / "file.safetensors", _other(), metadata | {"timm_vision_transformer": json.dumps(arguments)}
    )

    with pytest.raises(WeightsError, match=message):
        load_start(path, _student(), NAME)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("never",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": _other(), "args": _Code()}, path)

    with pytest.raises(WeightsError, match="refused, its pickle holds something other than plain tensors"):
        load_start(path, _student(), NAME)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "no such weights file"),
        ("notes.txt", b"hello", "not a weights file by its name"),
        ("cut.safetensors", b"hello", "not a readable safetensors file"),
        ("cut.pth", b"hello", "cut.pth: "),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(WeightsError, match=message):
        load_start(tmp_path / name, _student(), NAME)
