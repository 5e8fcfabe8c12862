"""Fitted parameters as safetensors: strict reading, since a pack and its parameters are what others send."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from proteus_cache.errors import FormatError


def load_parameters(codec: str, blob: bytes, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a blob.

    Args:
        codec: for messages.
        blob: of the store, its digest checked.
        dtypes: name to the type of every tensor that there has to be.

    Raises:
        FormatError: not safetensors, other tensors, of other types, or numbers that are not finite.
    """
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"codec {codec}: its parameters are not a safetensors file ({error})") from error
    if set(tensors) != set(dtypes):
        raise FormatError(f"codec {codec}: parameters hold {sorted(tensors)}, not {', '.join(dtypes)}")
    check_tensors(codec, tensors, dtypes)
    return tensors


def check_tensors(codec: str, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse tensors of another type, or with numbers that are not finite.

    Raises:
        FormatError: names the tensor.
    """
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype:
            raise FormatError(f"codec {codec}: {name} is {tensors[name].dtype} in the parameters, not {dtype}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise FormatError(f"codec {codec}: {name} holds numbers that are not finite")


def check_shapes(codec: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of another shape.

    Raises:
        FormatError: names the tensor.
    """
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"codec {codec}: {name} is {tuple(tensors[name].shape)} in the parameters, not {shape}")
