"""The learning rate of every epoch, in closed form: linear warm-up, then half a cosine to a floor.

One rate for a whole epoch, as released. The released loop steps its scheduler with the index of the epoch
just finished, so everything lags one epoch and the first two both run at the warm-up rate
(`schedule_lag_epochs`).
"""

from __future__ import annotations

import math

from proteus_cache.train.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The rate that every step of `epoch` (0-based) uses.

    Source: timm CosineLRScheduler without warm-up prefix, as called by Proteus-pytorch main.py.
    """
    time = max(epoch - config.schedule_lag_epochs, 0)
    peak = config.peak_lr
    if time < config.warmup_epochs:
        return config.warmup_lr + time * (peak - config.warmup_lr) / config.warmup_epochs
    if time >= config.epochs:
        return config.min_lr
    return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * time / config.epochs))
