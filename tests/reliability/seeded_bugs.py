"""Do the tests notice? Twelve classic bugs are put into a copy of the sources, one by one; each must turn a test red.

    python -m tests.reliability.seeded_bugs [NAME ...]

The copy holds the tracked files and the new ones; nothing here is changed. First the chosen tests must pass without
any bug. The table at the end names the first test that failed for each; 1 is the exit code when a bug went unnoticed.
Run it after a change of storage, commit, checkpoint or reading code. `test_seeded_bugs.py` proves that every bug can
still be put in.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Bug:
    """One mistake that somebody could make."""

    name: str
    file: str
    right: str
    """Text of the source, which occurs once."""
    wrong: str
    tests: str
    """Arguments of pytest: where it should be noticed."""


_SYNC = "                disk.sync(descriptor)\n            finally:\n                disk.close(descriptor)\n"

_BROKEN = "(Name|Import|Attribute|Type|Syntax|Indentation|UnboundLocal)Error"
"""Of a bug that does not run: nothing was noticed."""

BUGS = (
    Bug(
        "no file fsync",
        "proteus_cache/storage.py",
        _SYNC,
        _SYNC.replace("disk.sync(descriptor)", "pass"),
        "tests/reliability/test_power_loss.py",
    ),
    Bug(
        "no folder fsync",
        "proteus_cache/storage.py",
        "        descriptor = disk.open(path)\n        try:\n            disk.sync(descriptor)\n",
        "        descriptor = disk.open(path)\n        try:\n            pass\n",
        "tests/reliability/test_power_loss.py",
    ),
    Bug(
        "receipt before data",
        "proteus_cache/cache/writer.py",
        "    ours = {}\n    for relative, temp in temporary.items():\n",
        "    ours = {}\n"
        "    storage.make_folder(final_receipt.parent, layout.root)\n"
        "    early, _ = storage.write_durable(layout.temporary, final_receipt.name, receipt.sealed)\n"
        "    storage.publish_once(early, final_receipt)\n"
        "    for relative, temp in temporary.items():\n"
        "        storage.make_folder(layout.resolve(relative).parent, layout.root)\n"
        "        storage.publish(temp, layout.resolve(relative))\n"
        "    return True\n"
        "    for relative, temp in temporary.items():\n",
        "tests/reliability/test_crash_points.py tests/reliability/test_power_loss.py",
    ),
    Bug(
        "close error ignored",
        "proteus_cache/storage.py",
        "            finally:\n                disk.close(descriptor)\n    except BaseException:",
        "            finally:\n                with suppress(OSError):\n                    disk.close(descriptor)\n"
        "    except BaseException:",
        "tests/reliability/test_faults.py tests/test_storage.py",
    ),
    Bug(
        "short write ignored",
        "proteus_cache/storage.py",
        "    while view.nbytes:\n        view = view[disk.write(descriptor, view) :]\n",
        "    disk.write(descriptor, view)\n",
        "tests/reliability/test_faults.py tests/test_storage.py",
    ),
    Bug(
        "fsync retried",
        "proteus_cache/storage.py",
        _SYNC,
        "                try:\n                    disk.sync(descriptor)\n"
        "                except OSError:\n    " + _SYNC,
        "tests/reliability/test_faults.py tests/test_storage.py",
    ),
    Bug(
        "digest not compared",
        "proteus_cache/cache/reader.py",
        "        if hashlib.sha256(data).hexdigest() != record.sha256:\n",
        "        if False:\n",
        "tests/reliability/test_integrity.py tests/cache",
    ),
    Bug(
        "CRC not compared on reading",
        "proteus_cache/pack/samples.py",
        "            if checksum(code) != codes_crc:\n",
        "            if False:\n",
        "tests/reliability/test_integrity.py tests/pack/test_reader.py tests/pack/test_samples.py",
    ),
    Bug(
        "old checkpoint deleted first",
        "proteus_cache/train/checkpoint.py",
        "    began = time.perf_counter()\n    temp = _written(",
        "    began = time.perf_counter()\n"
        '    for step in checkpoint_steps(folder):\n        remove_checkpoint(folder / f"step-{step:08d}")\n'
        "    temp = _written(",
        "tests/train/test_checkpoint.py tests/reliability/test_power_loss.py tests/reliability/test_crash_points.py",
    ),
    Bug(
        "presence taken for validity",
        "proteus_cache/pack/unit.py",
        "        is_whole = storage.sha256_of(job.tar_path) == (note.tar.size, note.tar.sha256)\n",
        "        is_whole = storage.size_of(job.tar_path) is not None\n",
        "tests/pack/test_build.py tests/reliability/test_power_loss.py",
    ),
    Bug(
        "draws keyed by rank",
        "proteus_cache/train/feed.py",
        "        return draw_masks(config.seed, host.step, host.positions.numpy(), n_patches",
        "        local = host.positions.numpy() - host.positions.numpy()[0] // 2 * 2\n"
        "        return draw_masks(config.seed, host.step, local, n_patches",
        "tests/train/test_processes.py tests/train/test_loop.py",
    ),
    Bug(
        "links followed",
        "proteus_cache/pack/samples.py",
        "    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW\n",
        "    flags = os.O_RDONLY | os.O_CLOEXEC\n",
        "tests/pack/test_reader.py tests/pack/test_samples.py tests/safety",
    ),
)


def main() -> int:
    """Put in every chosen bug and print what noticed it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(bug.name for bug in BUGS))
    chosen = parser.parse_args().names
    bugs = [bug for bug in BUGS if not chosen or bug.name in chosen]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        _copy_sources(copy)
        tests = sorted({test for bug in bugs for test in bug.tests.split()})
        status, failed, seconds = _run(copy, tests)
        print(f"without a bug: {'green' if status == 0 else f'RED: {failed}'} ({seconds:.0f} s)", flush=True)
        if status != 0:
            return 1
        for bug in bugs:
            path = copy / bug.file
            source = path.read_text()
            path.write_text(with_bug(source, bug))
            status, failed, seconds = _run(copy, bug.tests.split())
            path.write_text(source)
            noticed = status == 1 and bool(failed)
            unnoticed += not noticed
            print(f"{bug.name:30} {failed if noticed else f'UNNOTICED (exit {status})'} ({seconds:.0f} s)", flush=True)
    print(f"{len(bugs) - unnoticed} of {len(bugs)} noticed")
    return 1 if unnoticed else 0


def with_bug(source: str, bug: Bug) -> str:
    """The source text with a bug in it.

    Raises:
        ValueError: the text that it replaces does not occur once.
    """
    if source.count(bug.right) != 1:
        raise ValueError(f"{bug.name}: the text to replace occurs {source.count(bug.right)} times in {bug.file}")
    return source.replace(bug.right, bug.wrong)


def _copy_sources(copy: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def _run(copy: Path, tests: list[str]) -> tuple[int, str, float]:
    """(exit status of pytest, first failed test, seconds)."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    failed = re.search(r"^FAILED (\S+)(?: - (.*))?", done.stdout, re.MULTILINE)
    is_broken = failed is not None and re.match(_BROKEN, failed[2] or "") is not None
    return done.returncode, failed[1] if failed and not is_broken else "", time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
