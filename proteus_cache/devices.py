"""Which device a process computes on."""

from __future__ import annotations

import os

import torch

from proteus_cache.errors import UsageError


def best_device(asked: str | None) -> torch.device:
    """The device asked for, else this process's GPU, else the CPU.

    Raises:
        UsageError: there is no such device.
    """
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UsageError(f"--device {asked!r} is not a device; try cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device {asked!r}: only cuda and cpu are supported")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {asked}: torch {torch.__version__} sees no GPU here; try --device cpu")
        visible = torch.cuda.device_count()
        index = device.index if device.index is not None else _own_index(visible)
        if index >= visible:
            raise UsageError(f"--device cuda:{index}: there are {visible} GPUs")
        device = torch.device("cuda", index)
    return device


def use_device(asked: str | None) -> torch.device:
    """`best_device`, made the current one: page-locked memory and helper threads belong to the current GPU.

    Raises:
        UsageError: as `best_device`.
    """
    device = best_device(asked)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _own_index(visible: int) -> int:
    """This process's GPU by its number on the machine; 0 where a launcher shows each process only its own."""
    if visible == 1:
        return 0
    in_step = "SLURM_STEP_ID" in os.environ
    return int(os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if in_step else None) or 0)
