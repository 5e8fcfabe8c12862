"""Which device a process computes on, and what to say when its memory does not suffice."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch

from proteus_cache.choices import unknown
from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.plan.human import human_bytes

R = TypeVar("R")
Advise: TypeAlias = Callable[[int | None, str], str]


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
        raise UsageError(f"--device: {unknown('device', asked, ('cuda', 'cpu'), also='cuda:1')}") from error
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device: {unknown('device', asked, ('cuda', 'cpu'), also='cuda:1')}")
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


def gpu_name(asked: str | None) -> str | None:
    """What its driver calls the GPU that `best_device` would give; None for a CPU."""
    device = best_device(asked)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _own_index(visible: int) -> int:
    """This process's GPU by its number on the machine; 0 where a launcher shows each process only its own."""
    if visible == 1:
        return 0
    in_step = "SLURM_STEP_ID" in os.environ
    return int(os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if in_step else None) or 0)


def gpu_memory() -> str:
    """How much memory the current GPU has and has free, in words; what other processes hold is not free."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return "how much is free is not known"
    free, total = torch.cuda.mem_get_info()
    return f"{human_bytes(free)} of {human_bytes(total)} are free"


def or_explain(work: Callable[[], R], batch: int, attempt: Callable[[int], object], advise: Advise) -> R:
    """`work()`; where the GPU's memory does not suffice for it, the error says what would fit.

    That is found out on the spot: with the failed work let go of, half of the batch is tried, then a quarter, ...

    Args:
        work: uses a batch of `batch`.
        batch: how many.
        attempt: the same work with this many, its results thrown away.
        advise: the message, from how many fit (None for none), and how much memory there is, in words.

    Raises:
        ProteusCacheError: with that message.
    """
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = error.with_traceback(None)  # whose frames hold what the work has computed
    try:
        fits = _largest_that_fits(batch, attempt)
    except Exception as error:  # whatever it is: what is to be told is the first one
        failed.add_note(f"no smaller batch could be tried: {error}")
        fits = None
    raise ProteusCacheError(advise(fits, gpu_memory())) from failed


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that the GPU's memory did not suffice."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def _largest_that_fits(above: int, attempt: Callable[[int], object]) -> int | None:
    """The largest of `above` / 2, / 4, ... 1 that `attempt` has memory for."""
    n = above // 2
    while n >= 1:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # likewise
            torch.cuda.empty_cache()
        try:
            attempt(n)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            n //= 2
        else:
            return n
    return None
