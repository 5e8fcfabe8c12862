"""How many processes a command runs as on this machine, and starting them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer

from proteus_cache.cli import look, terminal


def count_of(device: str | None, asked: Any) -> int:
    """Processes to run: as asked for with --gpus, else one for each visible GPU, else one.

    Args:
        device: as given with --device.
        asked: as given with --gpus or in a config file, so of any type.

    Raises:
        UsageError: there are not that many GPUs, or `asked` is no number of them.
    """
    import torch

    from proteus_cache.devices import best_device
    from proteus_cache.errors import UsageError

    check_asked(asked)
    if device is not None:
        best_device(device)  # before weights are read or downloaded for one that does not exist
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return asked or 1
    visible = torch.cuda.device_count()
    if device not in (None, "cuda") or not visible:
        if asked not in (None, 1):
            raise UsageError(f"--gpus {asked} with --device {device}: {_why_one(device, visible)}")
        return 1
    if asked is not None and asked > visible:
        raise UsageError(f"--gpus {asked}: there are {visible} GPUs")
    return asked or visible


def check_asked(asked: Any) -> None:
    """Refuse what cannot be a number of processes.

    Raises:
        UsageError: `asked` is neither None nor a whole number of at least 1.
    """
    from proteus_cache.errors import UsageError

    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise UsageError(f"--gpus must be a whole number of at least 1, got {asked!r}")


def _why_one(device: str | None, visible: int) -> str:
    return "that is one GPU; leave one of the two out" if visible else "torch sees no GPU here; try --device cpu"


def start(count: int, target: Callable[..., None], *args: object, patience_s: float = 20.0) -> None:
    """Run `target(*args)` in `count` processes and wait for them; they are as quiet as this one.

    Args:
        count: how many.
        target: what each of them runs.
        args: its arguments.
        patience_s: how long they may take to end after Ctrl-C or SIGTERM. A second Ctrl-C ends them at once.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM ended them.
        typer.Exit: one of them failed; it has said why.
    """
    from proteus_cache.processes import start_ranks, usable_cores

    # OpenMP reads this while torch is loaded, so before a rank can set it. Without it every rank takes every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    status = start_ranks(count, _run_rank, look.is_quiet(), target, args, patience_s=patience_s)
    if status not in (0, 1, 2):
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        terminal.complain(f"one of {count} processes {how}, and the others were stopped; run the same command again")
    if status != 0:
        raise typer.Exit(2 if status == 2 else 1)


def _run_rank(is_quiet: bool, target: Callable[..., None], args: tuple[object, ...]) -> None:
    with look.quiet(is_quiet):
        target(*args)
