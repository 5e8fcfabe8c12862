"""I4: a cache packs to the same bytes, wherever, whenever, in whatever order and by however many threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from proteus_cache.errors import StorageError
from proteus_cache.pack import build
from proteus_cache.pack.build import build_pack
from tests.makers import make_cache
from tests.reliability.disks import Failing, using
from tests.reliability.invariants import differences_of_folder, digests_below

N_VARIANTS = 9
SETTINGS = {"views": ["v001", "probe", "v000"], "codec": "int4"}
"""Asked for out of order, and encoded again: that is arithmetic, which must not depend on threads either."""
_IN_A_PROCESS = """
import locale, sys
locale.setlocale(locale.LC_ALL, "")
from proteus_cache.pack.build import build_pack
build_pack(sys.argv[1], sys.argv[2], views=["v001", "probe", "v000"], codec="int4", workers=2)
"""

Variant = Callable[[Path, Path], None]
"""Packs a cache to a folder, in its own way."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"), 9, codec="float16", probe_images=3).path


@pytest.fixture(scope="module")
def bytes_of_pack(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Path to digest of the pack as one thread writes it."""
    out = tmp_path_factory.mktemp("packed") / "pack"
    build_pack(cache, out, workers=1, **SETTINGS)  # type: ignore[arg-type]  # named settings
    return digests_below(out)


def plainly(cache: Path, out: Path, workers: int = 1) -> None:
    build_pack(cache, out, workers=workers, **SETTINGS)  # type: ignore[arg-type]  # named settings


def again_elsewhere(cache: Path, out: Path) -> None:
    moved = out.parent / "another folder" / "of caches" / "c"
    shutil.copytree(cache, moved, copy_function=shutil.copyfile)  # with other times and modes
    plainly(moved, out)


def by_threads(cache: Path, out: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        plainly(cache, out, workers=5)
    finally:
        torch.set_num_threads(threads)


def units_in_another_order(cache: Path, out: Path) -> None:
    real = build._units
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_units", lambda plan: sorted(real(plan), key=lambda unit: (-unit[1], unit[0])))
        plainly(cache, out)


def with_another_umask(cache: Path, out: Path) -> None:
    before = os.umask(0o077)
    try:
        plainly(cache, out)
    finally:
        os.umask(before)


def by_relative_names(cache: Path, out: Path) -> None:
    with _in_folder(out.parent):
        plainly(Path(os.path.relpath(cache)), Path(out.name))


def through_a_link(cache: Path, out: Path) -> None:
    (out.parent / "link").symlink_to(cache)
    plainly(out.parent / "link", out)


def cut_off_and_resumed(cache: Path, out: Path) -> None:
    with using(Failing(120, sticky=True)), pytest.raises(StorageError):
        plainly(cache, out)
    assert not (out / "pack.json").exists()
    plainly(cache, out)


def in_another_time_zone(cache: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        plainly(cache, out)
    time.tzset()


def in_a_process(environment: dict[str, str]) -> Variant:
    def pack(cache: Path, out: Path) -> None:
        command = [sys.executable, "-c", _IN_A_PROCESS, str(cache), str(out)]
        subprocess.run(command, env=os.environ | environment, check=True, cwd=out.parent)

    return pack


VARIANTS: dict[str, Variant] = {
    "again, elsewhere": again_elsewhere,
    "five threads": by_threads,
    "another order of units": units_in_another_order,
    "umask 077": with_another_umask,
    "relative names": by_relative_names,
    "through a link": through_a_link,
    "cut off and resumed": cut_off_and_resumed,
    "another time zone": in_another_time_zone,
    "another process": in_a_process(
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "1"}
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_packing_gives_the_same_bytes(name: str, cache: Path, bytes_of_pack: dict[str, str], tmp_path: Path) -> None:
    VARIANTS[name](cache, tmp_path / "pack")

    assert differences_of_folder(tmp_path / "pack", bytes_of_pack) == []


def test_there_is_something_to_compare(bytes_of_pack: dict[str, str]) -> None:
    assert len(VARIANTS) == N_VARIANTS
    assert len(bytes_of_pack) == 12, "pack.json, parameters of a codec, three indices, tars: three, three and one"


@contextmanager
def _in_folder(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
