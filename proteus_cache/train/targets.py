"""Codes to targets, on the device that trains.

Most codecs give whole tokens back. One with a basis says nothing of some directions of them; its targets stay in that
basis, and the losses look along its directions only (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from proteus_cache.codecs import Codec
from proteus_cache.losses import Components


class ComponentTarget(NamedTuple):
    """Tokens in the basis of their codec; a tuple, so that it passes through data-parallel and compiled modules."""

    tokens: Components
    mean_D: Tensor
    """The token whose components are 0."""
    vectors_DK: Tensor
    """Orthonormal columns: the directions of the components."""


Target = Tensor | ComponentTarget
"""What the teacher says of some views: (b, *shape) float32, or its components."""


@dataclass(frozen=True, slots=True)
class CodedTarget:
    """Where one target lies within a view's codes."""

    name: str
    offset: int
    codec: Codec


class TargetDecoder(nn.Module):
    """Decodes some of the targets that lie back to back in a view's codes.

    Args:
        targets: those to decode; others are passed over.
    """

    def __init__(self, targets: tuple[CodedTarget, ...]) -> None:
        super().__init__()
        self._places = tuple((target.name, target.offset, target.codec) for target in targets)
        self._codecs = nn.ModuleList(target.codec for target in targets)  # moved to a device with this module
        self.requires_grad_(False)

    def forward(self, codes: Tensor) -> dict[str, Target]:
        """(b, code_bytes) uint8 to targets by name, in float32 whatever precision the student computes in."""
        with torch.autocast(codes.device.type, enabled=False):
            return {
                name: _decode(codec, codes[:, offset : offset + codec.code_bytes])
                for name, offset, codec in self._places
            }


def _decode(codec: Codec, codes: Tensor) -> Target:
    basis = codec.basis
    if basis is None:
        return codec.decode(codes)
    lead, rest = codec.components(codes)
    return ComponentTarget(Components(lead, rest), basis.mean, basis.vectors)
