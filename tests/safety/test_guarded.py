"""The watch over the attacks sees what it must see: otherwise no attack could ever fail."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import time
from pathlib import Path

import pytest

from proteus_cache.errors import FormatError
from tests.safety.guarded import CASE_CPU_S, Attack, problems, run_guarded


def _refuse() -> None:
    raise FormatError("refused")


def _write_outside() -> None:
    Path(f"/tmp/outside-of-every-folder-{os.getpid()}").write_text("x")


def _burn_time() -> None:
    end = time.process_time() + 1.5 * CASE_CPU_S
    while time.process_time() < end:
        sum(range(10_000))


def _read_outside() -> None:
    Path("/etc/hostname").read_bytes()


def _swallow() -> None:
    try:
        os.system("true")
    except RuntimeError:
        _refuse()


_HARM = {
    "a process": lambda: subprocess.run(["true"], check=True),
    "a shell, whose prohibition is swallowed": _swallow,
    "a socket": lambda: socket.create_connection(("127.0.0.1", 9), timeout=0.1),
    "a pickled class": lambda: pickle.loads(b"cposix\nsystem\n."),
    "an import": lambda: __import__("antigravity"),
    "compiled code": lambda: eval("1 + 1"),
    "a file written elsewhere": _write_outside,
    "a file read elsewhere": _read_outside,
    "memory": lambda: bytearray(300 << 20),
    "time": _burn_time,
    "an error of Python's own": lambda: dict[str, int]()["x"],
    "no error": lambda: None,
    "a message with escape codes": lambda: (_ for _ in ()).throw(RuntimeError("\x1b[2J")),
}


def test_every_kind_of_harm_is_seen(tmp_path: Path) -> None:
    attacks = [Attack(name, run) for name, run in _HARM.items()]

    found = problems(run_guarded(tmp_path, attacks, lambda: None))

    unseen = [name for name in _HARM if not any(problem.startswith(f"{name}:") for problem in found)]
    assert unseen == []


def test_a_typed_refusal_is_fine_and_files_of_the_attack_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")

    def attack() -> None:
        (tmp_path / "x").read_bytes()
        _refuse()

    assert problems(run_guarded(tmp_path, [Attack("x", attack)], lambda: None)) == []


def test_a_child_that_is_gone_is_told_with_the_attack_it_was_at(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="at: second"):
        run_guarded(tmp_path, [Attack("first", _refuse), Attack("second", lambda: os._exit(9))], lambda: None)
