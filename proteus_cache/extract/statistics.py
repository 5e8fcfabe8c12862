"""Sums over one unit's targets, on the device: their moments, and signs of a device that gives constants."""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_cache.cache.receipt import Moments


class UnitStatistics:
    """Sums of one target over one unit, kept on the device until the unit ends."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._on_host = torch.zeros(6, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._count = 0
        self._first: Tensor | None = None

    def add(self, tokens: Tensor, widened: Tensor, is_plain: Tensor) -> None:
        """
        Args:
            tokens: (B, *shape) before the codec.
            widened: (B,) steps of their codes that an overflow widened.
            is_plain: (B,) bool: views of a single colour.
        """
        self._sums[3] += widened.sum()
        heads = tokens[:, 0] if tokens.ndim == 3 else tokens
        if self._first is None:
            self._first = heads[0].clone()
        self._sums[4] += (heads != self._first).any()
        if tokens.ndim == 3 and tokens.shape[1] > 1:
            is_constant = (tokens == tokens[:, :1]).flatten(1).all(dim=1)
            self._sums[5] += (is_constant & ~is_plain).sum()
        flat = tokens.reshape(-1)
        self._sums[0] += flat.sum()
        self._sums[1] += torch.dot(flat, flat)
        self._sums[2] = torch.maximum(self._sums[2], flat.abs().amax())
        self._count += flat.numel()

    def fetch(self) -> None:
        """Start the copy to the host, behind all that was added."""
        self._on_host.copy_(self._sums, non_blocking=True)

    def moments(self) -> Moments:
        """What was fetched; only after the copy is known to be done. Waits for nothing that was queued later."""
        total, squares, absmax = self._on_host[:3].tolist()
        count = max(self._count, 1)
        return Moments(mean=total / count, mean_square=squares / count, absmax=absmax)

    def n_widened(self) -> int:
        """Steps of codes that an overflow widened; only after the copy, likewise."""
        return int(self._on_host[3])

    def all_views_are_equal(self) -> bool:
        """Whether the first token of no view differs from the first view's; only after the copy, likewise."""
        return int(self._on_host[4]) == 0

    def n_constant(self) -> int:
        """Views of more than one colour with the same numbers in every token; only after the copy, likewise."""
        return int(self._on_host[5])
