"""Random weights by DINOv2's official initialisation, the same bits on every machine.

Linear weights, position embeddings and tokens are normal, biases zero, norms one and zero, LayerScale 1.0,
the patch convolution uniform as PyTorch draws it. Each tensor has its own stream, keyed by seed and name, so
neither the number of threads nor the order of tensors matters. Normal numbers are quantiles looked up with 16
random bits: integers and one table, where a library's normal sampler may differ from CPU to CPU.

Source: facebookresearch/dinov2 at b8931f7b, `DinoVisionTransformer.init_weights` and `init_weights_vit_timm`.
Its truncation at 100 standard deviations never acts; our table ends at 4.3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from proteus_cache.errors import UsageError

NO_LICENCE = "none (random weights)"

_Draw: TypeAlias = Callable[[tuple[int, ...], np.random.Philox], NDArray[np.float32]]
_CHUNK = 1 << 20


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw every parameter of `model` anew.

    Args:
        model: a timm ViT; only names, shapes and module types are read, so it may be on the meta device.
        seed: any non-negative integer below 2**64.

    Returns:
        Parameter name -> float32 CPU tensor.

    Raises:
        UsageError: the model has a parameter that the initialisation does not know.
    """
    rules = _rules(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    unknown = sorted(shapes.keys() - rules.keys())
    if unknown:
        raise UsageError(f"random weights are not defined for parameter {unknown[0]}; pass --weights FILE")

    def draw(name: str) -> Tensor:
        key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16, person=b"teacher-init").digest()
        bits = np.random.Philox(key=int.from_bytes(key, "little"))
        return torch.from_numpy(rules[name](shapes[name], bits))

    with ThreadPoolExecutor() as threads:
        return dict(zip(shapes, threads.map(draw, shapes), strict=True))


def _rules(model: nn.Module) -> dict[str, _Draw]:
    rules: dict[str, _Draw] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, _ in module.named_parameters(recurse=False):
            rule = _rule(module, name)
            if rule is not None:
                rules[prefix + name] = rule
    return rules


def _rule(module: nn.Module, name: str) -> _Draw | None:
    if isinstance(module, nn.Linear) and name == "weight":
        return _normal(0.02)
    if isinstance(module, nn.Conv2d):
        return _uniform(1 / math.sqrt(math.prod(module.weight.shape[1:])))
    if name == "bias" or name.endswith("_bias"):
        return _constant(0.0)
    if name == "weight" and hasattr(module, "normalized_shape"):
        return _constant(1.0)
    if isinstance(module, LayerScale) or name in ("gamma_1", "gamma_2"):
        return _constant(1.0)
    if name in ("cls_token", "reg_token", "dist_token"):
        return _normal(1e-6)
    return _normal(0.02) if name == "pos_embed" else None


def _constant(value: float) -> _Draw:
    return lambda shape, bits: np.full(shape, value, np.float32)


def _uniform(bound: float) -> _Draw:
    def draw(shape: tuple[int, ...], bits: np.random.Philox) -> NDArray[np.float32]:
        integers = bits.random_raw(math.prod(shape)) >> np.uint64(40)
        unit = (integers.astype(np.float64) + 0.5) / 2**24
        return ((2 * unit - 1) * bound).astype(np.float32).reshape(shape)

    return draw


def _normal(std: float) -> _Draw:
    def draw(shape: tuple[int, ...], bits: np.random.Philox) -> NDArray[np.float32]:
        table = (_normal_quantiles() * std).astype(np.float32)
        out = np.empty(math.prod(shape), np.float32)
        for start in range(0, out.size, _CHUNK):
            part = out[start : start + _CHUNK]
            raw: NDArray[np.uint64] = bits.random_raw(-(-part.size // 4))
            np.take(table, raw.astype("<u8", copy=False).view("<u2")[: part.size], out=part, mode="clip")
        return out.reshape(shape)

    return draw


@cache
def _normal_quantiles() -> NDArray[np.float64]:
    """Quantiles of the standard normal at the middles of 65,536 equal steps; standard deviation 0.99999."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((step + 0.5) / 65536) for step in range(65536)])
