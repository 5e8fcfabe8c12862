"""How many bits for which component: the Gaussian bound, and integers near it.

For a Gaussian vector with variances lambda_i the least rate at mean squared error D is reached when every component
has error min(lambda_i, theta) and max(0, log2(lambda_i / theta) / 2) bits, with theta such that the errors add up to
D (reverse water-filling; Cover and Thomas, Elements of Information Theory, section 10.3.3). Of all sources with these
variances the Gaussian is the hardest, so another one may lie below the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 8
UNBIASED_ERROR = (1.0, 0.5708, 0.1331, 0.03578, 9.592e-3, 2.511e-3, 6.45e-4, 1.635e-4, 4.12e-5)
"""Mean squared error over variance of a unit Gaussian at 0 to 8 bits, Lloyd-Max levels rescaled to slope 1."""
_HALVINGS = 60


def gaussian_rate(variances: Tensor, distortion: float) -> float:
    """The least rate of Gaussian components at a distortion.

    Args:
        variances: of the components, any shape.
        distortion: mean squared error over all components, same unit.

    Returns:
        Bits a component, on average over all of them.
    """
    spread = variances.double().clamp_min(0).reshape(-1)
    if distortion <= 0:
        return float("inf")
    low, high = 0.0, float(spread.max())
    for _ in range(_HALVINGS):
        level = (low + high) / 2
        if float(spread.clamp_max(level).mean()) > distortion:
            high = level
        else:
            low = level
    if low == 0:
        return 0.0 if float(spread.mean()) <= distortion else float("inf")
    return float((spread / low).clamp_min(1).log2().mean() / 2)


def allocate(variances: Tensor, price: float) -> Tensor:
    """Integer bits that minimise error plus `price` times bits.

    A component either has at least one bit at every frequency or none at any: a component that lacked some would be
    taught smoothed where a loss cannot look at frequencies. So what is left out is the same for every loss.

    Args:
        variances: (K, F) of component k at frequency f; F is 1 without a transform over the patch grid.
        price: of one bit, in the unit of the variances.

    Returns:
        (K, F) int64, 0 to 8.
    """
    errors = torch.tensor(UNBIASED_ERROR[1:], dtype=torch.float64, device=variances.device)
    bits = torch.arange(1, MAX_BITS + 1, dtype=torch.float64, device=variances.device)
    cost, best = (variances.double().unsqueeze(-1) * errors + price * bits).min(dim=-1)
    is_kept = cost.sum(dim=1, keepdim=True) < variances.double().sum(dim=1, keepdim=True)
    return (best + 1) * is_kept


def price_for_rate(variances: Tensor, bits: float) -> float:
    """The lowest price at which `allocate` spends at most so many bits a component on average."""
    high = float(variances.max()) + 1e-300
    low = high * 1e-16
    for _ in range(_HALVINGS):
        price = (low * high) ** 0.5
        if float(allocate(variances, price).double().mean()) > bits:
            low = price
        else:
            high = price
    return high


def price_for_error(variances: Tensor, error: float) -> float:
    """The highest price at which the error that `allocate` is expected to leave is at most `error` on average."""
    table = torch.tensor(UNBIASED_ERROR, dtype=torch.float64, device=variances.device)
    high = float(variances.max()) + 1e-300
    low = high * 1e-16
    for _ in range(_HALVINGS):
        price = (low * high) ** 0.5
        left = float((variances.double() * table[allocate(variances, price)]).mean())
        if left > error:
            high = price
        else:
            low = price
    return low
