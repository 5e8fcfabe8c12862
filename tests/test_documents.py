"""documents: canonical, self-proving, strict."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_cache.documents import Document, canonical, digest_of, parse_sealed, seal, strict_json
from proteus_cache.errors import ChecksumError, DamageError, FormatError

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class _Point(Document):
    x: int
    name: str


def test_the_digest_is_last_and_of_the_other_bytes() -> None:
    data = seal({"b": 1, "a": [1.5, "ü"]})

    body = b'{"a":[1.5,"\xc3\xbc"],"b":1}'
    digest = hashlib.sha256(body).hexdigest()
    assert data == body[:-1] + f',"digest":"{digest}"}}\n'.encode()
    assert digest_of(data) == digest
    assert json.loads(data)["digest"] == digest


@given(st.dictionaries(st.text().filter(lambda key: key != "digest"), _VALUES, min_size=1, max_size=5))
def test_sealed_values_come_back(value: dict[str, object]) -> None:
    assert parse_sealed(seal(value), "x.json") == value


def test_every_flipped_bit_is_found() -> None:
    data = seal({"x": 3, "name": "seven", "list": [1, 2]})

    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(DamageError, match="x.json"):
                parse_sealed(bytes(damaged), "x.json")


@pytest.mark.parametrize("cut", [0, 1, 10, 66, 67, 80])
def test_a_document_that_was_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(DamageError):
        parse_sealed(seal({"x": 3, "name": "a longer name to cut into"})[:cut], "x.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a":1,"a":2}', "occurs twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "too large"),
        (b"[1]", "not a JSON object"),
        (b'{"a":' + b"[" * 20 + b"]" * 20 + b"}", "nested"),
        (b'{"a":' + b"[" * 100_000 + b"}", "nested"),
        (b'{"a":1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_strict_json_refuses(text: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        strict_json(text, "x.json")


def test_brackets_in_strings_do_not_count_as_depth() -> None:
    assert strict_json(canonical({"a": "[" * 100 + '\\"{' * 50}), "x.json") == {"a": "[" * 100 + '\\"{' * 50}


def test_a_document_refuses_unknown_missing_and_mistyped_fields() -> None:
    assert _Point.parse(_Point(x=1, name="n").sealed(), "p.json") == _Point(x=1, name="n")

    for value, reason in (
        ({"x": 1, "name": "n", "y": 2}, "y: Extra inputs"),
        ({"x": 1}, "name: Field required"),
        ({"x": "1", "name": "n"}, "x: Input should be a valid integer"),
    ):
        with pytest.raises(FormatError, match=reason):
            _Point.parse(seal(value), "p.json")


def test_a_digest_of_other_bytes_is_a_checksum_error() -> None:
    data = seal({"x": 1, "name": "n"})

    with pytest.raises(ChecksumError, match="p.json: damaged"):
        parse_sealed(data.replace(b'"x":1', b'"x":2'), "p.json")
