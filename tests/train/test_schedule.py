from __future__ import annotations

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.schedule import learning_rate


def _config(**settings: int) -> TrainConfig:
    values: dict[str, object] = {"student": "vit_s14", "data": "pack", "out": "run"}
    return config_from_mapping(values | settings)


def _released_rates(config: TrainConfig) -> list[float]:
    """Rates of the released loop: the scheduler is stepped with the index of the epoch just finished."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs,
        lr_min=config.min_lr,
        warmup_t=config.warmup_epochs,
        warmup_lr_init=config.warmup_lr,
    )
    rates = []
    for epoch in range(config.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


@pytest.mark.parametrize("batch_size", [256, 512, 1024])
@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(300, 5), (20, 0), (12, 3), (3, 5), (1, 0)])
def test_rates_equal_timms_scheduler_as_the_released_loop_steps_it(
    batch_size: int, epochs: int, warmup_epochs: int
) -> None:
    config = _config(batch_size=batch_size, epochs=epochs, warmup_epochs=warmup_epochs)

    rates = [learning_rate(config, epoch) for epoch in range(epochs)]

    assert rates == pytest.approx(_released_rates(config), rel=1e-12)


def test_rates_are_the_published_ones() -> None:
    config = _config(batch_size=1024)

    assert [learning_rate(config, epoch) for epoch in range(2)] == [1e-6, 1e-6]
    published = {2: 2.008e-4, 3: 4.006e-4, 4: 6.004e-4, 5: 8.002e-4, 6: 9.993e-4, 150: 5.10e-4, 299: 1.011e-5}
    for epoch, rate in published.items():
        assert learning_rate(config, epoch) == pytest.approx(rate, rel=1e-3)


def test_cooldown_epochs_come_after_the_schedule_at_its_floor() -> None:
    """As the released scheduler would go on, had the released loop let it."""
    config = _config(batch_size=1024, epochs=12, cooldown_epochs=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    scheduler = CosineLRScheduler(optimizer, t_initial=12, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    rates = []
    for epoch in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)

    assert [learning_rate(config, epoch) for epoch in range(15)] == pytest.approx(rates, rel=1e-12)
    assert rates[13:] == [1e-5, 1e-5]


def test_the_lag_can_be_left_out() -> None:
    config = _config(batch_size=1024, schedule_lag_epochs=0)

    assert learning_rate(config, 1) == pytest.approx(2.008e-4, rel=1e-3)


def test_the_rate_stays_at_its_floor_after_the_schedule() -> None:
    config = _config(epochs=10)

    assert learning_rate(config, 11) == learning_rate(config, 500) == config.min_lr
