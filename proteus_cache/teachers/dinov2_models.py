"""The eight DINOv2 models by name: architecture, official download, place on disk. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from proteus_cache.teachers.identity import Argument

PATCH_PX = 14
NATIVE_GRID = 37
"""Patches along a side of the 518 px images that the official position embeddings were made for."""
DEFAULT_SIZE_PX = 224
LICENCE = "Apache-2.0"
_URL = "https://dl.fbaipublicfiles.com/dinov2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dinov2Architecture:
    """What distinguishes one DINOv2 ViT from another."""

    width: int
    depth: int
    n_heads: int
    is_swiglu: bool = False
    n_register_tokens: int = 0

    def timm_arguments(self, size_px: int) -> dict[str, Argument]:
        """Arguments of timm's VisionTransformer for square views of `size_px`."""
        arguments: dict[str, Argument] = {
            "img_size": size_px,
            "patch_size": PATCH_PX,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.n_heads,
            "init_values": 1.0,
            "num_classes": 0,
        }
        if self.is_swiglu:
            # timm's ratio counts both halves of the packed matrix; the hidden width is 2/3 of 4 D.
            arguments |= {"mlp_layer": "SwiGLUPacked", "mlp_ratio": 2.66667 * 2, "act_layer": "silu"}
        if self.n_register_tokens:
            arguments |= {"reg_tokens": self.n_register_tokens, "no_embed_class": True}
        return arguments


_PLAIN = {
    "dinov2_vits14": Dinov2Architecture(width=384, depth=12, n_heads=6),
    "dinov2_vitb14": Dinov2Architecture(width=768, depth=12, n_heads=12),
    "dinov2_vitl14": Dinov2Architecture(width=1024, depth=24, n_heads=16),
    "dinov2_vitg14": Dinov2Architecture(width=1536, depth=40, n_heads=24, is_swiglu=True),
}
DINOV2: Mapping[str, Dinov2Architecture] = _PLAIN | {
    f"{name}_reg": replace(plain, n_register_tokens=4) for name, plain in _PLAIN.items()
}


def official_url(name: str) -> str:
    """Where Meta publishes the backbone of DINOv2 model `name`."""
    base = name.removesuffix("_reg")
    registers = "_reg4" if name.endswith("_reg") else ""
    return f"{_URL}/{base}/{base}{registers}_pretrain.pth"


def official_path(name: str, home: Path) -> Path:
    """Where the official weights of `name` are kept under `home`, as safetensors."""
    return home / "weights" / f"{Path(official_url(name)).stem}.safetensors"


def recognise(width: int, depth: int, *, has_registers: bool) -> str | None:
    """The model with these widths, or None."""
    for name, known in DINOV2.items():
        if (known.width, known.depth, known.n_register_tokens > 0) == (width, depth, has_registers):
            return name
    return None
