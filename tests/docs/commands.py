"""Commands for shell blocks of the documentation, without paying for the import of torch each time.

`CommandServer` imports everything once and forks for every command; `proteus-cache` and `python` on the PATH that it
gives are small scripts that hand their arguments, folder, environment and standard streams to it. The shell, the
arguments, the exit codes and the output are the real ones.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_LENGTH = struct.Struct("<I")
_POLL_S = 1.0
_PRELOADED = (
    "accelerate",
    "timm",
    "torch.utils.tensorboard",
    "torchvision",
    "webdataset",
    "proteus_cache.cli.app",
    "proteus_cache.demo.run",
    "proteus_cache.evaluate.evaluate",
    "proteus_cache.extract.planning",
    "proteus_cache.pack.build",
    "proteus_cache.train.loop",
)
PROGRAMS: Final = ("proteus-cache", "python")


class CommandServer:
    """A process that runs commands; use it in a `with` statement.

    Args:
        folder: for the socket and the scripts; must have a short path.
        constants: dotted name of a module's constant to another value for it, as JSON can hold it.
    """

    def __init__(self, folder: Path, constants: Mapping[str, object]) -> None:
        self._constants = constants
        self.programs = folder / "bin"
        """To be put on the PATH."""
        self._socket = folder / "socket"
        self.programs.mkdir(parents=True)
        for name in PROGRAMS:
            script = self.programs / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{self._socket}" {name} "$@"\n')
            script.chmod(0o755)

    def __enter__(self) -> CommandServer:
        root = Path(__file__).parents[2]
        code = f"import sys; sys.path.insert(0, {str(root)!r}); "
        code += "from tests.docs import commands; commands.serve(*sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(self._socket), json.dumps(self._constants)],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the command server did not start; see above"
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # a command that hangs, too
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve(path: str, constants: str) -> None:
    """Run commands until the process that started this one is gone."""
    import importlib

    import torch

    torch.set_num_threads(1)
    for module in _PRELOADED:
        importlib.import_module(module)
    for name, value in json.loads(constants).items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(importlib.import_module(module), constant, value)
    started_by = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children answer for themselves and need not be waited for
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.settimeout(_POLL_S)
    print("ready", flush=True)  # noqa: T201  # the parent waits for it
    while os.getppid() == started_by:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            connection.setblocking(True)
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Be the command that was asked for; never returns."""
    status = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, streams = _receive(connection)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        status = _run(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([status % 256]))
        os._exit(0)


def _run(arguments: list[str]) -> int:
    import traceback

    try:
        _start(arguments)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(f"{leaving.code}\n")
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _start(arguments: list[str]) -> None:
    import runpy

    program, *rest = arguments
    if program == "proteus-cache":
        from proteus_cache.cli import main

        sys.argv = [program, *rest]
        main()
    elif rest[0] == "-c":
        sys.argv = ["-c", *rest[2:]]
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = rest
        sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
        runpy.run_path(rest[0], run_name="__main__")


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request, and the three standard streams of the caller."""
    head, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    data = b""
    while len(data) < _LENGTH.unpack(head)[0]:
        data += connection.recv(1 << 16)
    return dict(json.loads(data)), list(streams)


def _ask(path: str, arguments: list[str]) -> int:
    """Have the server run a command with this process's streams; its exit status."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([_LENGTH.pack(len(data))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(data)
        answer = connection.recv(1)
    if not answer:
        sys.stderr.write(f"{arguments[0]} was killed\n")
    return answer[0] if answer else 137


if __name__ == "__main__":
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))
