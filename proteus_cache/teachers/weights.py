"""Weights on disk: local files, their digest, and what to say when they do not fit a model.

A `.pth` is read by torch's restricted unpickler only (a pickle that asks for code is refused) and converted
once to `HOME/weights/SHA256-OF-THE-FILE.safetensors`; from then on nothing is unpickled. A converted file
carries the digest of its tensors and is checked against it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from proteus_cache import storage
from proteus_cache.errors import ChecksumError, UsageError, WeightsError

Fit: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Raw tensors of a file -> the tensors that a model takes, all names and shapes checked, or WeightsError."""

_log = logging.getLogger(__name__)
_PICKLES = (".pth", ".pt", ".bin")
_NESTED = ("model", "state_dict")
"""Where training checkpoints hold the weights."""
MAX_TENSORS = 20_000
"""Of a file; no model has so many."""
_DIGEST_KEY = "proteus_cache_state_sha256"
_SAFETENSORS_DTYPE = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """`--weights random:SEED`."""

    seed: int

    def __str__(self) -> str:
        return f"random:{self.seed}"


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """Tensors that fit a model, and where they came from."""

    state: dict[str, Tensor]
    """float32 CPU tensors; they may be mapped from the file."""
    sha256: str
    """`state_digest` of `state`."""
    metadata: dict[str, str]
    """Of a safetensors file; empty for others."""


def parse_weights(text: str) -> RandomWeights | Path:
    """Read a `--weights` value.

    Raises:
        UsageError: `random:` without a whole number below 2**64.
    """
    kind, colon, rest = text.partition(":")
    if kind == "random" and colon:
        if not (rest.isascii() and rest.isdigit() and int(rest) < 2**64):
            raise UsageError(f"--weights {text}: the seed must be a whole number from 0, for example random:0")
        return RandomWeights(int(rest))
    return Path(text).expanduser()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (64 hex digits) over names, dtypes, shapes and bytes of the tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def load_weights(path: Path, home: Path, fit: Fit) -> LoadedWeights:
    """Read a local weights file into the tensors of a model.

    Args:
        path: `.safetensors`, or `.pth` / `.pt` / `.bin`, which is converted once.
        home: the folder `PROTEUS_HOME`; converted files go to `home/weights`.
        fit: maps and checks the names.

    Raises:
        WeightsError: no such file, another kind of file, a pickle with code, or weights of another model.
        ChecksumError: a converted file is not what was written.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; pass a .safetensors or .pth file, or random:SEED")
    if path.suffix == ".safetensors":
        return _load_safetensors(path, fit)
    if path.suffix not in _PICKLES:
        raise WeightsError(f"{path}: not a weights file by its name; pass a .safetensors or .pth file")
    _, source = storage.sha256_of(path)
    converted = home / "weights" / f"{source}.safetensors"
    if not converted.is_file():
        return convert_pickle(path, converted, fit, str(path))
    _log.info("reading weights converted=%s of=%s", converted, path.name)
    return _load_safetensors(converted, fit)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file as it names them, and its metadata; nothing is converted or written.

    A training checkpoint that holds its weights under `model` or `state_dict` gives those. Beside plain data its pickle
    may hold the program's arguments (argparse.Namespace, which runs no code): released Proteus checkpoints do.

    Raises:
        WeightsError: no such file, another kind of file, or a pickle with code.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; pass a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), read_metadata(path)
    if path.suffix not in _PICKLES:
        raise WeightsError(f"{path}: not a weights file by its name; pass a .safetensors or .pth file")
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = _load_pickle(path, str(path))
    nested = [loaded[name] for name in _NESTED if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
    return _plain_state(nested[0] if nested else loaded, str(path)), {}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        WeightsError: no such file, or not a safetensors file.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({_line(error)}); copy or fetch it again"
        ) from error


def fit_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str, hint: str = ""
) -> dict[str, Tensor]:
    """Check names, shapes and types, and return contiguous float32 tensors.

    Args:
        state: tensors under the model's names.
        shapes: what the model takes.
        what: the model, for the message.
        hint: which model the tensors look like, or empty.

    Raises:
        WeightsError: the first missing, unexpected and mis-shaped names.
    """
    problems = []
    if missing := sorted(shapes.keys() - state.keys()):
        problems.append(f"missing {_first(missing)}")
    if unexpected := sorted(state.keys() - shapes.keys()):
        problems.append(f"unexpected {_first(unexpected)}")
    for name in sorted(shapes.keys() & state.keys()):
        if tuple(state[name].shape) != shapes[name]:
            problems.append(f"{name} is {tuple(state[name].shape)} instead of {shapes[name]}")
            break
    if problems:
        raise WeightsError(f"these weights are not of {what}: {'; '.join(problems)}{f'; {hint}' if hint else ''}")
    for name in sorted(shapes):
        if state[name].dtype not in _SAFETENSORS_DTYPE or state[name].layout != torch.strided:
            raise WeightsError(f"tensor {name} is {state[name].dtype} ({state[name].layout}), not plain floating point")
    return {name: state[name].to(torch.float32).contiguous() for name in shapes}


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _load_safetensors(path: Path, fit: Fit) -> LoadedWeights:
    metadata = read_metadata(path)
    state = _fitted(_read_safetensors(path), str(path), fit)
    sha256 = state_digest(state)
    if metadata.get(_DIGEST_KEY, sha256) != sha256:
        raise ChecksumError(f"{path}: damaged (its tensors are not those that were written); remove it and run again")
    return LoadedWeights(state, sha256, metadata)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            if len(names) > MAX_TENSORS:
                raise WeightsError(f"{path}: holds {len(names):,} tensors, and no model has so many")
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:  # also shapes that are none
        raise WeightsError(
            f"{path}: not a readable safetensors file ({_line(error)}); copy or fetch it again"
        ) from error


def _fitted(raw: dict[str, Tensor], shown: str, fit: Fit) -> dict[str, Tensor]:
    try:
        return fit(raw)
    except WeightsError as error:
        raise WeightsError(f"{shown}: {error}") from error


def convert_pickle(path: Path, converted: Path, fit: Fit, shown: str) -> LoadedWeights:
    """Unpickle `path` under restrictions, write what fits as the safetensors file `converted`, and return it.

    Args:
        shown: what messages call `path`.
    """
    state = _fitted(_unpickle(path, shown), shown, fit)
    sha256 = state_digest(state)
    storage.make_folder(converted.parent)
    temp = converted.parent / storage.temp_name(converted.name)
    storage.write_new(temp, _safetensors_chunks(state, {_DIGEST_KEY: sha256}))
    storage.publish(temp, converted)
    _log.info("converted weights from=%s to=%s", shown, converted)
    return LoadedWeights(state, sha256, {})


def _unpickle(path: Path, shown: str) -> dict[str, Tensor]:
    return _plain_state(_load_pickle(path, shown), shown)


def _load_pickle(path: Path, shown: str) -> Any:  # Any: whatever it holds; `_plain_state` checks it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickle protocols is no news to a user
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{shown}: refused, its pickle holds something other than plain tensors (possibly code to run): "
            f"{_wanted(error)}; use the official file, or convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise WeightsError(
            f"{shown}: not a readable PyTorch weights file ({type(error).__name__}: {_line(error)}); copy or fetch it "
            "again"
        ) from error


def _plain_state(loaded: object, shown: str) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise WeightsError(f"{shown}: holds a {type(loaded).__name__}, not a state dict (name -> tensor)")
    other = sorted(name for name, value in loaded.items() if not isinstance(value, Tensor))
    if other:
        raise WeightsError(
            f"{shown}: not a plain state dict: {other[0]!r} is no tensor; save the backbone's weights alone"
        )
    return {name: value.detach() for name, value in loaded.items()}


def _wanted(error: pickle.UnpicklingError) -> str:
    """The one line of torch's long message that names what the pickle asked for."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line or "Trying to" in line]
    return (named or lines)[0].rstrip(".")[:200]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _safetensors_chunks(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece, so that no second copy of the weights is held."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(state):
        tensor = state[name]
        end = offset + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(state):
        yield _bytes_of(state[name])
