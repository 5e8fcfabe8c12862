"""Teachers that timm describes: `timm:NAME`, and `vit`, a file whose metadata says how to build the model.

A teacher needs a CLS token, patch tokens and a final norm over tokens; timm's VisionTransformer and Eva have
these. Another size than the model's own resamples the position embeddings by timm's rule.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.identity import Argument, Statistics, TeacherIdentity
from proteus_cache.teachers.random_weights import random_state
from proteus_cache.teachers.teacher import Teacher, TokenModel
from proteus_cache.teachers.weights import (
    RandomWeights,
    fit_state,
    load_weights,
    parse_weights,
    read_metadata,
    state_digest,
)

_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")
_MLP_LAYERS = {"Mlp": Mlp, "SwiGLUPacked": SwiGLUPacked}
_NOT_BACKBONE = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
_ARGUMENT_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size", "embed_dim", "depth", "num_heads"), (int,)),
    **dict.fromkeys(("in_chans", "num_classes", "reg_tokens"), (int,)),
    **dict.fromkeys(("qkv_bias", "qk_norm", "proj_bias", "class_token", "no_embed_class"), (bool,)),
    **dict.fromkeys(("pre_norm", "final_norm"), (bool,)),
    **dict.fromkeys(("global_pool", "mlp_layer", "act_layer"), (str,)),
    "mlp_ratio": (int, float),
    "init_values": (int, float, type(None)),
}
_REQUIRED = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
_LARGEST = 1 << 16


def build_vision_transformer(
    arguments: Mapping[str, Argument], size_px: tuple[int, int]
) -> VisionTransformer:
    """timm's VisionTransformer on the meta device: names and shapes, no memory.

    Args:
        arguments: of its constructor, `mlp_layer` by name.
        size_px: height and width of a view, in place of `img_size`.
    """
    keywords: dict[str, Any] = {**arguments, "img_size": size_px}  # Any: timm's constructor is untyped here
    if "mlp_layer" in keywords:
        keywords["mlp_layer"] = _MLP_LAYERS[keywords["mlp_layer"]]
    return VisionTransformer(**keywords, device="meta")


def load_into(model: TokenModel, state: Mapping[str, Tensor]) -> None:
    """Make `state` the parameters of `model`, uncopied; positions of another grid are resampled by timm."""
    state = dict(state)
    if model.pos_embed is not None and state["pos_embed"].shape != model.pos_embed.shape:
        n_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = list(model.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=n_prefix)
    model.load_state_dict(state, strict=True, assign=True)


def load_vit(*, weights: str | None, home: Path, size_px: int | None) -> Teacher:
    """Build the teacher that a safetensors file describes; arguments and errors as `registry.load_teacher`.

    The file's metadata hold `timm_vision_transformer` (JSON arguments of timm's class), `pixel_mean` and
    `pixel_std` (JSON lists of three), and may hold `licence`.
    """
    chosen = parse_weights(weights) if weights is not None else None
    if not isinstance(chosen, Path):
        raise UsageError("teacher vit needs --weights FILE.safetensors whose metadata describe the model")
    metadata = read_metadata(chosen)
    arguments = _described_architecture(chosen, metadata)
    mean, std = (_described_statistics(chosen, metadata, key) for key in ("pixel_mean", "pixel_std"))
    side_px = int(arguments["img_size"] or 0) if size_px is None else size_px
    _check_size("vit", side_px, int(arguments["patch_size"] or 0))
    arguments |= {"img_size": side_px, "num_classes": 0}
    loaded = load_weights(chosen, home, lambda raw: _fit_described(arguments, raw))
    model = build_vision_transformer(arguments, (side_px, side_px))
    load_into(model, loaded.state)
    identity = _identity(
        "vit",
        model,
        arguments,
        side_px,
        chosen.name,
        loaded.sha256,
        metadata.get("licence", "unknown"),
        mean,
        std,
    )
    return Teacher(model, identity)


def load_timm(model_name: str, *, weights: str | None, home: Path, size_px: int | None) -> Teacher:
    """Build a teacher from timm's list of models; arguments and errors as `registry.load_teacher`."""
    name = f"timm:{model_name}"
    _check_timm_name(model_name)
    chosen = parse_weights(weights) if weights is not None else None
    model = _create(model_name, size_px, is_pretrained=chosen is None)
    config = cast(Mapping[str, Any], model.pretrained_cfg)  # Any: timm's own record of mixed values
    side_px = int(config["input_size"][-1]) if size_px is None else size_px
    _check_size(name, side_px, model.patch_embed.patch_size[0])
    licence = "unknown"
    if chosen is None:
        state: Mapping[str, Tensor] = model.state_dict()
        sha256 = state_digest(state)
        source = f"hf-hub:{config['hf_hub_id']}" if config.get("hf_hub_id") else str(config.get("url"))
        licence = config.get("license") or "unknown"
    elif isinstance(chosen, RandomWeights):
        state = random_state(model, chosen.seed)
        sha256, source, licence = state_digest(state), str(weights), "none, random weights"
    else:
        loaded = load_weights(chosen, home, lambda raw: _fit(model, raw, name))
        state, sha256, source = loaded.state, loaded.sha256, chosen.name
    load_into(model, state)
    arguments: dict[str, Argument] = {"model_name": model_name, "img_size": side_px}
    mean, std = _statistics(config["mean"]), _statistics(config["std"])
    return Teacher(model, _identity(name, model, arguments, side_px, source, sha256, licence, mean, std))


def _identity(
    name: str,
    model: TokenModel,
    arguments: Mapping[str, Argument],
    side_px: int,
    source: str,
    sha256: str,
    licence: str,
    mean: Statistics,
    std: Statistics,
) -> TeacherIdentity:
    _check_tokens(name, model)
    return TeacherIdentity(
        name=name,
        implementation=f"timm {timm.__version__} {type(model).__name__}",
        architecture=arguments,
        weights_source=source,
        weights_sha256=sha256,
        licence=licence,
        size_px=side_px,
        patch_px=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        n_register_tokens=model.num_prefix_tokens - 1,
        mean=mean,
        std=std,
    )


def _check_timm_name(model_name: str) -> None:
    """Refuse unknown models, and those of a family that has no tokens, before anything is built."""
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(module="vision_transformer"), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them"
        raise UsageError(f"timm {timm.__version__} has no model {model_name!r}; {hint}")
    if timm.models.model_entrypoint(model_name).__module__ not in _MODULES:
        raise UsageError(f"timm:{model_name} is no plain ViT; a teacher needs a CLS token and patch tokens")


def _create(model_name: str, size_px: int | None, *, is_pretrained: bool) -> TokenModel:
    size: dict[str, Any] = {} if size_px is None else {"img_size": size_px}
    if is_pretrained and not timm.is_model_pretrained(model_name):
        raise WeightsError(
            f"timm has no published weights for {model_name}; pass --weights FILE or random:SEED"
        )
    try:
        model = timm.create_model(model_name, pretrained=is_pretrained, num_classes=0, **size)
    except Exception as error:  # hub clients raise errors of several unrelated libraries
        if not is_pretrained:
            raise UsageError(f"timm cannot build {model_name} at {size_px} px: {_line(error)}") from error
        raise WeightsError(
            f"cannot get the published weights of timm:{model_name} ({_line(error)}); load them once on a "
            "connected machine with the same HF_HOME, or pass --weights FILE"
        ) from error
    if not isinstance(model, VisionTransformer | Eva):
        raise UsageError(f"timm:{model_name} is a {type(model).__name__}, not a plain ViT")
    _check_tokens(f"timm:{model_name}", model)
    return model


def _check_tokens(name: str, model: TokenModel) -> None:
    if model.cls_token is None:
        raise UsageError(f"{name} has no CLS token, which a teacher needs")
    if isinstance(model.norm, nn.Identity):
        raise UsageError(f"{name} has no final norm over its tokens (it normalises after pooling)")


def _check_size(name: str, side_px: int, patch_px: int) -> None:
    if patch_px < 1 or side_px < patch_px or side_px % patch_px:
        raise UsageError(
            f"{name}: {side_px} px is no multiple of its patch, {patch_px} px; choose another size"
        )


def _fit(model: TokenModel, raw: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The backbone's tensors; position embeddings may be of another square grid."""
    state = {name: tensor for name, tensor in raw.items() if not name.startswith(_NOT_BACKBONE)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    positions = state.get("pos_embed")
    if positions is not None and model.pos_embed is not None and positions.ndim == 3:
        n_patches = positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
        if n_patches > 0 and math.isqrt(n_patches) ** 2 == n_patches:
            shapes["pos_embed"] = (1, positions.shape[1], model.embed_dim)
    return fit_state(state, shapes, what, "")


def _fit_described(arguments: Mapping[str, Argument], raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `_fit`, for a model built only once the file is known to hold as many blocks as it says."""
    n_blocks = len({name.split(".")[1] for name in raw if name.startswith("blocks.")})
    if n_blocks != arguments["depth"]:
        raise WeightsError(f"the metadata say {arguments['depth']} blocks, the file holds {n_blocks}")
    side_px = int(arguments["img_size"] or 0)
    return _fit(
        build_vision_transformer(arguments, (side_px, side_px)), raw, "the model its metadata describe"
    )


def _described_architecture(path: Path, metadata: Mapping[str, str]) -> dict[str, Argument]:
    text = metadata.get("timm_vision_transformer")
    if text is None:
        raise WeightsError(
            f"{path}: its metadata have no timm_vision_transformer; teacher vit needs a file that has"
        )
    arguments = _json(path, "timm_vision_transformer", text)
    if not isinstance(arguments, dict):
        raise WeightsError(f"{path}: timm_vision_transformer is not an object of arguments")
    for key, value in arguments.items():
        allowed = _ARGUMENT_TYPES.get(key)
        if allowed is None:
            raise WeightsError(
                f"{path}: timm_vision_transformer has {key!r}, which teacher vit does not know"
            )
        is_number_in_range = isinstance(value, bool | str | None) or 0 <= value <= _LARGEST
        if (
            not isinstance(value, allowed)
            or (bool not in allowed and isinstance(value, bool))
            or not is_number_in_range
        ):
            raise WeightsError(f"{path}: timm_vision_transformer has {key} = {value!r}, which cannot be")
    if missing := [key for key in _REQUIRED if arguments.get(key, 0) < 1]:
        raise WeightsError(f"{path}: timm_vision_transformer lacks {missing[0]}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise WeightsError(f"{path}: timm_vision_transformer: num_heads does not divide embed_dim")
    if arguments.get("mlp_layer", "Mlp") not in _MLP_LAYERS or arguments.get("in_chans", 3) != 3:
        raise WeightsError(
            f"{path}: timm_vision_transformer: teacher vit takes Mlp or SwiGLUPacked, and 3 channels"
        )
    return arguments


def _described_statistics(path: Path, metadata: Mapping[str, str], key: str) -> Statistics:
    if key not in metadata:
        raise WeightsError(f"{path}: its metadata have no {key}; teacher vit needs a file that has")
    values = _json(path, key, metadata[key])
    is_three = isinstance(values, list) and len(values) == 3
    if not is_three or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise WeightsError(f"{path}: {key} is not a list of three numbers")
    if key == "pixel_std" and min(values) <= 0:
        raise WeightsError(f"{path}: {key} holds a number that is not positive")
    return _statistics(values)


def _json(path: Path, key: str, text: str) -> Any:  # Any: what JSON holds is checked by the caller
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {key} is not valid JSON") from error


def _statistics(values: Any) -> Statistics:  # Any: a list or tuple of numbers from JSON or timm
    red, green, blue = (float(value) for value in values)
    return (red, green, blue)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
