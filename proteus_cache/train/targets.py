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
        self._places = {
            target.name: slice(target.offset, target.offset + target.codec.code_bytes) for target in targets
        }
        self._codecs = nn.ModuleDict({_module_name(target.name): target.codec for target in targets})
        self.requires_grad_(False)

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """(b, code_bytes) uint8 to float32 (b, *shape) by target name."""
        return {
            name: self._codecs[_module_name(name)](codes[:, place]) for name, place in self._places.items()
        }


def _module_name(target: str) -> str:
    """Names of modules hold no dot."""
    return target.replace(".", "_")
