"""Canonical JSON documents that prove themselves: manifest, receipts, pack.json, checkpoints.

A document is one JSON object in canonical form (UTF-8, keys sorted, no spaces, no NaN) whose last key is
`digest`: the SHA-256 of the same object's canonical bytes without it. A newline ends the file. Reading is strict:
duplicate keys, NaN, whole numbers beyond 64 bits, deep nesting, too many values, long input, another digest or another
spelling of the same values are refused before a value is used. What is read has one spelling, so it seals to the same
bytes again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from itertools import accumulate
from typing import Annotated, Any, ClassVar, NoReturn, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proteus_cache.errors import ChecksumError, FormatError

MAX_DOCUMENT_BYTES = 32 << 20
MAX_VALUES = 1 << 20
"""Values, counted by their commas and brackets. A pack.json of 100,000 tars has half as many, in 25 MB."""
_MAX_CONTAINERS = 1 << 17
_MAX_KEYS = 1 << 14
"""Of one object; a pack has at most 10,000 view indices."""
_MAX_KEYS_IN_ALL = 1 << 19
_MAX_QUOTES = 2 * (MAX_VALUES + _MAX_KEYS_IN_ALL)
_MAX_DEPTH = 16
_MAX_INT = 1 << 63
# Possessive, and an open string runs to the end: no input makes it go back.
_NOT_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[^][{}"]++', re.DOTALL)
_COPY = "; copy it again from where it came from"
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
    tail = data[-len(_TAIL) :]
    if tail[:11] != _TAIL[:11] or tail[-3:] != _TAIL[-3:]:
        raise FormatError(
            f"{what}: not a complete document, but cut short or another file (it does not end with its digest){_COPY}"
        )
    state = hashlib.sha256(memoryview(data)[: -len(_TAIL)])
    state.update(b"}")
    found = state.hexdigest()
    if found.encode() != tail[11:-3]:
        raise ChecksumError(
            f"{what}: damaged (its bytes have digest {found[:12]}, it says {digest_of(data)[:12]!a}){_COPY}"
        )
    return found


def parse_sealed(data: bytes, what: str) -> dict[str, Any]:
    """Check sealed bytes and return the object without its digest.

    Raises:
        ChecksumError: the bytes are not those that were sealed.
        FormatError: not a document, or one that is too large, too deep or ambiguous.
    """
    check_seal(data, what)
    body = _body(data)
    value = strict_json(body, what)
    _check_spelling(value, body, what)
    return value


def _body(data: bytes) -> bytearray:
    """What was sealed."""
    body = bytearray(memoryview(data)[: -len(_TAIL)])
    body += b"}"
    return body


def _check_spelling(value: dict[str, Any], body: bytearray, what: str) -> None:
    try:
        is_canonical = canonical(value) == body
    except UnicodeEncodeError:  # half of a surrogate pair
        is_canonical = False
    if not is_canonical:
        raise FormatError(f"{what}: not in canonical form, so another program wrote or changed it")


def strict_json(data: bytes | bytearray, what: str) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        FormatError: duplicate keys, NaN, whole numbers beyond 64 bits, nesting over 16 levels, too many values, or a
            value that is not an object.
    """
    n_containers, n_ends = data.count(b"[") + data.count(b"{"), data.count(b"]") + data.count(b"}")
    n_values = n_containers + data.count(b",")
    is_too_much = max(n_containers, n_ends) > _MAX_CONTAINERS or data.count(b'":') > _MAX_KEYS_IN_ALL
    if is_too_much or n_values > MAX_VALUES or data.count(b'"') > _MAX_QUOTES:
        raise FormatError(f"{what}: holds more values than a document may")
    if _depth(data) > _MAX_DEPTH:
        raise FormatError(f"{what}: nested more than {_MAX_DEPTH} levels deep")
    try:
        value = json.loads(
            str(data, "utf-8"),  # bytes would be taken as UTF-16 where they look so
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_of_64_bits,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what}: not a JSON object")
    return value


def _depth(data: bytes | bytearray) -> int:
    """Largest bracket nesting outside strings."""
    depths = accumulate(1 if bracket in b"[{" else -1 for bracket in _NOT_BRACKET.sub(b"", data))
    return max(depths, default=0)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise ValueError("an object has too many keys")
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _of_64_bits(text: str) -> int:
    if len(text) > 20 or not -_MAX_INT <= (number := int(text)) < _MAX_INT:
        raise ValueError(f"the whole number {text[:24]} is too large")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:24]} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


T = TypeVar("T")
Column: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
"""A list of any length: the first bad item is reported, not a million of them."""
Text: TypeAlias = Annotated[str, Field(max_length=4096)]
"""A name or a sentence."""
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Crc32c: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 32)]
Notes: TypeAlias = Annotated[dict[Text, Text], Field(max_length=1000)]
"""Names and what there is to say of each, for example versions of libraries."""


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
        check_seal(data, what)
        body = _body(data)
        strict_json(body, what)  # which pydantic's own parser is not
        try:
            document = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part)[:80] for part in first["loc"]) or "document"
            raise FormatError(f"{what}: {where}: {first['msg']}") from error
        _check_spelling(document.model_dump(mode="json", exclude_unset=True), body, what)
        return document
