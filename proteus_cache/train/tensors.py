"""Tensor files: safetensors whose bytes depend on nothing but their content.

The safetensors library orders metadata by a hash that differs from process to process, so the same weights
give different files. This writes the same format with sorted keys, tensor after tensor, so that a big state
is never copied as a whole. Reading is the library's.

Final weights travel alone, so `replace_tensors` writes a digest of the whole file into its metadata, which
`check_tensors` compares: `file_sha256`, the SHA-256 of the file with zeros in place of these 64 digits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from proteus_cache import storage
from proteus_cache.errors import ChecksumError, FormatError, StorageError
from proteus_cache.teachers.weights import MAX_TENSORS

FILE_DIGEST = "file_sha256"
_UNKNOWN = "0" * 64
_DIGEST_PLACE = re.compile(rb'"file_sha256":"([0-9a-f]{64})"')
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no longer ones
_READ_BYTES = 1 << 20
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def tensor_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[np.ndarray | bytes]:
    """The bytes of a safetensors file: the header, then the tensors (widest types first, then by name).

    Args:
        tensors: name -> tensor on any device; float32, float16, bfloat16, int64 or uint8.
        metadata: free text; written with sorted keys.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> storage.Written:
    """Write a safetensors file that proves itself beside `path`, durably, and give it that name."""
    digest = hashlib.sha256()
    for chunk in tensor_chunks(tensors, {**metadata, FILE_DIGEST: _UNKNOWN}):
        digest.update(memoryview(chunk).cast("B"))  # type: ignore[arg-type]  # numpy types its buffer from 3.12 on
    proved = {**metadata, FILE_DIGEST: digest.hexdigest()}
    return storage.write_whole(path, lambda: tensor_chunks(tensors, proved))


def check_tensors(path: Path) -> None:
    """Compare a file of `replace_tensors` with the digest in it; every byte is read.

    Raises:
        ChecksumError: it is not what was written.
        FormatError: it holds no such digest, or is no safetensors file at all.
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    start = storage.read_part(path, 0, 8)
    n_header = int.from_bytes(start, "little")
    with storage.reported("read", path), open(path, "rb") as file:
        file.seek(8)
        header = file.read(n_header) if n_header <= _MAX_HEADER_BYTES else b""
        found = _DIGEST_PLACE.search(header)
        if found is None or len(header) != n_header:
            raise FormatError(f"{path}: damaged, or no file of final weights (it does not hold its own digest)")
        digest.update(start + header[: found.start(1)] + _UNKNOWN.encode() + header[found.end(1) :])
        while part := file.read(_READ_BYTES):
            digest.update(part)
    if digest.hexdigest().encode() != found[1]:
        raise ChecksumError(f"{path}: not the file that was written (it does not have the digest that it states)")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        FormatError: missing, cut short, or not safetensors.
        StorageError: it cannot be read.
    """
    try:
        storage.read_part(path, 0, 1)  # the library calls missing whatever it cannot open, and waits at a pipe
        with storage.reported("read", path), safe_open(path, framework="pt", device="cpu") as file:
            names: list[str] = file.keys()
            if len(names) > MAX_TENSORS:
                raise FormatError(f"{path}: holds {len(names):,} tensors, and no model has so many")
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:  # shapes that are none
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{path}: not a readable safetensors file ({reason})") from error
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FormatError(f"{path}: missing") from error
        raise
