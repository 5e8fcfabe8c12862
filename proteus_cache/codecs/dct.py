"""The orthonormal two-dimensional DCT over a square grid of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(side: int) -> Tensor:
    """(side, side) float32, orthonormal DCT-II: row k holds the cosine of frequency k.

    Source: N. Ahmed, T. Natarajan, K. R. Rao, Discrete Cosine Transform, 1974.
    """
    place = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * place + 1) * place.unsqueeze(1) / (2 * side)) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def to_frequencies(planes: Tensor, matrix: Tensor) -> Tensor:
    """(B, K, N) values over the grid, row by row, to (B, K, N) coefficients, frequency (u, v) at u * side + v."""
    return _separable(planes, matrix)


def to_places(planes: Tensor, matrix: Tensor) -> Tensor:
    """The inverse of `to_frequencies`."""
    return _separable(planes, matrix.T)


def _separable(planes: Tensor, matrix: Tensor) -> Tensor:
    side = matrix.shape[0]
    grid = planes.reshape(-1, side, side)
    along_rows = (grid.reshape(-1, side) @ matrix.T).reshape(grid.shape)
    return torch.matmul(matrix, along_rows).reshape(planes.shape)


def bands(side: int) -> Tensor:
    """(side * side,) int64: the larger of a coefficient's two frequencies."""
    place = torch.arange(side)
    return torch.maximum(place.unsqueeze(1), place).reshape(-1)
