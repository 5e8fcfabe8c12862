"""How much faster a step is when the teacher's targets are read instead of computed.

Both arms train the same student on the same batches of one pack, and take turns within one run. The live arm is
spared what a live teacher really needs besides its forward: fresh views, decoded and augmented anew.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from proteus_cache.pack.loader import open_loader
from proteus_cache.pack.reader import open_pack
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.devices import make_accelerator, resolve_device, resolve_precision
from proteus_cache.train.feed import DeviceBatch, DeviceFeed
from proteus_cache.train.loop import n_readers, prepare_run
from proteus_cache.train.source import n_patches
from proteus_cache.train.speed import take_turns, timed_steps
from proteus_cache.train.stored import StoredData

ROUNDS: Final = 9
"""Turns of each arm that count; one more of each warms up."""
STEPS_A_TURN: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """Medians over the rounds."""

    cached_views_per_s: float
    live_views_per_s: float
    ratio: float
    """Cached over live, taken round by round."""
    lowest_ratio: float
    highest_ratio: float


def compare_steps(config: TrainConfig, teacher: Teacher) -> StepSpeed:
    """Time training steps with stored targets against steps with the teacher in them.

    Args:
        config: student, pack, batch and device; nothing is written.
        teacher: the one that made the pack; it is moved to the device.
    """
    pack = open_pack(config.pack_path)
    device = resolve_device(config)
    precision = resolve_precision(config, device)
    accelerator = make_accelerator(device, precision)
    data = StoredData(config, pack)
    order = data.order
    n_steps = 2 * (ROUNDS + 1) * STEPS_A_TURN
    run = prepare_run(replace(config, epochs=1 + n_steps // order.steps_per_epoch), data, accelerator, precision)
    teacher.to(accelerator.device, precision)

    def live(part: DeviceBatch) -> dict[str, Tensor]:
        return teacher.targets(part.views, config.targets)

    try:
        with open_loader(pack, order, first_step=0, last_step=n_steps, n_workers=n_readers(config, 1)) as loader:
            feed = iter(DeviceFeed(loader, run.config, n_patches(pack), accelerator.device))
            seconds = take_turns(
                {
                    "cached": lambda: timed_steps(run, feed, data.targets_of, STEPS_A_TURN),
                    "live": lambda: timed_steps(run, feed, live, STEPS_A_TURN),
                },
                ROUNDS,
            )
    finally:
        accelerator.end_training()
    cached_s, live_s = seconds["cached"], seconds["live"]
    ratios = [live_turn / cached_turn for cached_turn, live_turn in zip(cached_s, live_s, strict=True)]
    n_views = STEPS_A_TURN * config.global_batch
    return StepSpeed(
        cached_views_per_s=n_views / statistics.median(cached_s),
        live_views_per_s=n_views / statistics.median(live_s),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
    )
