"""Codecs: teacher tokens to packed integers and back, with a stated error.

    codec = fit_codec("int8", tokens)          # once, on calibration views
    codes = codec.encode(tokens)               # (B, *shape) float -> (B, code_bytes) uint8
    tokens = codec.decode(codes)               # and back, float32

Codecs are torch modules: torch in, torch out, on the device of their buffers. The codes of one view have one
fixed size. What must be remembered is a `CodecRecord` and, for fitted codecs, a safetensors blob that it names by
SHA-256. Codecs know nothing of stores.

The names below are imported when they are first used, so that `codecs.names` costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_cache.codecs.calibration import CalibrationReport
    from proteus_cache.codecs.codec import Basis, Codec, fit_codec, load_codec
    from proteus_cache.codecs.dense import DenseCodec
    from proteus_cache.codecs.int4 import Int4Codec
    from proteus_cache.codecs.klt import KltCodec
    from proteus_cache.codecs.names import codec_for_target
    from proteus_cache.codecs.record import CodecRecord
    from proteus_cache.codecs.scalar import Int8Codec

_HOMES = {
    "Basis": "codec",
    "CalibrationReport": "calibration",
    "Codec": "codec",
    "CodecRecord": "record",
    "DenseCodec": "dense",
    "Int4Codec": "int4",
    "Int8Codec": "scalar",
    "KltCodec": "klt",
    "codec_for_target": "names",
    "fit_codec": "codec",
    "load_codec": "codec",
}
__all__ = [
    "Basis",
    "CalibrationReport",
    "Codec",
    "CodecRecord",
    "DenseCodec",
    "Int4Codec",
    "Int8Codec",
    "KltCodec",
    "codec_for_target",
    "fit_codec",
    "load_codec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
