"""Tokens with the structure of a teacher's: few directions, smooth over the patches, some images stronger."""

import numpy as np
import torch
from torch import Tensor


def smooth_tokens(seed: int, n_views: int, side: int = 6, width: int = 32, n_lead: int = 0) -> Tensor:
    """(n_views, n_lead + side * side, width) float32; the mixing is the same for every seed."""
    fixed = np.random.default_rng(5)
    mixing = np.linalg.qr(fixed.standard_normal((width, width)))[0] * 3 / np.arange(1, width + 1) ** 1.0
    mean = fixed.normal(0, 2, width)
    rng = np.random.default_rng(seed)
    frequency = np.arange(side)
    fall = 1 / (1 + frequency[:, None] + frequency[None, :]) ** 1.0
    basis = np.cos(np.pi * (2 * frequency + 1) * frequency[:, None] / (2 * side))
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    spectrum = rng.standard_normal((n_views, width, side, side)) * fall
    fields = np.einsum("nkuv,ui,vj->nijk", spectrum, basis, basis) * side / np.linalg.norm(fall)
    strength = np.exp(0.15 * rng.standard_normal((n_views, 1, 1)))
    patches = fields.reshape(n_views, side * side, width) * strength @ mixing.T + mean
    lead = rng.standard_normal((n_views, n_lead, width)) * 5 - 1
    return torch.from_numpy(np.concatenate([lead, patches], axis=1)).float()


def white_tokens(seed: int, n_views: int, n_tokens: int, width: int) -> Tensor:
    """(n_views, n_tokens, width) float32 without any structure."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n_views, n_tokens, width))).float()


def snr_db(tokens: Tensor, decoded: Tensor) -> float:
    """About the mean of every channel."""
    centred = tokens - tokens.mean(dim=(0, 1))
    error = (decoded - tokens).double().square().sum() / centred.double().square().sum()
    return float(-10 * torch.log10(error))


def slopes(tokens: Tensor, decoded: Tensor) -> Tensor:
    """Of decoded on original, by channel, both about their given zero."""
    first, second = tokens.flatten(0, -2).double(), decoded.flatten(0, -2).double()
    return (first * second).sum(dim=0) / first.square().sum(dim=0)
