from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proteus_cache.errors import ChecksumError, FormatError, StorageError
from proteus_cache.train.tensors import check_tensors, read_tensors, replace_tensors, tensor_chunks

TENSORS = {
    "b": torch.randn(3, 4),
    "a": torch.randn(2, 5).to(torch.float16),
    "scalar": torch.tensor(7.0),
    "none": torch.empty(0, 3),
    "turned": torch.randn(4, 3).T,
    "brain": torch.randn(3).to(torch.bfloat16),
    "count": torch.tensor([1, 2**40]),
    "byte": torch.tensor([255], dtype=torch.uint8),
}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    replace_tensors(path, TENSORS, {"two": "2", "one": "1"})

    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    found, metadata = read_tensors(path)
    assert metadata == {"one": "1", "two": "2", "file_sha256": metadata["file_sha256"]}
    for tensors in (found, load_file(path)):
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)


def test_bytes_depend_on_the_content_alone() -> None:
    metadata = {str(number): "x" for number in range(20)}

    def file_bytes(reverse: bool) -> bytes:
        tensors = dict(sorted(TENSORS.items(), reverse=reverse))
        return b"".join(bytes(part) for part in tensor_chunks(tensors, dict(sorted(metadata.items(), reverse=reverse))))

    assert file_bytes(reverse=False) == file_bytes(reverse=True)


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    replace_tensors(path, {"a": torch.zeros(2)}, {})

    replace_tensors(path, {"b": torch.ones(2)}, {})

    assert list(read_tensors(path)[0]) == ["b"]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    replace_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(FormatError, match=r"x\.safetensors: not a readable safetensors file"):
        read_tensors(path)


def test_a_file_proves_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    replace_tensors(path, TENSORS, {"one": "1"})
    check_tensors(path)
    data = path.read_bytes()
    digest = read_tensors(path)[1]["file_sha256"].encode()
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest

    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChecksumError, match=r"x\.safetensors: not the file that was written"):
        check_tensors(path)
    path.write_bytes(b"".join(bytes(chunk) for chunk in tensor_chunks(TENSORS, {"one": "1"})))
    with pytest.raises(FormatError, match=r"x\.safetensors: .*does not hold its own digest"):
        check_tensors(path)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FormatError, match=r"x\.safetensors: missing"):
        read_tensors(path)
    replace_tensors(path, TENSORS, {})

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("proteus_cache.train.tensors.safe_open", fail)

    with pytest.raises(StorageError, match=r"x\.safetensors: cannot read: Input/output error; look at the disk"):
        read_tensors(path)
