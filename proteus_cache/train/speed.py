"""How long training steps take, several ways in one run: each has its turn in every round, so that a machine that is
busy with something else slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from proteus_cache.train.feed import DeviceBatch
from proteus_cache.train.steps import StepContext, take_step
from proteus_cache.train.targets import Target


def timed_steps(
    run: StepContext,
    batches: Iterator[DeviceBatch],
    targets_of: Callable[[DeviceBatch], Mapping[str, Target]],
    n_steps: int,
) -> float:
    """Seconds of so many steps, waiting for batches included.

    Args:
        run: its state changes.
        batches: at least so many.
        targets_of: what the teacher says of a part of a batch.
        n_steps: at least 1.
    """
    began = time.perf_counter()
    for _ in range(n_steps):
        losses = take_step(run, next(batches), targets_of)
    losses.tolist()  # waits for a GPU
    return time.perf_counter() - began


def take_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each in turn, round by round.

    Args:
        turns: each returns its seconds.
        rounds: that count; one more before them warms up.

    Returns:
        Seconds of every round that counts, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            taken = turn()
            if number > 0:
                seconds[name].append(taken)
    return seconds
