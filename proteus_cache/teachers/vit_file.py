"""Teachers in a safetensors file whose metadata say how to build them and how pixels are normalised.

`vit` is any such file of the user's; `demo` is the small trained one that comes with this package.

Metadata: `timm_vision_transformer` (JSON object, arguments of timm's VisionTransformer), `pixel_mean` and
`pixel_std` (JSON lists of three numbers), and, where known, `licence`. Students are saved in this form too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.backbone import (
    MLP_LAYERS,
    build_vision_transformer,
    check_size,
    check_tokens,
    describe,
    fit_backbone,
    load_into,
)
from proteus_cache.teachers.identity import Argument, Statistics
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.teachers.weights import load_weights, parse_weights, read_metadata

_ARCHITECTURE = "timm_vision_transformer"
_COUNTS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
_FLAGS = ("qkv_bias", "qk_norm", "proj_bias", "class_token", "no_embed_class", "pre_norm", "final_norm")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "global_pool": ("", "token", "avg", "avgmax", "max"),
    "mlp_layer": tuple(MLP_LAYERS),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu"),
}
_LARGEST = 1 << 16
_MOST_BLOCKS = 128
_DEMO_FILE = Path(__file__).with_name("demo.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedVit:
    """What the metadata of a `vit` file say, checked."""

    arguments: Mapping[str, Argument]
    """Of timm's VisionTransformer, without `img_size` and `num_classes`."""
    size_px: int
    patch_px: int
    depth: int
    mean: Statistics
    std: Statistics
    licence: str


def load_vit(*, weights: str | None, home: Path, size_px: int | None) -> Teacher:
    """Build the teacher that a file describes; arguments and errors as `registry.load_teacher`."""
    return _load("vit", _file_of("vit", weights), home, size_px)


def load_demo(*, weights: str | None, home: Path, size_px: int | None) -> Teacher:
    """Build the teacher `demo`, trained by pipelines/train_demo_teacher.py; errors as `registry.load_teacher`."""
    return _load("demo", _file_of("demo", weights), home, size_px)


def described_file(name: str, weights: str | None) -> DescribedVit:
    """What the file of teacher `vit` or `demo` says of itself; no tensor is read.

    Raises:
        UsageError: `vit` without a file, or `demo` with one.
        WeightsError: it cannot be read, or describes no ViT.
    """
    path = _file_of(name, weights)
    return parse_description(read_metadata(path), path)


def _file_of(name: str, weights: str | None) -> Path:
    """The weights of `demo`, which ship with the package, or those given for `vit`."""
    if name == "demo":
        if weights is not None:
            raise UsageError("teacher demo comes with its weights; leave --weights out")
        return _DEMO_FILE
    path = parse_weights(weights) if weights is not None else None
    if not isinstance(path, Path) or path.suffix != ".safetensors":
        given = "" if weights is None else f", got {weights}"
        raise UsageError(f"teacher vit needs --weights FILE.safetensors whose metadata describe the model{given}")
    return path


def _load(name: str, path: Path, home: Path, size_px: int | None) -> Teacher:
    vit = parse_description(read_metadata(path), path)
    side_px = vit.size_px if size_px is None else size_px
    check_size(side_px, vit.patch_px, name)
    loaded = load_weights(path, home, lambda raw: _fit(vit, raw))
    model = build_vision_transformer({**vit.arguments, "num_classes": 0}, (side_px, side_px))
    check_tokens(model, f"the model in {path}")
    load_into(model, loaded.state)
    identity = describe(
        model,
        name=name,
        architecture={"img_size": side_px, **vit.arguments, "num_classes": 0},
        size_px=side_px,
        weights_source=path.name,
        weights_sha256=loaded.sha256,
        licence=vit.licence,
        mean=vit.mean,
        std=vit.std,
    )
    return Teacher(model, identity)


def parse_description(metadata: Mapping[str, str], path: Path) -> DescribedVit:
    """Check the metadata of a file that claims to describe a ViT.

    Raises:
        WeightsError: something is missing, unknown or impossible; names the file and the field.
    """
    arguments = _json(metadata, _ARCHITECTURE, path)
    if not isinstance(arguments, dict):
        raise WeightsError(f"{path}: {_ARCHITECTURE} is not a JSON object of arguments")
    for key, value in arguments.items():
        if not _is_possible(key, value):
            raise WeightsError(f"{path}: {_ARCHITECTURE} has {key} = {value!r}, which teacher vit does not take")
    if missing := [key for key in _COUNTS if key not in arguments]:
        raise WeightsError(f"{path}: {_ARCHITECTURE} lacks {missing[0]}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise WeightsError(f"{path}: {_ARCHITECTURE}: num_heads does not divide embed_dim")
    return DescribedVit(
        arguments={key: value for key, value in arguments.items() if key not in ("img_size", "num_classes")},
        size_px=arguments["img_size"],
        patch_px=arguments["patch_size"],
        depth=arguments["depth"],
        mean=_statistics(metadata, "pixel_mean", path),
        std=_statistics(metadata, "pixel_std", path),
        licence=metadata.get("licence", "unknown"),
    )


def _is_possible(key: str, value: Any) -> bool:  # Any: whatever the JSON held
    """Whether a ViT with a CLS token can have this argument; bounds keep hostile files cheap."""
    if key in _FLAGS:
        return value is True if key == "class_token" else isinstance(value, bool)
    if key in _CHOICES:
        return value in _CHOICES[key]
    if isinstance(value, bool):
        return False
    if key in _COUNTS:
        return isinstance(value, int) and 1 <= value <= (_MOST_BLOCKS if key == "depth" else _LARGEST)
    if key in ("num_classes", "reg_tokens"):
        return isinstance(value, int) and 0 <= value <= _LARGEST
    if key == "in_chans":
        return bool(value == 3)
    if key == "init_values" and value is None:
        return True
    return key in ("mlp_ratio", "init_values") and isinstance(value, int | float) and 0 < value <= _LARGEST


def _fit(vit: DescribedVit, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit the tensors; the model is built only once the file is known to hold as many blocks as it says."""
    n_blocks = len({name.split(".")[1] for name in raw if name.startswith("blocks.")})
    if n_blocks != vit.depth:
        raise WeightsError(f"its metadata say {vit.depth} blocks, it holds {n_blocks}")
    model = build_vision_transformer({**vit.arguments, "num_classes": 0}, (vit.size_px, vit.size_px))
    return fit_backbone(model, raw, "the model its metadata describe")


def _statistics(metadata: Mapping[str, str], key: str, path: Path) -> Statistics:
    values = _json(metadata, key, path)
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
        raise WeightsError(f"{path}: {key} is not a JSON list of three numbers")
    red, green, blue = (float(value) for value in values)
    if key == "pixel_std" and min(red, green, blue) <= 0:
        raise WeightsError(f"{path}: {key} holds a number that is not positive")
    return (red, green, blue)


def _is_number(value: Any) -> bool:  # Any: whatever the JSON held
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _json(metadata: Mapping[str, str], key: str, path: Path) -> Any:  # Any: what JSON holds is checked by the caller
    if key not in metadata:
        raise WeightsError(f"{path}: its metadata have no {key}; teacher vit needs a file that describes its model")
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {key} is not valid JSON") from error
