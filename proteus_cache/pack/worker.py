"""A reader process: takes record numbers through a pipe, fills slots of shared memory, ends with its parent.

It imports numpy and Pillow, not torch, and is started as a plain child, so it never runs the parent's main
script a second time and inherits no lock, device or thread. A message to it is 8 bytes (slot, samples of the
batch) and for each view index 16 bytes (view, samples), the record numbers and the rows they fill; an answer is a
JSON object.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from proteus_cache import errors
from proteus_cache.errors import ProteusCacheError
from proteus_cache.pack.samples import PackLayout, Part, SampleReader
from proteus_cache.pack.slots import SlotPool, SlotShape
from proteus_cache.processes import follow_parent

_TASK = struct.Struct("<II")
_PART = struct.Struct("<8sQ")
_MAX_ANSWER_BYTES = 1 << 20
_START = "import sys, json; spec = json.loads(sys.argv[1]); sys.path[:] = spec['path']; "
_START += "from proteus_cache.pack.worker import main; main(spec)"
_GRACE_S = 5.0


class ReaderProcess:
    """One running reader process, seen from its parent."""

    def __init__(self, layout: PackLayout, shape: SlotShape, n_slots: int, descriptor: int) -> None:
        """
        Args:
            layout: the pack.
            shape: of the slots.
            n_slots: in the shared file.
            descriptor: of the shared file.
        """
        ours, theirs = Pipe()
        spec = {
            "path": sys.path,
            "layout": asdict(layout),
            "shape": asdict(shape),
            "n_slots": n_slots,
            "memory": descriptor,
            "pipe": theirs.fileno(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(spec)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), descriptor),
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        theirs.close()
        self._pipe = ours

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    def submit(self, slot: int, parts: list[Part]) -> None:
        """Ask for a batch; answers come in the order of the questions."""
        try:
            self._pipe.send_bytes(_message(slot, parts))
        except OSError as error:
            raise self._ended() from error

    def wait(self) -> int:
        """Bytes read for the oldest open question, once its slot is filled.

        Raises:
            The error that the process met, with its type and message; or ProteusCacheError when the process
            is gone.
        """
        try:
            answer = json.loads(self._pipe.recv_bytes(_MAX_ANSWER_BYTES))
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if "error" in answer:
            raise _rebuilt(answer)
        return int(answer["bytes"])

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> ProteusCacheError:
        try:
            status = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return ProteusCacheError(f"reader process {self.pid} does not answer any more; start the run again")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        advice = "the machine may be out of memory: use fewer --workers" if status == -signal.SIGKILL else "see above"
        return ProteusCacheError(f"reader process {self.pid} {how}; {advice}")


def _message(slot: int, parts: list[Part]) -> bytes:
    buffers = [_TASK.pack(slot, sum(part.numbers.size for part in parts))]
    for part in parts:
        head = _PART.pack(part.view.encode(), part.numbers.size)
        buffers += [head, part.numbers.tobytes(), part.rows.tobytes()]
    return b"".join(buffers)


def _parts(message: bytes) -> Iterator[Part]:
    at = _TASK.size
    while at < len(message):
        view, n = _PART.unpack_from(message, at)
        columns = np.frombuffer(message, dtype=np.int64, count=2 * n, offset=at + _PART.size).reshape(2, n)
        yield Part(view.rstrip(b"\0").decode(), columns[0], columns[1])
        at += _PART.size + columns.nbytes


def main(spec: dict[str, Any]) -> None:
    """Answer until the parent closes the pipe."""
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    layout = spec["layout"]
    views = {view: (int(n), int(tars)) for view, (n, tars) in layout["views"].items()}
    reader = SampleReader(PackLayout(layout["root"], layout["code_bytes"], layout["side_px"], views))
    shape = SlotShape(**spec["shape"])
    pool = SlotPool(shape.slot_bytes, spec["n_slots"], spec["memory"])
    pipe = Connection(spec["pipe"])
    try:
        while True:
            message = pipe.recv_bytes()
            pipe.send_bytes(json.dumps(_answer(message, reader, pool, shape)).encode())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(message: bytes, reader: SampleReader, pool: SlotPool, shape: SlotShape) -> dict[str, Any]:
    slot, n = _TASK.unpack_from(message)
    before = reader.bytes_read
    try:
        memory = pool.array(slot)
        codes, views = shape.codes(memory, n), shape.views(memory, n)
        for part in _parts(message):
            reader.read(part, codes, views)
    except Exception as error:
        known = isinstance(error, ProteusCacheError)
        notes = [*getattr(error, "__notes__", []), *([] if known else [traceback.format_exc(limit=-4)])]
        return {
            "error": type(error).__name__,
            "message": str(error)[:4096],
            "notes": [n[:4096] for n in notes],
        }
    return {"bytes": reader.bytes_read - before}


def _rebuilt(answer: dict[str, Any]) -> Exception:
    """The exception that the process met; unknown types become RuntimeError."""
    name, message = str(answer["error"]), str(answer["message"])
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        error: Exception = kind(message)
    else:
        error = RuntimeError(f"{name}: {message}")
    for note in answer["notes"]:
        error.add_note(note)
    return error
