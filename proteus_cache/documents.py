"""Canonical JSON documents that prove themselves: manifest, receipts, pack.json, checkpoints.

A document is one JSON object in canonical form (UTF-8, keys sorted, no spaces, no NaN) whose last key is
`digest`: the SHA-256 of the same object's canonical bytes without it. A newline ends the file. Reading is strict:
duplicate keys, NaN, deep nesting, long input or another digest are refused before a value is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from itertools import accumulate
from typing import Any, ClassVar, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from proteus_cache.errors import ChecksumError, FormatError

MAX_DOCUMENT_BYTES = 64 << 20
_MAX_DEPTH = 16
_NOT_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[^][{}"]+')
_TAIL = b',"digest":"' + b"0" * 64 + b'"}\n'


def canonical(value: dict[str, Any]) -> bytes:
    """Canonical JSON bytes of an object: sorted keys, no spaces, UTF-8, shortest round-trip floats."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def seal(value: dict[str, Any]) -> bytes:
    """The file bytes of a document: `value` in canonical form, its digest as last key, a newline."""
    if not value or "digest" in value:
        raise ValueError("a document holds at least one key, and its digest is added here")
    body = canonical(value)
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + b',"digest":"' + digest.encode() + b'"}\n'


def digest_of(data: bytes) -> str:
    """The digest that sealed bytes carry, unchecked: 64 hex digits."""
    return data[-67:-3].decode("ascii", errors="replace")


def check_seal(data: bytes, what: str) -> str:
    """Check sealed bytes without parsing them; returns their digest, 64 hex digits.

    Args:
        data: the file's bytes.
        what: file or sample, for the message.

    Raises:
        ChecksumError: the bytes are not those that were sealed.
        FormatError: not a document, or one that is too large.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise FormatError(f"{what}: larger than a document may be ({len(data):,} bytes)")
    body, tail = data[: -len(_TAIL)], data[-len(_TAIL) :]
    if tail[:11] != _TAIL[:11] or tail[-3:] != _TAIL[-3:]:
        raise FormatError(
            f"{what}: not a complete document (it does not end with its digest); it was cut short or is another file: "
            "copy it again from where it came from"
        )
    found = hashlib.sha256(body + b"}").hexdigest()
    if found.encode() != tail[11:-3]:
        raise ChecksumError(f"{what}: damaged (its bytes have digest {found[:12]}, it says {digest_of(data)[:12]!a})")
    return found


def parse_sealed(data: bytes, what: str) -> dict[str, Any]:
    """Check sealed bytes and return the object without its digest.

    Raises:
        ChecksumError: the bytes are not those that were sealed.
        FormatError: not a document, or one that is too large, too deep or ambiguous.
    """
    check_seal(data, what)
    return strict_json(data[: -len(_TAIL)] + b"}", what)


def strict_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object; refuse duplicate keys, NaN, nesting over 16 levels and values that are not an object."""
    if _depth(data) > _MAX_DEPTH:
        raise FormatError(f"{what}: nested more than {_MAX_DEPTH} levels deep")
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what}: not a JSON object")
    return value


def _depth(data: bytes) -> int:
    """Largest bracket nesting outside strings."""
    depths = accumulate(1 if bracket in b"[{" else -1 for bracket in _NOT_BRACKET.sub(b"", data))
    return max(depths, default=0)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


class Document(BaseModel):
    """Base of every record that crosses a process or machine border: frozen, unknown keys refused, strict types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True)

    def sealed(self) -> bytes:
        """The file bytes of this document."""
        return seal(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: bytes, what: str) -> Self:
        """Check and read sealed bytes.

        Raises:
            ChecksumError, FormatError: as `parse_sealed`, or a field is missing, unknown or of another type.
        """
        parse_sealed(data, what)  # strict JSON, which pydantic's own parser is not
        try:
            return cls.model_validate_json(data[: -len(_TAIL)] + b"}")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise FormatError(f"{what}: {where}: {first['msg']}") from error
