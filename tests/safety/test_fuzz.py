"""F1 and F2: mutations of documents, index records, metadata, codec parameters and tars.

Whatever is refused is refused with a typed error; whatever is read comes back as the same bytes, and a tar that is read
holds for Python's own reader exactly the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from proteus_cache import tar
from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.reader import open_cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.writer import wanted_metadata
from proteus_cache.cache.zarr_arrays import check_metadata
from proteus_cache.codecs import fit_codec, load_codec
from proteus_cache.documents import Document, canonical, parse_sealed, seal, strict_json
from proteus_cache.errors import DamageError
from proteus_cache.pack.document import PackDocument
from proteus_cache.pack.index import RECORD, Index, index_header, seal_records
from tests.safety.hostile_tars import honest, sealed

N_DOCUMENTS = 2_000
"""F1: mutations of documents, index records, zarr.json and codec parameters together, in CI."""
N_DOCUMENTS_NIGHTLY = 100_000
N_TARS = 5_000
"""F2: mutations of tars, in CI."""
N_TARS_NIGHTLY = 500_000
_TARGETS = 5
"""What the examples of F1 are shared by, in equal parts: three documents, zarr.json and codec parameters; and
as many of index records as of one of them come on top."""

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(
        ["../x", "/etc/passwd", "a\\b", "a\0b", "v000\n", "\u202e", "0" * 64, "block.1", "probe", "klt:1dB"]
    ),
    st.lists(st.integers(-5, 5), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
_DRAWS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 4), _VALUES), min_size=1, max_size=3)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and item of a JSON value."""
    found = []
    steps = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for step in steps:
        found += [(*path, step), *_places(value[step], (*path, step))]
    return found


def mutated(value: dict[str, Any], draws: list[tuple[int, int, Any]]) -> dict[str, Any]:
    """A copy with some places replaced, removed, doubled, renamed or added to."""
    changed: dict[str, Any] = json.loads(json.dumps(value))
    for where, how, new in draws:
        places = _places(changed)
        if not places:
            break
        *above, step = places[where % len(places)]
        holder: Any = changed
        for part in above:
            holder = holder[part]
        if how == 0:
            holder[step] = new
        elif how == 1:
            del holder[step]
        elif how == 2 and isinstance(holder, list):
            holder.insert(step, holder[step])
        elif how == 3 and isinstance(holder, dict):
            holder[str(new)] = holder.pop(step)
        elif isinstance(holder, dict):
            holder[f"x{where % 7}"] = new
        else:
            holder.append(new)
    return changed


def _sealed_as_it_is(value: dict[str, Any]) -> bytes:
    value.pop("digest", None)
    if not value:
        return b"{}"
    try:
        return seal(value)
    except UnicodeEncodeError:
        body = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        return body[:-1] + b',"digest":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def _only_typed(read: Callable[[], Any]) -> Any:
    """The result, or None where it was refused with an error of ours."""
    try:
        return read()
    except DamageError as error:
        message = str(error)
    assert message.isprintable()
    return None


def _f1(n_examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    found: Callable[[Callable[..., None]], Callable[..., None]] = settings(
        max_examples=n_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return found


def _fuzz_document(kind: type[Document], data: bytes, n_examples: int) -> None:
    value = parse_sealed(data, "honest")

    @_f1(n_examples)
    @given(_DRAWS)
    def attack(draws: list[tuple[int, int, Any]]) -> None:
        hostile = _sealed_as_it_is(mutated(value, draws))
        document = _only_typed(lambda: kind.parse(hostile, "hostile.json"))
        if document is not None:
            assert seal(document.model_dump(mode="json", exclude_unset=True)) == hostile

    attack()


def _fuzz_metadata(cache: Path, n_examples: int) -> None:
    wanted = wanted_metadata(open_cache(cache).manifest, "v000")
    right = next(data for path, data in wanted.items() if path.endswith("patch/zarr.json"))
    value = json.loads(right)

    @_f1(n_examples)
    @given(_DRAWS)
    def attack(draws: list[tuple[int, int, Any]]) -> None:
        hostile = json.dumps(mutated(value, draws)).encode()

        def read() -> bool:
            check_metadata(hostile, right, "zarr.json")
            return True

        if _only_typed(read):
            assert canonical(strict_json(hostile, "zarr.json")) == canonical(value)

    attack()


def _fuzz_parameters(n_examples: int) -> None:
    torch.manual_seed(0)
    codecs = [fit_codec(name, torch.randn(64, 16, 12)) for name in ("int8", "int4", "klt:12dB")]
    stored = [(codec.record(), codec.parameters_blob()) for codec in codecs]

    @_f1(n_examples)
    @given(
        st.integers(0, len(stored) - 1),
        st.lists(st.tuples(st.integers(0, 2**20), st.binary(max_size=8)), max_size=3),
        st.integers(0, 6),
    )
    def attack(which: int, patches: list[tuple[int, bytes]], how: int) -> None:
        record, blob = stored[which]
        assert blob is not None
        hostile = bytearray(blob)
        if how < 3:  # the values of a tensor, through safetensors' own writer
            tensors = load(blob)
            name = sorted(tensors)[how % len(tensors)]
            flat = tensors[name].reshape(-1)
            for at, data in patches:
                flat[at % flat.numel()] = torch.frombuffer(bytearray(data.ljust(8, b"\xff")), dtype=torch.float32)[
                    0
                ].to(flat.dtype)
            if how == 2:
                tensors[name] = flat[: max(1, flat.numel() // 2)].clone()
            hostile = bytearray(save(tensors))
        else:
            for at, data in patches:
                place = at % len(hostile)
                hostile[place : place + (len(data) if how < 5 else 0)] = data
        digest = hashlib.sha256(hostile).hexdigest()
        changed = record.model_copy(update={"parameters": digest})
        codec = _only_typed(lambda: load_codec(changed, (16, 12), bytes(hostile)))
        if codec is not None:
            codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, record.code_bytes), dtype=np.uint8))
            assert codec.decode(codes).shape == (2, 16, 12)

    attack()


def _fuzz_records(folder: Path, n_examples: int) -> None:
    n_records, code_bytes = 4, 60
    records = np.zeros(n_records, dtype=RECORD)
    places = 512 + 4096 * np.arange(n_records)
    records["row"], records["codes_offset"], records["codes_size"] = np.arange(n_records), places, code_bytes
    records["view_offset"], records["view_size"] = places + 1024, 700
    records["json_offset"], records["json_size"] = places + 1024 + 1536, 300
    path = folder / "v000.idx"
    numbers = np.arange(n_records)
    tar_sizes = [512 + 4096 * (n_records - 1) + 1024 + 1536 + 512 + 1024]

    @_f1(n_examples)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, n_records - 1), st.sampled_from((RECORD.names or ())[:-1]), st.integers(0, 2**64 - 1)
            ),
            max_size=2,
        ),
        st.lists(st.tuples(st.integers(0, 64 * (n_records + 1) - 1), st.integers(0, 255)), max_size=2),
    )
    def attack(fields: list[tuple[int, str, int]], flips: list[tuple[int, int]]) -> None:
        hostile = records.copy()
        for row, name, new in fields:
            hostile[name][row] = new & (2 ** (8 * RECORD[name].itemsize) - 1)
        data = bytearray(index_header(0, n_records, 1, code_bytes) + seal_records(hostile).tobytes())
        for at, byte in flips:
            data[at] = byte
        path.write_bytes(data)

        def read() -> Any:
            index = Index(path, 0, n_records, 1, code_bytes)
            found = index.read(numbers)
            index.check_places(tar_sizes)
            return found

        found = _only_typed(read)
        if found is not None:
            assert index_header(0, n_records, 1, code_bytes) + found.tobytes() == bytes(data)
            assert all(
                (found[name] == records[name]).all() for name in ("tar", "codes_offset", "view_offset", "json_offset")
            )

    attack()


def _fuzz_documents(cache: Path, pack: Path, scratch: Path, n_examples: int) -> None:
    each = n_examples // _TARGETS
    _fuzz_document(Manifest, (cache / "manifest.json").read_bytes(), each)
    _fuzz_document(Receipt, (cache / "receipts" / "v000" / "s00000.json").read_bytes(), each)
    _fuzz_document(PackDocument, (pack / "pack.json").read_bytes(), each)
    _fuzz_metadata(cache, each)
    _fuzz_parameters(each)
    _fuzz_records(scratch, each)


_FILES = [
    ("a_0123456789.jpg", b"x" * 700),
    ("a_0123456789.json", b"{}\n"),
    ("b_0123456789.jpg", b""),
    ("b_0123456789.json", b"y" * 512),
]
_FIELDS = [
    (0, 100),
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (148, 8),
    (156, 1),
    (157, 100),
    (257, 8),
    (265, 32),
    (345, 155),
]
_FILLS = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            b"00000000000\0",
            b"77777777777\0",
            b"\x80" + b"\xff" * 11,
            b"../x.jpg",
            b"x",
            b"L",
            b"5",
            b"0",
            b"\0",
            b"/",
            b"a.jpg\0",
        ]
    ),
)


def _fuzz_tars(n_examples: int) -> int:
    """Returns how many mutations were accepted."""
    good = honest(_FILES)
    heads = [0, 512 + 1024, 512 + 1024 + 512 + 512, 512 + 1024 + 512 + 512 + 512]
    accepted = 0

    @_f1(n_examples)
    @given(
        st.lists(st.tuples(st.integers(0, len(heads) - 1), st.integers(0, len(_FIELDS) - 1), _FILLS), max_size=2),
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=3),
        st.booleans(),
        st.one_of(st.just(0), st.just(0), st.integers(-1024, 1024)),
    )
    def attack(
        fields: list[tuple[int, int, bytes]], bytes_: list[tuple[int, int]], is_resealed: bool, length: int
    ) -> None:
        nonlocal accepted
        data = bytearray(good)
        for head, field, fill in fields:
            start, size = _FIELDS[field]
            data[heads[head] + start : heads[head] + start + min(size, len(fill))] = fill[:size]
        for at, byte in bytes_:
            data[at] = byte
        for head in heads if is_resealed else ():
            data[head : head + 512] = sealed(bytes(data[head : head + 512]))
        hostile = bytes(data[: len(data) + length] if length < 0 else data + bytes(length))
        found = _only_typed(lambda: list(tar.members(io.BytesIO(hostile), len(hostile), "hostile.tar", 10)))
        if found is not None:
            accepted += 1
            ours = [(member.name, hostile[member.offset : member.offset + member.size]) for member in found]
            assert ours == _by_python(hostile)
            assert honest(ours) == hostile

    attack()
    return accepted


def _by_python(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as file:
        members = file.getmembers()
        assert all(member.isreg() and not member.pax_headers for member in members)
        return [(member.name, file.extractfile(member).read()) for member in members]  # type: ignore[union-attr]


def test_mutated_documents_are_refused_or_come_back_as_they_were(
    honest_cache: Path, honest_pack: Path, tmp_path: Path
) -> None:
    _fuzz_documents(honest_cache, honest_pack, tmp_path, N_DOCUMENTS)


@pytest.mark.nightly
def test_many_mutated_documents(honest_cache: Path, honest_pack: Path, tmp_path: Path) -> None:
    _fuzz_documents(honest_cache, honest_pack, tmp_path, N_DOCUMENTS_NIGHTLY)


def test_mutated_tars_are_refused_or_read_as_python_reads_them() -> None:
    accepted = _fuzz_tars(N_TARS)

    assert N_TARS // 100 < accepted < N_TARS  # both happen often enough to say something


@pytest.mark.nightly
def test_many_mutated_tars() -> None:
    assert _fuzz_tars(N_TARS_NIGHTLY) > 0
