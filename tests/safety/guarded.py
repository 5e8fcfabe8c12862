"""Runs attacks in a forked child that is watched and kept short of memory and time, and says how each ended.

The child installs an audit hook, which cannot be taken off again: it notes and forbids every new process, socket,
pickled class, import, compiled code, and every file opened outside the folder of the attack. All that the code under
attack imports must therefore have been imported before: `warm_up` does the same things once with honest input.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CASE_CPU_S = 1.0
CASE_BYTES = 256 << 20
_CASE_WALL_S = 20
_FORBIDDEN = (
    *("os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "os.fork", "os.forkpty", "pty.spawn"),
    *("subprocess.Popen", "pickle.find_class", "marshal.load", "marshal.loads", "exec", "compile", "code.__new__"),
    *("ctypes.dlopen", "urllib.Request", "ftplib.connect", "webbrowser.open", "http.client.connect"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("shutil.copyfile", "shutil.move", "shutil.rmtree", "shutil.unpack_archive", "os.putenv", "os.unsetenv"),
)


@dataclass(frozen=True, slots=True)
class Attack:
    """One hostile input, tried in one way."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attack ended."""

    name: str
    error: str | None
    """Name of the exception's type; None when nothing was refused."""
    kinds: tuple[str, ...]
    """Names of the type and its bases."""
    message: str
    value: object
    """What came out, if it can be told in JSON."""
    cpu_s: float
    forbidden: tuple[str, ...]
    """What the audit hook stopped."""
    trace: str


class _Watch:
    """The audit hook."""

    def __init__(self, allowed: Path) -> None:
        self.seen: list[str] = []
        self.is_on = False
        self._allowed = os.path.realpath(allowed) + os.sep

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        told = None
        if event in _FORBIDDEN or event.startswith("socket."):
            told = f"{event} {arguments!r:.200}"
        elif event == "import":
            told = f"import {arguments[0]}"
        elif event == "open" and not self._is_inside(arguments[0]):
            told = f"open {arguments[0]!r} {arguments[1]!r}"
        if told is not None:
            self.seen.append(told)
            raise RuntimeError(f"forbidden while hostile input is read: {told}")

    def _is_inside(self, path: object) -> bool:
        if isinstance(path, int) or path is None:  # a descriptor that was opened before
            return True
        text = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else str(path)
        return (os.path.realpath(text) + os.sep).startswith(self._allowed)


def run_guarded(folder: Path, attacks: Iterable[Attack], warm_up: Callable[[], object]) -> list[Outcome]:
    """Run all attacks, one after the other, in one child that may open files in `folder` only.

    Raises:
        AssertionError: the child ended before the last attack; names the one that it was at.
    """
    attacks = list(attacks)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as answers:
                for outcome in _outcomes(folder, attacks, warm_up):
                    print(json.dumps(asdict(outcome)), file=answers, flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    os.close(writing)
    with os.fdopen(reading) as answers:
        found = [json.loads(line) for line in answers]
    _, status = os.waitpid(child, 0)
    at = attacks[len(found)].name if len(found) < len(attacks) else "the end"
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)} at: {at}"
    return [Outcome(**{**one, "kinds": tuple(one["kinds"]), "forbidden": tuple(one["forbidden"])}) for one in found]


def _outcomes(folder: Path, attacks: list[Attack], warm_up: Callable[[], object]) -> Iterator[Outcome]:
    warm_up()
    gc.collect()
    gc.freeze()  # collections go over what an attack makes, not over all that pytest and torch hold
    os.chdir(folder)
    watch = _Watch(folder)
    sys.addaudithook(watch)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + CASE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, _hangs)
    for attack in attacks:
        watch.seen.clear()
        error: BaseException | None = None
        value: object = None
        signal.alarm(_CASE_WALL_S)
        began = time.process_time()
        watch.is_on = True
        try:
            value = attack.run()
        except (Exception, _Hang) as raised:
            error = raised
        finally:
            watch.is_on = False
            signal.alarm(0)
        cpu_s = time.process_time() - began
        yield Outcome(
            name=attack.name,
            error=None if error is None else type(error).__name__,
            kinds=() if error is None else tuple(kind.__name__ for kind in type(error).__mro__),
            message="" if error is None else str(error)[:2000],
            value=value if isinstance(value, str | int | bool | list | dict) else None,
            cpu_s=cpu_s,
            forbidden=tuple(watch.seen),
            trace="" if error is None else "".join(traceback.format_exception(error)[-6:])[-3000:],
        )
        del error


class _Hang(BaseException):
    """An attack that does not end."""


def _hangs(number: int, frame: object) -> None:
    raise _Hang(f"did not end in {_CASE_WALL_S} s")


def problems(outcomes: Iterable[Outcome], *, may_pass: Callable[[Outcome], bool] = lambda _: False) -> list[str]:
    """What is wrong with the outcomes of attacks: each must end with one typed error, soon, and without a side effect.

    Args:
        outcomes: of the attacks.
        may_pass: whether an attack that was not refused did no harm.
    """
    wrong = []
    for one in outcomes:
        if one.forbidden:
            wrong.append(f"{one.name}: did {one.forbidden}")
        if one.cpu_s > CASE_CPU_S:
            wrong.append(f"{one.name}: took {one.cpu_s:.1f} s")
        if one.error is None:
            if not may_pass(one):
                wrong.append(f"{one.name}: was not refused, gave {one.value!r:.100}")
        elif "ProteusCacheError" not in one.kinds:
            wrong.append(f"{one.name}: {one.error}: {one.message[:200]}\n{one.trace}")
        elif not {"DamageError", "UsageError", "StorageError"} & set(one.kinds):
            wrong.append(f"{one.name}: an error of an unexpected kind, {one.error}")
        elif not all(char.isprintable() for char in one.message):
            wrong.append(f"{one.name}: its message holds control characters: {one.message!r}")
    return wrong


def check(outcomes: Iterable[Outcome], *, may_pass: Callable[[Outcome], bool] = lambda _: False) -> None:
    """Fail with everything that `problems` finds."""
    wrong = problems(outcomes, may_pass=may_pass)
    assert not wrong, f"{len(wrong)} attacks did not end as they should:\n" + "\n".join(wrong[:40])
