"""Tensor files: safetensors whose bytes depend on nothing but their content.

The safetensors library orders metadata by a hash that differs from process to process, so the same weights
give different files. This writes the same format with sorted keys, tensor after tensor, so that a big state
is never copied as a whole. Reading is the library's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from proteus_cache import storage
from proteus_cache.errors import FormatError

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


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside `path`, durably, and give it that name."""
    storage.write_whole(path, lambda: tensor_chunks(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        FormatError: missing, cut short, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names: list[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error})") from error
