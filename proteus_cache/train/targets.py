"""Codes to targets, on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from proteus_cache.codecs import Codec


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

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """(b, code_bytes) uint8 to float32 (b, *shape) by target name."""
        return {
            name: codec.decode(codes[:, offset : offset + codec.code_bytes]) for name, offset, codec in self._places
        }
