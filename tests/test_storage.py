"""storage: files appear whole or not at all, and the first of two writers wins where it must."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from proteus_cache import storage
from proteus_cache.errors import FormatError, SpaceError, StorageError


def test_write_new_returns_size_and_digest_of_all_chunks(tmp_path: Path) -> None:
    chunks: list[storage.Buffer] = [b"abc", memoryview(b"defg"), np.arange(5, dtype=np.uint8)]

    written = storage.write_new(tmp_path / "file", chunks)

    data = (tmp_path / "file").read_bytes()
    assert data == b"abcdefg\x00\x01\x02\x03\x04"
    assert written == storage.Written(len(data), hashlib.sha256(data).hexdigest())


def test_write_new_refuses_an_existing_file_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    with pytest.raises(StorageError, match="cannot write: File exists"):
        storage.write_new(tmp_path / "file", b"new")

    assert (tmp_path / "file").read_bytes() == b"old"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:3]))

    storage.write_new(tmp_path / "file", b"0123456789")

    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SpaceError), (errno.EDQUOT, SpaceError), (errno.EIO, StorageError)]
)
def test_a_failed_write_removes_the_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)

    with pytest.raises(kind, match=str(tmp_path)) as caught:
        storage.write_new(tmp_path / "file", b"data")

    assert type(caught.value) is kind
    assert list(tmp_path.iterdir()) == []


def test_after_a_failed_fsync_the_bytes_go_once_to_a_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync, calls = os.fsync, []

    def fail_first(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_first)

    path, written = storage.write_durable(tmp_path, "unit.tar", lambda: [b"ab", b"c"])

    assert path.read_bytes() == b"abc"
    assert written.size == 3
    assert calls[0] != calls[1] == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_second_failed_fsync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(StorageError, match="Input/output error"):
        storage.write_durable(tmp_path, "unit.tar", lambda: b"abc")

    assert list(tmp_path.iterdir()) == []


def test_publish_once_keeps_the_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        storage.write_new(tmp_path / name, name.encode())

    assert storage.publish_once(tmp_path / "first", tmp_path / "final")
    assert not storage.publish_once(tmp_path / "second", tmp_path / "final")

    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").read_bytes() == b"first"


def test_publish_once_lets_a_finished_writer_remove_our_file(tmp_path: Path) -> None:
    (tmp_path / "final").write_bytes(b"first")

    assert not storage.publish_once(tmp_path / "removed", tmp_path / "final")
    with pytest.raises(StorageError, match="cannot link: No such file"):
        storage.publish_once(tmp_path / "removed", tmp_path / "other")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_read_is_to_be_made_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(StorageError, match=r"file: cannot read: [A-Z].*; make it readable for this user$"):
        storage.read_bytes(tmp_path / "file", 100)
    with pytest.raises(StorageError, match=r"file: cannot write: [A-Z].*; make it writable for this user"):
        storage.write_new(tmp_path / "file", b"")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "mounted read-only"), (errno.EACCES, "writable"), (errno.EPERM, "hard links")],
)
def test_a_refusal_of_the_file_system_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(temp: Path, final: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)

    with pytest.raises(StorageError, match=f"final: cannot link: .*{remedy}"):
        storage.publish_once(tmp_path / "file", tmp_path / "final")


def test_a_rename_keeps_the_inode(tmp_path: Path) -> None:
    storage.write_new(tmp_path / "temp", b"new")
    storage.write_new(tmp_path / "final", b"old")
    ours = storage.inode_of(tmp_path / "temp")

    assert ours != storage.inode_of(tmp_path / "final")
    storage.publish(tmp_path / "temp", tmp_path / "final")

    assert storage.inode_of(tmp_path / "final") == ours
    assert storage.inode_of(tmp_path / "temp") is None


def test_size_of_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")

    assert storage.size_of(tmp_path / "file") == 5
    assert storage.size_of(tmp_path / "link") is None
    assert storage.size_of(tmp_path / "missing") is None


def test_read_bytes_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")

    assert storage.read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(FormatError, match="larger than the 4 bytes"):
        storage.read_bytes(tmp_path / "file", 4)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert storage.free_space(tmp_path / "a" / "b").bytes > 0


class Deceitful(storage.Disk):
    """A file server that does what it is asked and reports an error."""

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def link(self, old: Path, new: Path) -> None:
        super().link(old, new)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def test_a_lost_answer_is_told_from_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        storage.write_new(tmp_path / name, name.encode())
    monkeypatch.setattr(storage, "disk", Deceitful())

    storage.publish(tmp_path / "first", tmp_path / "renamed")
    assert storage.publish_once(tmp_path / "second", tmp_path / "linked")

    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["linked", "renamed"]


def test_write_whole_leaves_the_old_file_and_nothing_else_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(storage.Disk):
        def rename(self, old: Path, new: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    storage.write_whole(tmp_path / "file", lambda: b"old")
    monkeypatch.setattr(storage, "disk", Refusing())

    with pytest.raises(StorageError, match=r"file: cannot rename to: Input/output error; look at the disk"):
        storage.write_whole(tmp_path / "file", lambda: b"new")

    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_names_of_a_store_are_synced_once_also_where_another_process_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(storage.Disk):
        def open(self, path: Path) -> int:
            synced.append(path)
            return super().open(path)

    synced: list[Path] = []
    monkeypatch.setattr(storage, "disk", Watched())
    root = tmp_path / "store"
    (root / "views" / "v000").mkdir(parents=True)

    storage.make_folder(root / "views" / "v000", root)
    storage.make_folder(root / "views" / "v000", root)
    assert synced == [tmp_path, root, root / "views"]

    storage.make_folder(root / "views" / "v001", root)
    assert synced[3:] == [root / "views"]


def test_discard_removes_a_tree_but_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"1")
    (tmp_path / "temp" / "below").mkdir(parents=True)
    (tmp_path / "temp" / "below" / "file").write_bytes(b"2")
    (tmp_path / "temp" / "link").symlink_to(tmp_path / "kept")

    storage.discard(tmp_path / "temp")
    storage.discard(tmp_path / "missing")

    assert [entry.name for entry in tmp_path.rglob("*")] == ["kept", "file"]


def test_reading_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(StorageError, match="pipe: cannot read: not a regular file"):
        storage.read_bytes(tmp_path / "pipe", 5)
