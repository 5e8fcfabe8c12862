"""The eight DINOv2 teachers: their architectures, official weights, and the official position rule.

timm resizes the 37 x 37 position grid by another rule than the official code (patch tokens 2.6 % off at
224 px), so the grid is resampled here, once, by the official rule and loaded into a timm model built for the
size asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from proteus_cache.errors import UsageError
from proteus_cache.teachers.backbone import build_vision_transformer, check_size, describe, load_into
from proteus_cache.teachers.dinov2_models import (
    DEFAULT_SIZE_PX,
    DINOV2,
    LICENCE,
    NATIVE_GRID,
    PATCH_PX,
    Dinov2Architecture,
    official_path,
    official_url,
    recognise,
)
from proteus_cache.teachers.download import Progress, download
from proteus_cache.teachers.identity import IMAGENET_MEAN, IMAGENET_STD
from proteus_cache.teachers.random_weights import NO_LICENCE, random_state
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.teachers.weights import (
    RandomWeights,
    fit_state,
    load_weights,
    parse_weights,
    state_digest,
)


def fetch_dinov2(name: str, home: Path, progress: Progress | None = None, url: str | None = None) -> Path:
    """Download the official weights of `name` unless they are there; returns their path.

    Args:
        url: another place of the same file (a mirror).

    Raises:
        WeightsError: no network, or the file is not of this model.
    """

    def fit(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        return fit_dinov2(DINOV2[name], raw, name)

    return download(name, url or official_url(name), official_path(name, home), fit, progress)


def load_dinov2(
    name: str, *, weights: str | None, home: Path, size_px: int | None, progress: Progress | None = None
) -> Teacher:
    """Build the DINOv2 teacher `name`; arguments and errors as `registry.load_teacher`."""
    architecture = DINOV2[name]
    side_px = DEFAULT_SIZE_PX if size_px is None else size_px
    check_size(side_px, PATCH_PX, name)
    chosen = parse_weights(weights) if weights is not None else None
    if isinstance(chosen, RandomWeights):
        state = random_state(_native_model(architecture), chosen.seed)
        sha256, source, licence = state_digest(state), str(chosen), NO_LICENCE
    else:
        path = fetch_dinov2(name, home, progress) if chosen is None else chosen
        loaded = load_weights(path, home, lambda raw: fit_dinov2(architecture, raw, name))
        state, sha256 = loaded.state, loaded.sha256
        source = official_url(name) if chosen is None else chosen.name
        licence = LICENCE if chosen is None else f"unknown, local file (Meta's own weights: {LICENCE})"
    model = build_dinov2(architecture, state, (side_px, side_px))
    identity = describe(
        model,
        name=name,
        architecture=architecture.timm_arguments(side_px),
        size_px=side_px,
        weights_source=source,
        weights_sha256=sha256,
        licence=licence,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return Teacher(model, identity)


def build_dinov2(
    architecture: Dinov2Architecture, state: Mapping[str, Tensor], size_px: tuple[int, int]
) -> VisionTransformer:
    """A timm model for views of (height, width) whose outputs are the official ones.

    Args:
        state: as `fit_dinov2` returns it, positions on the native 37 x 37 grid.
        size_px: height and width, multiples of 14.
    """
    grid = (size_px[0] // PATCH_PX, size_px[1] // PATCH_PX)
    n_prefix = 0 if architecture.n_register_tokens else 1
    positions = resample_positions(state["pos_embed"], grid, n_prefix, has_registers=n_prefix == 0)
    model = build_vision_transformer(architecture.timm_arguments(size_px[0]), size_px)
    load_into(model, {**state, "pos_embed": positions})
    return model


def resample_positions(positions: Tensor, grid: tuple[int, int], n_prefix: int, *, has_registers: bool) -> Tensor:
    """Position embeddings for another patch grid, by the official rule.

    Args:
        positions: (1, n_prefix + M * M, D) float32 on a square native grid, row by row.
        grid: (height, width) in patches.
        n_prefix: leading embeddings that belong to no patch (CLS).
        has_registers: models with registers resize by output size with antialiasing; those without by the
            scale (n + 0.1) / M of each axis, without.

    Returns:
        (1, n_prefix + height * width, D) float32.

    Source: facebookresearch/dinov2 at b8931f7b, `DinoVisionTransformer.interpolate_pos_encoding`.
    """
    prefix, patches = positions[:, :n_prefix], positions[:, n_prefix:]
    side = round(patches.shape[1] ** 0.5)
    if grid == (side, side):
        return positions
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if has_registers:
        resized = functional.interpolate(square, size=grid, mode="bicubic", antialias=True)
    else:
        scale = (float(grid[0] + 0.1) / side, float(grid[1] + 0.1) / side)
        resized = functional.interpolate(square, scale_factor=scale, mode="bicubic", antialias=False)
    if tuple(resized.shape[-2:]) != grid:
        raise UsageError(f"the official position rule gives no {grid[0]} x {grid[1]} grid; choose another size")
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).contiguous()


def fit_dinov2(architecture: Dinov2Architecture, raw: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors of an official (or timm) DINOv2 file under timm's names, positions on the native grid.

    Raises:
        WeightsError: they are of another model; says of which, where that is known.
    """
    shapes = {key: tuple(value.shape) for key, value in _native_model(architecture).state_dict().items()}
    looks_like = _looks_like(raw)
    hint = f"they look like {looks_like}" if looks_like and looks_like != name else ""
    return fit_state(to_timm_names(raw), shapes, name, hint)


def to_timm_names(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official key names to timm's; files that already have timm's pass unchanged.

    With registers timm keeps positions of patches only, so the CLS token takes its own in.

    Source: the names in facebookresearch/dinov2 at b8931f7b and in timm's VisionTransformer.
    """
    state = {}
    for key, tensor in raw.items():
        if key == "mask_token":
            continue
        name = "reg_token" if key == "register_tokens" else key
        state[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = tensor
    if "register_tokens" in raw and "pos_embed" in state and "cls_token" in state:
        positions, cls_token = state["pos_embed"], state["cls_token"]
        if positions.ndim == cls_token.ndim == 3 and positions.shape[2] == cls_token.shape[2]:
            state["cls_token"] = cls_token.float() + positions[:, :1].float()
            state["pos_embed"] = positions[:, 1:]
    return state


def _native_model(architecture: Dinov2Architecture) -> VisionTransformer:
    """On the meta device: names and shapes at the size the official weights were made for."""
    side_px = NATIVE_GRID * PATCH_PX
    return build_vision_transformer(architecture.timm_arguments(side_px), (side_px, side_px))


def _looks_like(raw: Mapping[str, Tensor]) -> str | None:
    """The DINOv2 model whose width, depth, patch and registers these tensors have."""
    cls_token, patches = raw.get("cls_token"), raw.get("patch_embed.proj.weight")
    if cls_token is None or patches is None or tuple(patches.shape[2:]) != (PATCH_PX, PATCH_PX):
        return None
    depth = len({key.split(".")[1] for key in raw if key.startswith("blocks.")})
    has_registers = "register_tokens" in raw or "reg_token" in raw
    return recognise(cls_token.shape[-1], depth, has_registers=has_registers)
