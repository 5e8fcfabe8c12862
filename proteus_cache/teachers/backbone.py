"""Building blocks of every teacher's model: build a timm ViT without memory, fit tensors to it, load it.

A teacher needs a CLS token, patch tokens and a final norm over tokens; timm's VisionTransformer and Eva have
these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import timm
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.errors import UsageError
from proteus_cache.teachers.identity import Argument, Statistics, TeacherIdentity
from proteus_cache.teachers.weights import fit_state

TokenModel: TypeAlias = VisionTransformer | Eva

MLP_LAYERS: Mapping[str, Any] = {
    "Mlp": Mlp,
    "SwiGLUPacked": SwiGLUPacked,
}  # Any: a class and a partial of one
_NOT_BACKBONE = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


def build_vision_transformer(arguments: Mapping[str, Argument], size_px: tuple[int, int]) -> VisionTransformer:
    """timm's VisionTransformer on the meta device: names and shapes, no memory.

    Args:
        arguments: of its constructor, `mlp_layer` by name.
        size_px: height and width of a view, in place of `img_size`.
    """
    keywords: dict[str, Any] = {**arguments, "img_size": size_px}  # Any: one dict of mixed arguments
    if "mlp_layer" in keywords:
        keywords["mlp_layer"] = MLP_LAYERS[keywords["mlp_layer"]]
    return VisionTransformer(**keywords, device="meta")


def fit_backbone(model: TokenModel, raw: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors that `model` takes, without those of a classifier; float32.

    Position embeddings may be of another square grid: `load_into` resamples them.

    Raises:
        WeightsError: names or shapes are of another model.
    """
    state = {name: tensor for name, tensor in raw.items() if not name.startswith(_NOT_BACKBONE)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    positions = state.get("pos_embed")
    if positions is not None and model.pos_embed is not None and positions.ndim == 3:
        n_patches = positions.shape[1] - _n_prefix_positions(model)
        if n_patches > 0 and math.isqrt(n_patches) ** 2 == n_patches:
            shapes["pos_embed"] = (1, positions.shape[1], model.embed_dim)
    return fit_state(state, shapes, what)


def load_into(model: TokenModel, state: Mapping[str, Tensor]) -> None:
    """Make `state` the parameters of `model`, uncopied; positions of another grid are resampled by timm."""
    state = dict(state)
    if model.pos_embed is not None and state["pos_embed"].shape != model.pos_embed.shape:
        grid = list(model.patch_embed.grid_size)
        n_prefix = _n_prefix_positions(model)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=n_prefix)
    model.load_state_dict(state, strict=True, assign=True)


def check_tokens(model: TokenModel, name: str) -> None:
    """Do nothing for a model whose tokens can be targets.

    Raises:
        UsageError: no CLS token, or the final norm comes after pooling.
    """
    if model.cls_token is None:
        raise UsageError(f"{name} has no CLS token, which a teacher needs")
    if isinstance(model.norm, nn.Identity):
        raise UsageError(f"{name} has no final norm over its tokens, which a teacher needs")


def check_size(size_px: int, patch_px: int, name: str) -> None:
    """Do nothing for a size that patches tile.

    Raises:
        UsageError: they do not; names the nearest sizes.
    """
    if size_px < patch_px or size_px % patch_px:
        below = max(size_px // patch_px, 1) * patch_px
        raise UsageError(
            f"{name}: size {size_px} px is no multiple of its patch, {patch_px} px; try {below} or {below + patch_px}"
        )


def describe(
    model: TokenModel,
    *,
    name: str,
    architecture: Mapping[str, Argument],
    size_px: int,
    weights_source: str,
    weights_sha256: str,
    licence: str,
    mean: Statistics,
    std: Statistics,
) -> TeacherIdentity:
    """The identity of a teacher; what the model itself knows is read from it."""
    return TeacherIdentity(
        name=name,
        implementation=f"timm {timm.__version__} {type(model).__name__}",
        architecture=architecture,
        weights_source=weights_source,
        weights_sha256=weights_sha256,
        licence=licence,
        size_px=size_px,
        patch_px=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        n_register_tokens=model.num_prefix_tokens - 1,
        mean=mean,
        std=std,
    )


def _n_prefix_positions(model: TokenModel) -> int:
    return 0 if model.no_embed_class else model.num_prefix_tokens
