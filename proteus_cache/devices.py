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
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", index)
    return device
