"""Stopping at every operation that changes a disk: to die there, or to keep a copy of what a death would leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_CHANGES = ("replace", "rename", "link", "mkdir", "unlink", "rmdir")


@contextmanager
def watched(before: Callable[[], None], every_write: int = 1) -> Iterator[None]:
    """Call `before` ahead of every call of `os` that changes a disk, and in the middle of a write.

    Args:
        before: what it does itself is not watched.
        every_write: of as many writes one is watched.
    """
    is_watching, n_writes = True, 0

    def pause() -> None:
        nonlocal is_watching
        if is_watching:
            is_watching = False
            try:
                before()
            finally:
                is_watching = True

    def announced(change: Callable[..., Any]) -> Callable[..., Any]:  # any function of os
        def call(*args: Any, **kwargs: Any) -> Any:
            pause()
            return change(*args, **kwargs)

        return call

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal n_writes
        n_writes += 1
        if n_writes % every_write:
            return real_write(descriptor, data)
        half = len(data) // 2
        pause()
        done = real_write(descriptor, data[:half])
        if done == half:
            pause()
            done += real_write(descriptor, data[half:])
        return done

    def create(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            pause()
        return real_open(path, flags, *args, **kwargs)

    real_write, real_open = os.write, os.open
    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(os, name, announced(getattr(os, name)))
        patch.setattr(os, "write", write)
        patch.setattr(os, "open", create)
        yield


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child process that SIGKILL ends at its operation `number`, from 0; False when it got through."""
    child = os.fork()
    if child == 0:
        left = number

        def die() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        status = 1
        try:
            with watched(die):
                work()
            status = 0
        finally:
            os._exit(status)  # nothing of the tests may run in a copy
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0
    return False
