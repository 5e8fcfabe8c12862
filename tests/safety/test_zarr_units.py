"""S2: hostile Zarr units. Metadata of v2 are refused wherever they lie, `zarr.json` must be exactly ours, and the bytes
of a Zarr shard file meet our own reader: no codec of Zarr ever runs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from proteus_cache.cache.layout import zarr_shard
from proteus_cache.cache.reader import open_cache
from proteus_cache.pack.index import crc32c
from tests.safety import readers
from tests.safety.guarded import Attack, check, run_guarded
from tests.safety.stores import copied, with_cache_files

N_UNITS = 30
"""Hostile units, at least."""
_ARRAY = "targets.zarr/v000/patch"
_JSON = f"{_ARRAY}/zarr.json"
_CLS = zarr_shard("v000", "cls", 0, 2)
_PATCH = zarr_shard("v000", "patch", 0, 2)
_ROWS = 4
_PICKLE = {"id": "pickle", "protocol": 5}
_ZARRAY = {
    "zarr_format": 2,
    "shape": [6, 400],
    "chunks": [4, 400],
    "dtype": "|u1",
    "compressor": None,
    "fill_value": 0,
    "order": "C",
    "filters": None,
}

Change = Callable[[Path], None]


def _v2(relative: str, **fields: object) -> Change:
    """Metadata of Zarr v2 beside ours."""

    def apply(root: Path) -> None:
        (root / relative).write_text(json.dumps(_ZARRAY | fields))

    return apply


def _json(change: Callable[[dict[str, Any]], object], relative: str = _JSON) -> Change:
    """Another zarr.json, which the receipts say is right."""

    def apply(root: Path) -> None:
        value = json.loads((root / relative).read_bytes())
        change(value)
        for shard in (0, 1):
            with_cache_files(root, {relative: json.dumps(value).encode()}, shard)

    return apply


def _raw(data: bytes, relative: str = _JSON) -> Change:
    def apply(root: Path) -> None:
        for shard in (0, 1):
            with_cache_files(root, {relative: data}, shard)

    return apply


def _shard(relative: str, change: Callable[[list[bytes]], list[bytes]]) -> Change:
    """Other chunks in a Zarr shard file: its index, checksums and the receipt say that they are right."""

    def apply(root: Path) -> None:
        data = (root / relative).read_bytes()
        index = np.frombuffer(data[-16 * _ROWS - 4 : -4], dtype="<u8").reshape(_ROWS, 2).tolist()
        chunks = change([data[start : start + size - 4] for start, size in index])
        body, table = b"", b""
        for chunk in chunks:
            table += struct.pack("<QQ", len(body), len(chunk) + 4)
            body += chunk + crc32c(chunk).to_bytes(4, "little")
        with_cache_files(root, {relative: body + table + crc32c(table).to_bytes(4, "little")})

    return apply


def _index(change: Callable[[list[list[int]]], object]) -> Change:
    """Another index in a Zarr shard file, its checksum right."""

    def apply(root: Path) -> None:
        data = (root / _PATCH).read_bytes()
        index = np.frombuffer(data[-16 * _ROWS - 4 : -4], dtype="<u8").reshape(_ROWS, 2).tolist()
        change(index)
        table = b"".join(struct.pack("<QQ", *entry) for entry in index)
        with_cache_files(root, {_PATCH: data[: -len(table) - 4] + table + crc32c(table).to_bytes(4, "little")})

    return apply


def _link(relative: str, to: str) -> Change:
    def apply(root: Path) -> None:
        (root / relative).unlink()
        os.symlink(to, root / relative)

    return apply


def _folder(relative: str) -> Change:
    def apply(root: Path) -> None:
        (root / relative).unlink()
        (root / relative).mkdir()

    return apply


def _pipe(relative: str) -> Change:
    def apply(root: Path) -> None:
        (root / relative).unlink()
        os.mkfifo(root / relative)

    return apply


def _codecs(*names: str) -> Change:
    return _json(lambda value: value.update(codecs=[{"name": name, "configuration": {}} for name in names]))


def _linked(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    os.symlink("elsewhere", folder)


def _extra(folder: Path) -> None:
    folder.mkdir()
    (folder / "0").write_bytes(b"x")


def _inner(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["codecs"][0]["configuration"]
    return found


def _frame(size: int) -> bytes:
    """A zstd frame that unpacks to so many zeros."""
    return bytes(Zstd(level=19).encode(bytes(size)))


def _declares(frame: bytes, size: int) -> bytes:
    """The frame with another content size in its header."""
    return frame[:4] + b"\xa0" + size.to_bytes(4, "little") + frame[4 + 1 + 4 :]


_OLD: dict[str, Change] = {
    "v2 pickle as compressor": _v2(f"{_ARRAY}/.zarray", compressor=_PICKLE),
    "v2 pickle as filter": _v2(f"{_ARRAY}/.zarray", filters=[_PICKLE]),
    "v2 pickle as second filter": _v2(f"{_ARRAY}/.zarray", filters=[{"id": "delta", "dtype": "|u1"}, _PICKLE]),
    "v2 pickle of objects": _v2(f"{_ARRAY}/.zarray", dtype="|O", filters=[_PICKLE]),
    "v2 pickle in consolidated metadata": _v2(
        "targets.zarr/.zmetadata", metadata={"v000/patch/.zarray": _ZARRAY | {"filters": [_PICKLE]}}
    ),
    "v2 pickle in another target": _v2("targets.zarr/v000/cls/.zarray", filters=[_PICKLE]),
    "v2 group at the root": _v2("targets.zarr/.zgroup"),
    "v2 group of a view index": _v2("targets.zarr/v000/.zgroup"),
    "v2 attributes": _v2(f"{_ARRAY}/.zattrs"),
}
_METADATA: dict[str, Change] = {
    "an unknown codec": _codecs("evil"),
    "a codec of numcodecs": _codecs("numcodecs.pickle"),
    "another codec of Zarr": _codecs("bytes", "gzip"),
    "no codec": _codecs(),
    "sharding in sharding": _json(
        lambda value: _inner(value)["codecs"].insert(0, json.loads(json.dumps(value["codecs"][0])))
    ),
    "a pickle codec in sharding": _json(lambda value: _inner(value)["codecs"].append({"name": "pickle"})),
    "an index codec that runs code": _json(lambda value: _inner(value).update(index_codecs=[{"name": "pickle"}])),
    "an index at the start": _json(lambda value: _inner(value).update(index_location="start")),
    "a giant chunk": _json(lambda value: _inner(value).update(chunk_shape=[1 << 40, 1 << 40])),
    "a giant shape": _json(lambda value: value.update(shape=[1 << 62, 400])),
    "a negative shape": _json(lambda value: value.update(shape=[-1, 400])),
    "a shape of true": _json(lambda value: value.update(shape=[6.0, *value["shape"][1:]])),
    "another fill value": _json(lambda value: value.update(fill_value=1)),
    "a fill value of NaN": _raw(b'{"zarr_format":3,"fill_value":NaN}'),
    "a fill value of bytes": _json(lambda value: value.update(fill_value="AAAA")),
    "another type": _json(lambda value: value.update(data_type="object")),
    "a type of an extension": _json(lambda value: value.update(data_type={"name": "pickle", "configuration": {}})),
    "a storage transformer": _json(lambda value: value.update(storage_transformers=[{"name": "evil"}])),
    "other chunk keys": _json(lambda value: value.update(chunk_key_encoding={"name": "v2"})),
    "attributes": _json(lambda value: value.update(attributes={"path": "../../etc"})),
    "consolidated metadata": _json(lambda value: value.update(consolidated_metadata={"metadata": {}})),
    "format 2 in zarr.json": _json(lambda value: value.update(zarr_format=2)),
    "a key twice": _raw(b'{"zarr_format":3,"zarr_format":3}'),
    "nested deeply": _raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number without end": _raw(b'{"zarr_format":3' + b"0" * 100_000 + b"}"),
    "a list": _raw(b"[]"),
    "a group instead of an array": _raw(b'{"attributes":{},"node_type":"group","zarr_format":3}'),
    "another group": _raw(b'{"attributes":{},"node_type":"array","zarr_format":3}', "targets.zarr/v000/zarr.json"),
    "zarr.json too long": _raw(b" " * (2 << 20)),
    "zarr.json as a link": _link(_JSON, "/etc/passwd"),
    "zarr.json as a folder": _folder(_JSON),
    "zarr.json as a pipe": _pipe(_JSON),
    "an extra shard file": lambda root: _extra(root / _ARRAY / "c" / "9"),
}
_BYTES: dict[str, Change] = {
    "an array as a link": lambda root: _linked(root / _ARRAY),
    "a shard file as a link": _link(_PATCH, "/etc/passwd"),
    "a shard file as an endless device": _link(_PATCH, "/dev/zero"),
    "a shard file as a pipe": _pipe(_PATCH),
    "a shard file as a folder": _folder(_PATCH),
    "no shard file": lambda root: (root / _PATCH).unlink(),
    "a bomb of zstd": _shard(_CLS, lambda chunks: [_frame(1 << 28), *chunks[1:]]),
    "a bomb that declares little": _shard(_CLS, lambda chunks: [_declares(_frame(1 << 28), 48), *chunks[1:]]),
    "a frame without size": _shard(_CLS, lambda chunks: [b"\x28\xb5\x2f\xfd\x00\x58" + b"\0" * 20, *chunks[1:]]),
    "two frames": _shard(_CLS, lambda chunks: [chunks[0] + _frame(1 << 28), *chunks[1:]]),
    "a skippable frame": _shard(_CLS, lambda chunks: [b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + chunks[0], *chunks[1:]]),
    "a frame with a dictionary": _shard(_CLS, lambda chunks: [chunks[0][:4] + b"\x23" + chunks[0][5:], *chunks[1:]]),
    "no frame": _shard(_CLS, lambda chunks: [b"pickle", *chunks[1:]]),
    "an empty chunk": _shard(_PATCH, lambda chunks: [b"", *chunks[1:]]),
    "a short chunk": _shard(_PATCH, lambda chunks: [chunks[0][:-1], *chunks[1:]]),
    "a long chunk": _shard(_PATCH, lambda chunks: [chunks[0] + b"x", *chunks[1:]]),
    "a missing chunk": _index(lambda index: index.__setitem__(0, [2**64 - 1, 2**64 - 1])),
    "swapped chunks": _shard(_PATCH, lambda chunks: [chunks[1], chunks[0], *chunks[2:]]),
    "overlapping chunks": _index(lambda index: index[1].__setitem__(0, 0)),
    "a chunk behind the end": _index(lambda index: index[3].__setitem__(1, 1 << 40)),
    "a chunk at 2^63": _index(lambda index: index[0].__setitem__(0, 1 << 63)),
}


_UNITS = _OLD | _METADATA | _BYTES


def _read(root: Path) -> None:
    cache = open_cache(root)
    for target in cache.manifest.targets:
        for shard in cache.units("v000"):
            cache.read_codes("v000", shard, target.name)


def test_hostile_units_are_refused_before_any_codec_runs(honest_cache: Path, tmp_path: Path) -> None:
    assert len(_UNITS) >= N_UNITS
    roots = {name: copied(honest_cache, tmp_path / f"cache{number}") for number, name in enumerate(_UNITS)}
    for name, change in _UNITS.items():
        change(roots[name])
    attacks = [
        Attack(f"{way.__name__}: {name}", lambda root=root, way=way: way(root))  # type: ignore[misc]
        for name, root in roots.items()
        for way in (_read, readers.check_cache)
    ]

    def warm_up() -> None:
        _read(honest_cache)
        readers.check_cache(honest_cache)

    outcomes = run_guarded(tmp_path, attacks, warm_up)

    # The reader looks at no zarr.json: what it gives has the checksums of the receipt, whatever stands there.
    metadata = {f"_read: {name}" for name in _METADATA}
    check([one for one in outcomes if one.name not in metadata])
    check([one for one in outcomes if one.name in metadata], may_pass=lambda one: True)


def test_no_codec_of_zarr_runs_when_a_cache_is_read(honest_cache: Path, monkeypatch: Any) -> None:
    import zarr.abc.codec
    import zarr.core.codec_pipeline

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a codec of Zarr ran")

    for name in ("decode", "read"):
        monkeypatch.setattr(zarr.core.codec_pipeline.BatchedCodecPipeline, name, refuse)

    _read(honest_cache)
    readers.check_cache(honest_cache)
