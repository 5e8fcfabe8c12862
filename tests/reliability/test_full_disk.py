"""R7: a disk that is full at any size ends a command with exit code 1, and the same command goes on once there is room.

On small file systems of the kernel (tmpfs) where this machine mounts them, and on a disk that counts, everywhere.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner

from proteus_cache import open_cache, open_pack, storage
from proteus_cache.cli.app import app
from proteus_cache.errors import SpaceError, UsageError
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.pipeline import _Pipeline
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.plan import PackPlan
from proteus_cache.plan.extraction import ExtractPlan
from tests.cli.running import run as run_command
from tests.makers import identity, make_config, run_extract
from tests.reliability.disks import Failing, Operation, Watched, using
from tests.reliability.invariants import (
    committed,
    damage_of_cache,
    damage_of_pack,
    differences_of_cache,
    differences_of_folder,
    digests_below,
    files_below,
    lost,
    vague_message,
)
from tests.reliability.small_disk import PAGE_BYTES, enlarge, small_disk, why_no_small_disk
from tests.reliability.worlds import Prepared, extract_prepared, pack_prepared, prepare

Result = TypeVar("Result")

N_SIZES, N_INODE_LIMITS, N_COUNTED_SIZES = 16, 4, 16
"""Equal steps up to what a whole cache and its pack take."""
COMMAND_SIZES = (5, 9, 13)
"""Of the sixteen, those at which the real command is run."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Images and a teacher, on a disk with room."""
    return make_config(tmp_path_factory.mktemp("work"), n_images=8, views=2, shard_size=3)


@pytest.fixture(scope="module")
def undisturbed(config: ExtractConfig) -> dict[str, list[object]]:
    run_extract(config)
    return identity(open_cache(config.out))


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """Where small disks are mounted."""
    if (why := why_no_small_disk(tmp_path)) is not None:
        pytest.skip(f"no small disk here ({why}); a disk that counts takes its place below")
    return tmp_path


@pytest.fixture
def no_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans do not refuse what will not fit."""
    monkeypatch.setattr(ExtractPlan, "check", lambda plan: None)
    monkeypatch.setattr(PackPlan, "check", lambda plan, *_: None)


def _extract_and_pack(config: ExtractConfig, disk: Path) -> None:
    """Both stores on one disk; what a start of each leaves undone is done by the next."""
    run_extract(replace(config, out=disk / "cache"))
    build_pack(disk / "cache", disk / "pack", workers=1)


def _needs(config: ExtractConfig, disks: Path) -> tuple[int, int]:
    """Bytes and inodes of a tmpfs that a whole cache and its pack take."""
    with small_disk(disks / "large") as disk:
        before = os.statvfs(disk)
        _extract_and_pack(config, disk)
        after = os.statvfs(disk)
        return (before.f_bfree - after.f_bfree) * after.f_frsize, before.f_ffree - after.f_ffree


def _check_full(error: SpaceError, disk: Path, before: dict[str, str]) -> None:
    """The error is the right one; what was committed is whole, and nothing unfinished is left."""
    assert vague_message(error, disk) == []
    assert "free space or inodes there and run the same command again" in str(error)
    assert lost(before, committed(disk / "cache")) == []
    assert damage_of_cache(disk / "cache") == []
    assert damage_of_pack(disk / "pack") == []
    ours = f".{os.getpid()}."
    assert [path for path in files_below(disk) if ours in path] == []


def _fails_and_goes_on(
    config: ExtractConfig, disk: Path, undisturbed: dict[str, list[object]], make_room: Callable[[], None]
) -> None:
    before = committed(disk / "cache")
    with pytest.raises(SpaceError) as caught:
        _extract_and_pack(config, disk)
    _check_full(caught.value, disk, before)
    with pytest.raises(SpaceError):  # the same command on the same disk
        _extract_and_pack(config, disk)
    kept = committed(disk / "cache")

    make_room()
    _extract_and_pack(config, disk)

    assert lost(kept, committed(disk / "cache")) == []
    assert differences_of_cache(disk / "cache", undisturbed) == []
    assert damage_of_pack(disk / "pack") == []
    assert not (disk / "pack" / "tmp").exists()
    keys = [open_pack(disk / "pack")[number].key for number in range(len(open_pack(disk / "pack")))]
    assert keys == [open_cache(disk / "cache")[number].key for number in range(len(keys))]


@pytest.mark.usefixtures("no_look_ahead")
def test_a_small_file_system_of_every_size(
    config: ExtractConfig, disks: Path, undisturbed: dict[str, list[object]]
) -> None:
    n_bytes, _ = _needs(config, disks)
    reached = []
    for number in range(1, N_SIZES + 1):
        size = n_bytes * number // (N_SIZES + 1) // PAGE_BYTES * PAGE_BYTES
        with small_disk(disks / f"size {number}", size_bytes=size) as disk:
            _fails_and_goes_on(config, disk, undisturbed, lambda disk=disk: enlarge(disk))  # type: ignore[misc]  # bound now
            reached.append(size)
    assert len(reached) == len(set(reached)) == N_SIZES


@pytest.mark.usefixtures("no_look_ahead")
def test_a_file_system_without_inodes(config: ExtractConfig, disks: Path, undisturbed: dict[str, list[object]]) -> None:
    _, n_inodes = _needs(config, disks)
    for number in range(1, N_INODE_LIMITS + 1):
        limit = 2 + n_inodes * number // (N_INODE_LIMITS + 1)
        with small_disk(disks / f"inodes {number}", inodes=limit) as disk:
            _fails_and_goes_on(config, disk, undisturbed, lambda disk=disk: enlarge(disk))  # type: ignore[misc]  # bound now


def _command(config: ExtractConfig, disk: Path) -> list[object]:
    return [
        *("extract", "--teacher", "vit", "--weights", config.weights, "--images", config.images),
        *("--out", disk / "cache", "--views", 2, "--shard-size", 3, "--workers", 0, "--device", "cpu"),
    ]


def test_the_plan_refuses_a_disk_that_is_too_small(config: ExtractConfig, disks: Path) -> None:
    with small_disk(disks / "small", size_bytes=8 * PAGE_BYTES) as disk:
        outcome = run_command(*_command(config, disk), code=1)

        assert files_below(disk) == []
    last = outcome.stderr.splitlines()[-1]
    assert f"{disk}/cache: " in last
    assert "are needed (with 5 % to spare) and 32.8 KB are free; " in last


def test_the_commands_fail_with_one_line_and_go_on_when_there_is_room(
    config: ExtractConfig, disks: Path, undisturbed: dict[str, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes, _ = _needs(config, disks)
    failed = []
    for number in COMMAND_SIZES:
        size = n_bytes * number // (N_SIZES + 1) // PAGE_BYTES * PAGE_BYTES
        with small_disk(disks / f"size {number}", size_bytes=size) as disk:
            commands = _command(config, disk), ["pack", disk / "cache", "--out", disk / "pack"]
            with monkeypatch.context() as patch:
                patch.setattr(ExtractPlan, "check", lambda plan: None)
                patch.setattr(PackPlan, "check", lambda plan, *_: None)
                name, line = _first_failure(commands)
            enlarge(disk)
            for command in commands:
                run_command(*command)
            failed.append(name)

            assert f"{disk}/" in line
            assert "No space left on device; free space or inodes there and run the same command again" in line
            assert differences_of_cache(disk / "cache", undisturbed) == []
            assert damage_of_pack(disk / "pack") == []
    assert set(failed) == {"extract", "pack"}


def _first_failure(commands: tuple[list[object], ...]) -> tuple[str, str]:
    """The first command that ends with exit code 1, and the last line that it says; none after it is run."""
    for command in commands:
        outcome = CliRunner().invoke(app, [str(word) for word in command])
        assert outcome.exit_code in (0, 1), outcome.output
        assert "Traceback" not in outcome.output
        if outcome.exit_code == 1:
            return str(command[0]), outcome.stderr.splitlines()[-1]
    raise AssertionError("everything fitted")


class Counting(Watched):
    """A disk that holds so many bytes, and says so in the middle of a write.

    Args:
        size_bytes: all that fits.
    """

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.left = size_bytes
        self.n_refused = 0

    def write(self, descriptor: int, data: memoryview) -> int:
        if not self.left:
            self.n_refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(descriptor, data[: self.left])
        self.left -= taken
        return taken

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        freed = [operation.path] if operation.name == "unlink" else [operation.new] if operation.new else []
        sizes = [path.stat().st_size for path in freed if path and path.is_file() and path.stat().st_nlink == 1]
        result = call()
        self.left += sum(sizes) if operation.name in ("unlink", "rename") else 0
        return result


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"))


def test_a_disk_that_counts_at_every_size(prepared: Prepared, fast_folder: Path) -> None:
    def start(world: Path) -> None:
        extract_prepared(world / "cache", prepared)
        pack_prepared(world / "cache", world / "pack")

    start(fast_folder / "undisturbed")
    undisturbed = digests_below(fast_folder / "undisturbed")
    n_bytes = sum((fast_folder / "undisturbed" / path).stat().st_size for path in undisturbed)
    for number in range(1, N_COUNTED_SIZES + 1):
        world = fast_folder / str(number)
        disk = Counting(n_bytes * number // (N_COUNTED_SIZES + 1))

        with using(disk), pytest.raises(SpaceError) as caught:
            start(world)

        assert disk.n_refused == 1  # a full disk is permanent for this process: nothing is tried twice
        _check_full(caught.value, world, {})
        with using(storage.Disk()):
            start(world)
        assert differences_of_folder(world, undisturbed) == []


def test_after_a_full_disk_no_other_unit_is_begun(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next unit waits already, and the disk has room again at once: it would go well, and is not tried."""
    submit, submitted = _Pipeline._submit, threading.Semaphore(0)

    def submit_and_tell(pipeline: _Pipeline, *args: Any) -> None:  # as they came
        submit(pipeline, *args)
        submitted.release()

    class Once(Failing):
        made_later = 0

        def create(self, path: Path) -> int:
            self.made_later += bool(self.fired)
            return super().create(path)

        def write(self, descriptor: int, data: memoryview) -> int:
            path = self.opened[descriptor][0]
            if path.name.startswith("s00001.tar.") and not self.fired:
                self.fired += 1
                for _ in range(3):  # v000/s00000, this one, and the next
                    assert submitted.acquire(timeout=30)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(descriptor, data)

    monkeypatch.setattr(_Pipeline, "_submit", submit_and_tell)
    disk = Once(0)
    larger = replace(config, out=tmp_path / "cache", views=3)

    with using(disk), pytest.raises(SpaceError, match=r"s00001\.tar.*free space"):
        run_extract(larger)

    assert disk.made_later == 0
    assert list(committed(larger.out)) == ["v000/0"]
    with pytest.raises(UsageError):
        build_pack(tmp_path / "cache", tmp_path / "pack")  # it is not complete
    run_extract(larger)
    assert len(open_cache(larger.out).views()) == 3
