"""From views to the pixels that models are fed, the same for teacher and student."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_values(values: tuple[float, ...] | list[float], device: torch.device | str = "cpu") -> Tensor:
    """One number for each channel, as `normalise` takes them: (1, 3, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)


def normalise(views: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Views as a model takes them.

    Args:
        views: (B, H, W, 3) uint8, or of floating point: those are taken as normalised already (`views/render.py` gives
            such, because erasing with normal noise has no place in 0 to 255).
        mean: of the pixels in 0 to 1, from `channel_values`, on the views' device.
        std: likewise.

    Returns:
        (B, 3, H, W) of the type of `mean`: divided by 255, minus mean, over std. Rows of channels stay together in
        memory (`channels_last`).
    """
    pixels = views.permute(0, 3, 1, 2).to(mean.dtype)
    return pixels if views.is_floating_point() else pixels.div_(255).sub_(mean).div_(std)
