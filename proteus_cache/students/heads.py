"""The heads between student and teacher width, thrown away after training.

Each is LayerNorm (PyTorch's eps 1e-5, unlike the backbone's 1e-6) and a Linear with bias, with PyTorch's own
initialisation; used even when the widths are equal.
"""

from __future__ import annotations

import torch
from torch import nn

HEAD_NAMES = ("token", "feature", "patch")


class Heads(nn.ModuleDict):
    """The heads that a run trains, by name: `token`, `feature`, `patch`, or some of them."""


def build_heads(names: tuple[str, ...], *, student_width: int, teacher_width: int, seed: int) -> Heads:
    """Freshly initialised heads.

    Args:
        names: which of `HEAD_NAMES`.
        student_width: D of the student's tokens.
        teacher_width: D of the targets.
        seed: fixes every value; each head has its own stream, so leaving one out changes no other.

    Source: BeSpontaneous/Proteus-pytorch models_proteus_dinov2, MetaArch.__init__.
    """
    heads = Heads()
    for name in HEAD_NAMES:
        if name not in names:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * len(HEAD_NAMES) + HEAD_NAMES.index(name) + 1)
            heads[name] = nn.Sequential(nn.LayerNorm(student_width), nn.Linear(student_width, teacher_width))
    return heads
