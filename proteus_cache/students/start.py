"""Start weights of a student: a file of a ViT becomes the state that training begins with, or is refused.

Read are our own `student.safetensors` and `ema.safetensors`, official DINOv2 files, released Proteus files (names begin
with `student.backbone.`), and state dicts of timm's VisionTransformer, as .safetensors or .pth (restricted unpickler).
Everything must fit but for three things that change no number: a classifier is left out, positions of another square
grid are resampled by DINOv2's rule, and a ViT without LayerScale gets LayerScale 1.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from proteus_cache.errors import WeightsError
from proteus_cache.teachers.backbone import fit_backbone
from proteus_cache.teachers.dinov2 import resample_positions, to_timm_names
from proteus_cache.teachers.weights import read_state

log = logging.getLogger(__name__)

_PROTEUS_PREFIX = "student.backbone."
_DESCRIPTION = "timm_vision_transformer"
_PLAIN = {"act_layer": "gelu", "mlp_layer": "Mlp", "qk_norm": False, "pre_norm": False}
"""What a student is where the description of a file says nothing; tensors alone do not tell the activation."""


def load_start(path: Path, student: VisionTransformer, name: str) -> Tensor | None:
    """Put the weights of a file into a student.

    Args:
        path: of the file.
        student: on the CPU; changed in place.
        name: of the student, for messages.

    Returns:
        (1, D) mask token of the file, or None where it has none.

    Raises:
        WeightsError: the file cannot be read, or is not of this student; names the first tensors that differ. Nothing
            was loaded.
    """
    raw, metadata = read_state(path)
    try:
        _check_description(metadata, student, name)
        state = _backbone(raw)
        mask_token = _mask_token(state, student)
        state = _with_layer_scale(to_timm_names(state), student)
        fitted = fit_backbone(student, state, f"the student {name}")
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    grid, n_positions = student.patch_embed.grid_size, fitted["pos_embed"].shape[1]
    fitted["pos_embed"] = resample_positions(fitted["pos_embed"], grid, n_prefix=1, has_registers=False)
    student.load_state_dict(fitted, strict=True)
    log.info(
        "start weights=%s tensors=%d positions=%d of=%d mask_token=%s",
        path,
        len(fitted),
        1 + grid[0] * grid[1],
        n_positions,
        "none, zero" if mask_token is None else "from the file",
    )
    return mask_token


def _backbone(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's tensors of a released Proteus file (its teacher and heads stay behind), or all."""
    students = {name.removeprefix(_PROTEUS_PREFIX): t for name, t in raw.items() if name.startswith(_PROTEUS_PREFIX)}
    return students or dict(raw)


def _mask_token(state: dict[str, Tensor], student: VisionTransformer) -> Tensor | None:
    """Take the mask token out of a state."""
    token = state.pop("mask_token", None)
    if token is None:
        return None
    if token.numel() != student.embed_dim or token.shape[-1] != student.embed_dim:
        raise WeightsError(f"mask_token is {tuple(token.shape)} instead of (1, {student.embed_dim})")
    return token.detach().to(torch.float32).reshape(1, -1).clone()


def _with_layer_scale(state: dict[str, Tensor], student: VisionTransformer) -> dict[str, Tensor]:
    """`state`, with LayerScale 1 where it has none at all: the same function."""
    wanted = [name for name in student.state_dict() if name.endswith((".ls1.gamma", ".ls2.gamma"))]
    if any(name in state for name in wanted) or not any(name.startswith("blocks.") for name in state):
        return state
    return state | {name: torch.ones(student.embed_dim) for name in wanted}


def _check_description(metadata: Mapping[str, str], student: VisionTransformer, name: str) -> None:
    """Refuse a file that describes another model: heads and activations do not show in the shapes of tensors."""
    if _DESCRIPTION not in metadata:
        return
    try:
        described = dict(json.loads(metadata[_DESCRIPTION]))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"its metadata's {_DESCRIPTION} is no JSON object") from error
    n_heads = student.blocks[0].attn.num_heads  # type: ignore[union-attr]  # timm's Block
    wanted = {"num_heads": n_heads, "embed_dim": student.embed_dim, "depth": len(student.blocks), **_PLAIN}
    for key, value in wanted.items():
        if described.get(key, value) != value:
            raise WeightsError(f"it describes a model with {key} {described[key]!r}, and {name} has {value!r}")
