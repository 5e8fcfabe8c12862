"""`--compile`: the module of a run through torch.compile, or a clear word why not."""

from __future__ import annotations

import shutil
from typing import cast

import torch
from torch import nn

from proteus_cache.errors import UsageError
from proteus_cache.train.model import Distillation


def compiled(bare: Distillation) -> nn.Module:
    """A callable that computes what `bare` does, on the same parameters; `bare` stays as it is, names and all.

    A step has one shape (what does not fill a batch is dropped), so shapes are compiled in; `accumulate` parts that
    differ in size make one more version each.

    Raises:
        UsageError: there is no C++ compiler.
    """
    compilers = cxx_compilers()
    if not any(map(shutil.which, compilers)):
        raise UsageError(
            f"--compile: torch needs a C++ compiler for it, and {' or '.join(compilers)} is not on the PATH; install "
            "it, set CXX to another, or leave --compile out"
        )
    return cast(nn.Module, torch.compile(bare, dynamic=False))


def cxx_compilers() -> list[str]:
    """C++ compilers that torch would use, by name or path."""
    from torch._inductor import config

    return [name for name in config.cpp.cxx if name]
