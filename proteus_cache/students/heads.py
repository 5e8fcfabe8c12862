"""The heads between student and teacher width, thrown away after training.

Each is LayerNorm (PyTorch's eps 1e-5, unlike the backbone's 1e-6) and a Linear with bias, with PyTorch's own
initialisation; used even when the widths are equal. A block target of the optional block loss has a head of its own.
"""

from __future__ import annotations

import hashlib
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_NAMES = ("token", "feature", "patch")
"""Those of Proteus, in its order."""
NORM_EPS = 1e-5


class Heads(nn.ModuleDict):
    """The heads that a run trains, by name: `token`, `feature`, `patch`, or some of them, and those of blocks."""


def block_head(target: str) -> str:
    """Name of a block target's head: `block_9_raw` for `block.9.raw`, since modules have no dots in their names."""
    return target.replace(".", "_")


def build_heads(
    names: tuple[str, ...], *, student_width: int, teacher_width: int, seed: int, norm_eps: float = NORM_EPS
) -> Heads:
    """Freshly initialised heads.

    Args:
        names: which of `HEAD_NAMES`, and names that `block_head` gave.
        student_width: D of the student's tokens.
        teacher_width: D of the targets.
        seed: fixes every value; each head has its own stream, so leaving one out changes no other.
        norm_eps: of their LayerNorm.

    Source: BeSpontaneous/Proteus-pytorch models_proteus_dinov2, MetaArch.__init__.
    """
    heads = Heads()
    own = tuple(name for name in HEAD_NAMES if name in names)
    for name in own + tuple(name for name in names if name not in HEAD_NAMES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(name, seed))
            norm = nn.LayerNorm(student_width, eps=norm_eps)
            heads[name] = nn.Sequential(norm, nn.Linear(student_width, teacher_width))
    return heads


def predict_components(head: nn.Module, tokens_BNd: Tensor, mean_D: Tensor, vectors_DK: Tensor) -> Tensor:
    """What a head says of tokens, along some directions only.

    The directions are folded into the linear layer, in the precision of its weights, whatever autocast says: W' = Vᵀ W
    and b' = Vᵀ (b - mean). So no (B, N, D) output is computed, and no second product with the tokens.

    Args:
        head: that `build_heads` made.
        tokens_BNd: of the student.
        mean_D: subtracted from what the head says.
        vectors_DK: orthonormal columns V.

    Returns:
        (B, N, K): Vᵀ (head(token) - mean).
    """
    norm, linear = cast(tuple[nn.LayerNorm, nn.Linear], tuple(cast(nn.Sequential, head)))
    with torch.autocast(tokens_BNd.device.type, enabled=False):
        turn = vectors_DK.to(linear.weight.dtype).T
        weight, bias = turn @ linear.weight, turn @ (linear.bias - mean_D)
    return F.linear(norm(tokens_BNd), weight, bias)


def keep_components(head: dict[str, Tensor], mean_D: Tensor, vectors_DK: Tensor) -> dict[str, Tensor]:
    """The same head along given directions, and one that says the mean along all others.

    Args:
        head: its state: `0.weight`, `0.bias` of the norm and `1.weight`, `1.bias` of the linear layer.
        mean_D: of the teacher's tokens.
        vectors_DK: orthonormal columns.
    """
    vectors, mean = (tensor.to(head["1.weight"].device).double() for tensor in (vectors_DK, mean_D))
    weight, bias = head["1.weight"].double(), head["1.bias"].double()
    kept = {
        "1.weight": vectors @ (vectors.T @ weight),
        "1.bias": mean + vectors @ (vectors.T @ (bias - mean)),
    }
    return head | {name: tensor.to(head[name].dtype) for name, tensor in kept.items()}


def _seed_of(name: str, seed: int) -> int:
    if name in HEAD_NAMES:
        return seed * len(HEAD_NAMES) + HEAD_NAMES.index(name) + 1
    return int.from_bytes(hashlib.blake2b(f"head {name} {seed}".encode(), digest_size=7).digest(), "little")
