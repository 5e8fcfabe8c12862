"""What to say when the GPU has too little memory for a step: the `accumulate` with which it would fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proteus_cache.devices import Advise
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.feed import DeviceBatch, cut
from proteus_cache.train.state import TrainingState


def dry_step(
    state: TrainingState,
    batch: DeviceBatch,
    n_views: int,
    losses_of: Callable[[DeviceBatch], Tensor],
) -> None:
    """Compute gradients for `n_views` of a batch and throw them away: takes the memory of a step, and changes nothing.

    No process waits for another one here: gradients are asked for by name, so that nothing is reduced.

    Args:
        state: whose parameters get gradients.
        batch: this process's share of a global batch, on the device.
        n_views: of them.
        losses_of: (5,) losses of a part of the batch.
    """
    parameters = [parameter for parameter in state.bare.parameters() if parameter.requires_grad]
    moments = [] if state.adamw.state else [torch.empty_like(p) for p in parameters for _ in range(2)]  # still to come
    part = next(cut(batch, -(-len(batch.views) // n_views)))
    torch.autograd.grad(losses_of(part)[0], parameters, allow_unused=True)
    del moments


def smaller_parts(config: TrainConfig, n_views: int) -> Advise:
    """Names the `accumulate` that fits.

    Args:
        config: of the run.
        n_views: of a batch that this process computes.
    """
    at_once = -(-n_views // config.accumulate)

    def advise(fits: int | None, memory: str) -> str:
        what = f"the GPU has too little memory for {at_once:,} views at once, of a batch of {config.global_batch:,}"
        if fits is None:
            return (
                f"{what} ({memory}), and for a single one; end what else uses it (nvidia-smi names it), or take "
                "another GPU or a smaller --student"
            )
        parts = -(-n_views // fits)
        smaller = config.global_batch * config.accumulate // parts
        return (
            f"{what} ({memory}); {fits:,} fit: set `accumulate: {parts}` in a YAML file given with --config (same "
            f"results) and add --resume, or use more GPUs; --batch-size {smaller} would fit too, but is another recipe"
        )

    return advise
