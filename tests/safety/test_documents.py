"""S3: hostile documents, their digests made right, through everything that reads them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from proteus_cache.documents import MAX_DOCUMENT_BYTES, parse_sealed, seal
from proteus_cache.pack.index import RECORD, index_header, seal_records
from proteus_cache.pack.plan import PlanDocument
from proteus_cache.pack.reader import open_pack
from proteus_cache.pack.unit import PackedUnit
from proteus_cache.train.config import config_from_mapping
from proteus_cache.train.stored import open_stored
from tests.pack.synthetic import write_pack
from tests.safety import readers
from tests.safety.guarded import Attack, check, run_guarded
from tests.safety.stores import Document, copied, files_of, reseal, with_files

N_DOCUMENTS = 60
"""Hostile documents, at least."""

Forgery = Callable[[bytes], bytes]
"""From the bytes of an honest document to those of a hostile one."""


def _body(body: bytes) -> bytes:
    """Any bytes that begin as an object, sealed as a document is."""
    return body[:-1] + b',"digest":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def _opened(data: bytes) -> bytes:
    """What an honest document seals, without its last bracket."""
    return data[:-78]


def _with(text: bytes) -> Forgery:
    """One more key, in this spelling."""
    return lambda data: _body(_opened(data) + b"," + text + b"}")


def _edit(change: Callable[[Document], object]) -> Forgery:
    def apply(data: bytes) -> bytes:
        document = parse_sealed(data, "honest")
        change(document)
        return seal(document)

    return apply


def _spelled(**style: Any) -> Forgery:
    """The same values in another spelling of JSON."""
    return lambda data: _body(json.dumps(parse_sealed(data, "honest"), **style).encode())


_LARGE: dict[str, Forgery] = {
    "a number of 30 MB": _with(b'"x":' + b"9" * (30 << 20)),
    "too long": _with(b'"x":"' + b"x" * MAX_DOCUMENT_BYTES + b'"'),
    "30 MB of text": _with(b'"x":"' + b"x" * (30 << 20) + b'"'),
    "30 MB of blanks": _with(b'"x":1' + b" " * (30 << 20)),
    "a million numbers": _with(b'"x":[' + b"1," * 999_999 + b"1]"),
    "millions of lists": _with(b'"x":[' + b"[]," * 3_000_000 + b"[]]"),
    "a million keys": _with(b'"x":{' + b",".join(b'"%d":1' % number for number in range(1_000_000)) + b"}"),
    "30 MB of closing brackets": _with(b'"x":1' + b"]" * (30 << 20)),
    "30 MB of quotes": _with(b'"x":' + b'"' * (30 << 20)),
    "30 MB of short texts": _with(b'"x":' + b'"a"' * (10 << 20)),
    "130,000 lists": _with(b'"x":[' + b"[]," * 130_000 + b"[]]"),
    "an exponent of 30 MB": _with(b'"x":1e' + b"9" * (30 << 20)),
    "100,000 unknown keys": _with(b",".join(b'"k%d":1' % number for number in range(100_000))),
}
_ANYWHERE: dict[str, Forgery] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "another digest": lambda data: data[:-70] + b"0" * 67 + data[-3:],
    "more behind it": lambda data: data + b"x",
    "no JSON": lambda data: _body(b"{pickle}"),
    "a list": lambda data: _body(b"[1,2]"),
    "not UTF-8": _with(b'"x":"\xff\xfe"'),
    "with a byte order mark": lambda data: _body(b"\xef\xbb\xbf" + _opened(data) + b"}"),
    "a key twice": _with(b'"version":1'),
    "NaN": _with(b'"x":NaN'),
    "infinity": _with(b'"x":-Infinity'),
    "a float without end": _with(b'"x":1e999'),
    "a number of 5,000 digits": _with(b'"x":' + b"9" * 5000),
    "nested by 17": _with(b'"x":' + b"[" * 17 + b"]" * 17),
    "nested by 100,000": _with(b'"x":' + b"[" * 100_000 + b"]" * 100_000),
    "open brackets without end": _with(b'"x":' + b"[" * 1_000_000),
    "an open string of quotes": _with(b'"x":"' + b'\\"' * 500_000),
    "backslashes": _with(b'"x":"' + b"\\" * 1_000_001),
    "half a surrogate pair": _with(b'"x":"\\ud800"'),
    "a NUL": _with(b'"x\\u0000":1'),
    "an unknown key": _with(b'"zzz":1'),
    "a key of a path": _with(b'"../../etc/passwd":1'),
    "indented": _spelled(indent=1),
    "not sorted": lambda data: _body(
        json.dumps(dict(reversed(parse_sealed(data, "honest").items())), separators=(",", ":")).encode()
    ),
    "another version": _edit(lambda document: document.update(version=2)),
    "version true": _edit(lambda document: document.update(version=True)),
    "version 1.0": _edit(lambda document: document.update(version=1.0)),
    "another format": _edit(lambda document: document.update(format="proteus-cache/pickle")),
    "a field less": _edit(lambda document: document.pop(sorted(document)[-1])),
    "lists for all": _edit(lambda document: document.update({key: [] for key in document})),
    "numbers for all": _edit(lambda document: document.update(dict.fromkeys(document, 7))),
    "null for all": _edit(lambda document: document.update(dict.fromkeys(document))),
}


def _set(*path: str | int, to: object) -> Forgery:
    """Another value deep in the document."""

    def change(document: Document) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return _edit(change)


def _renamed(*path: str, old: str, new: str) -> Forgery:
    """Another name of a key."""

    def change(document: Document) -> None:
        place: Any = document
        for step in path:
            place = place[step]
        place[new] = place.pop(old)

    return _edit(change)


_HUGE, _SHA = 2**62, "0" * 64
_MANIFEST: dict[str, Forgery] = {
    "no images": _set("images", "n_images", to=0),
    "2^62 images": _set("images", "n_images", to=_HUGE),
    "2^62 images of the probe": _set("images", "n_probe", to=_HUGE),
    "a shard of 2^62": _set("shard_size", to=_HUGE),
    "a shard of -1": _set("shard_size", to=-1),
    "views of a million pixels": _set("views", "size_px", to=1_000_000),
    "codes of 2^62 bytes": _set("targets", 0, "codec", "code_bytes", to=_HUGE),
    "100,000 empty targets": _set("targets", to=[{}] * 100_000),
    "a million numbers for targets": _set("targets", to=[1] * 1_000_000),
    "1,000 targets": _edit(lambda d: d.update(targets=[d["targets"][1] | {"name": f"block.{n}"} for n in range(1000)])),
    "the same target 5,000 times": _edit(lambda document: document.update(targets=[document["targets"][1]] * 5_000)),
    "12,000 long notes": _set("libraries", to={f"k{number}": "x" * 2000 for number in range(12_000)}),
    "a negative row of the array": _set("targets", 1, "codec", "array_shape", to=[-5]),
    "an empty row of the array": _set("targets", 1, "codec", "array_shape", to=[0]),
    "a target upwards": _set("targets", 0, "name", to="../../etc"),
    "an absolute target": _set("targets", 0, "name", to="/etc/passwd"),
    "a target with digits of another script": _set("targets", 0, "name", to="block.\u0663"),
    "a target with a line break": _set("targets", 0, "name", to="cls\n"),
    "the same target twice": _edit(lambda document: document["targets"].append(document["targets"][0])),
    "a huge shape": _set("targets", 0, "shape", to=[65536, 65536]),
    "an empty shape": _set("targets", 0, "shape", to=[]),
    "a type of objects": _set("targets", 0, "codec", "array_dtype", to="object"),
    "a codec of pickles": _set("targets", 0, "codec", "name", to="pickle"),
    "parameters upwards": _set("targets", 1, "codec", "parameters", to="../../../../etc/passwd"),
    "parameters that are not there": _set("targets", 1, "codec", "parameters", to=_SHA),
    "another row of the array": _set("targets", 1, "codec", "array_shape", to=[1 << 40]),
    "an image list of another digest": _set("images", "sha256", to=_SHA),
    "a name of 1 MB": _set("teacher", "name", to="x" * (1 << 20)),
    "a million classes": _set("images", "classes", to=[1] * 1_000_000),
    "another seed": _set("views", "seed", to=-1),
}
_RECEIPT: dict[str, Forgery] = {
    "of another cache": _set("manifest", to=_SHA),
    "of another view index": _set("view", to="v001"),
    "a view index upwards": _set("view", to="../v000"),
    "of another shard": _set("shard", to=1),
    "rows that overlap": _set("samples", "rows", 1, to=0),
    "negative rows": _set("samples", "rows", 0, to=-1),
    "a hole in the rows": _set("end_row", to=7),
    "a row too many": _edit(lambda document: document["samples"]["rows"].append(99)),
    "2^62 rows": _set("end_row", to=_HUGE),
    "a file upwards": _renamed("files", old="views/v000/s00000.tar", new="../../../etc/passwd"),
    "an absolute file": _renamed("files", old="views/v000/s00000.tar", new="/etc/passwd"),
    "a file with a backslash": _renamed("files", old="views/v000/s00000.tar", new="views\\v000\\s00000.tar"),
    "a file with NUL": _renamed("files", old="views/v000/s00000.tar", new="views/v000/s00000.tar\0"),
    "a file of another look": _renamed("files", old="views/v000/s00000.tar", new="views/v000/s0000\u043e.tar"),
    "a file too many": _set("files", "evil.pkl", to={"size": 1, "sha256": _SHA}),
    "a size of 2^62": _set("files", "views/v000/s00000.tar", "size", to=_HUGE),
    "a negative size": _set("files", "views/v000/s00000.tar", "size", to=-1),
    "another key": _set("samples", "keys", 0, to="other_0123456789"),
    "a key upwards": _set("samples", "keys", 0, to="../../etc/passwd"),
    "a key with a line break": _set("samples", "keys", 0, to="a\nb"),
    "a key with escape codes": _set("samples", "keys", 0, to="\x1b[2Ja"),
    "keys that are the same": _edit(lambda d: d["samples"]["keys"].__setitem__(1, d["samples"]["keys"][0])),
    "another view digest": _set("samples", "view_digests", 0, to="0" * 16),
    "a view digest of 1 MB": _set("samples", "view_digests", 0, to="0" * (1 << 20)),
    "another checksum": _set("samples", "crc32c", "patch", 0, to=1),
    "a checksum of 2^62": _set("samples", "crc32c", "patch", 0, to=_HUGE),
    "a target less": _edit(lambda document: document["samples"]["crc32c"].pop("patch")),
    "a target more": _set("samples", "crc32c", "evil", to=[1, 2, 3, 4]),
    "no metadata of arrays": _set("zarr", to={}),
    "other metadata of arrays": _set("zarr", "targets.zarr/zarr.json", to=_SHA),
    "a million rows": _set("samples", "rows", to=list(range(900_000))),
}
_PACK: dict[str, Forgery] = {
    "no images": _set("n_images", to=0),
    "2^62 images": _set("n_images", to=_HUGE),
    "a shard of 2^62": _set("shard_size", to=_HUGE),
    "a shard of nothing": _set("shard_size", to=0),
    "codes of 2^29 bytes": _set("code_bytes", to=1 << 29),
    "codes that overlap": _set("targets", 1, "offset", to=0),
    "codes with a hole": _set("targets", 1, "offset", to=1000),
    "codes before the start": _set("targets", 1, "offset", to=-4),
    "codes of 2^62 bytes": _set("targets", 1, "codec", "code_bytes", to=_HUGE),
    "the same target twice": _set("targets", 1, "name", to="cls"),
    "100,000 empty targets": _set("targets", to=[{}] * 100_000),
    "a target upwards": _set("targets", 0, "name", to="../x"),
    "a codec of pickles": _set("targets", 0, "codec", "name", to="pickle"),
    "a view index upwards": _renamed("packed", old="v000", new="../v000"),
    "an absolute view index": _renamed("packed", old="v000", new="/etc/passwd"),
    "a view index in other digits": _renamed("packed", old="v000", new="v\u0660\u0660\u0660"),
    "a view index with a line break": _renamed("packed", old="v000", new="v000\n"),
    "view index v0000": _renamed("packed", old="v000", new="v0000"),
    "no view index": _set("packed", to={}),
    "a view index too many": _edit(lambda d: d["packed"].update(v001=d["packed"]["v000"])),
    "no tar": _set("packed", "v000", "tars", to=[]),
    "a tar too many": _edit(lambda d: d["packed"]["v000"]["tars"].append(d["packed"]["v000"]["tars"][0])),
    "more samples than images": _edit(
        lambda d: (
            d["packed"]["v000"].update(n_samples=5, index={"size": 64 * 6, "sha256": _SHA}),
            d["packed"]["v000"]["tars"][0].update(n_samples=5),
        )
    ),
    "2^40 samples": _set("packed", "v000", "n_samples", to=1 << 40),
    "an index of another size": _set("packed", "v000", "index", "size", to=64),
    "an index of another digest": _set("packed", "v000", "index", "sha256", to=_SHA),
    "a tar of 2^62 bytes": _set("packed", "v000", "tars", 0, "size", to=_HUGE),
    "a tar that is too short": _set("packed", "v000", "tars", 0, "size", to=1024),
    "a tar of another digest": _set("packed", "v000", "tars", 0, "sha256", to=_SHA),
    "a digest that is a path": _set("packed", "v000", "tars", 0, "sha256", to="../../etc/passwd"),
    "views of a million pixels": _set("views", "size_px", to=1_000_000),
    "views of another size": _set("views", "size_px", to=17),
    "views of another format": _set("views", "view_format", to="jpeg"),
    "views of GIF": _set("views", "view_format", to="gif"),
    "a held-out tar that is not there": _set("held_out", to=[5]),
    "a million held-out tars": _set("held_out", to=["x"] * 1_000_000),
    "classes that are numbers": _set("classes", to=[1] * 1_000_000),
    "a class of 1 MB": _set("classes", to=["x" * (1 << 20)]),
    "mean of two": _set("teacher", "mean", to=[0.5, 0.5]),
}
_SAMPLE: dict[str, Forgery] = {
    "of another sample": _set("key", to="other_0123456789"),
    "a key upwards": _set("key", to="../../etc/passwd"),
    "a key with escape codes": _set("key", to="\x1b]0;x\x07"),
    "of another view index": _set("view", to="v009"),
    "a view that is a number": _set("view", to=0),
    "another label": _set("label", to=12345),
    "a label that is a text": _set("label", to="0"),
}


def _attacks(
    store: Path, relative: str, forgeries: dict[str, Forgery], scratch: Path, ways: tuple[Callable[[Path], object], ...]
) -> list[Attack]:
    """Each forgery in a copy of the store, each copy read in all ways."""
    found = []
    for number, (name, forge) in enumerate(forgeries.items()):
        root = copied(store, scratch / f"{Path(relative).stem}{number}")
        path = root / relative
        path.write_bytes(forge(path.read_bytes()))
        found += [Attack(f"{relative}: {name}: {way.__name__}", lambda root=root, way=way: way(root)) for way in ways]  # type: ignore[misc]
    return found


def test_hostile_documents_of_a_cache_are_refused(honest_cache: Path, tmp_path: Path) -> None:
    ways = (readers.check_cache,)
    manifests = _attacks(honest_cache, "manifest.json", _ANYWHERE | _LARGE | _MANIFEST, tmp_path, ways)
    receipts = _attacks(honest_cache, "receipts/v000/s00000.json", _ANYWHERE | _RECEIPT, tmp_path, ways)
    assert len(manifests) + len(receipts) >= N_DOCUMENTS

    outcomes = run_guarded(tmp_path, [*manifests, *receipts], lambda: readers.check_cache(honest_cache))

    check(outcomes)


def test_hostile_documents_of_a_cache_do_no_harm_to_its_other_readers(honest_cache: Path, tmp_path: Path) -> None:
    ways = (readers.look, readers.read_cache)
    manifests = _attacks(honest_cache, "manifest.json", _MANIFEST, tmp_path, ways)
    receipts = _attacks(honest_cache, "receipts/v000/s00000.json", _RECEIPT, tmp_path, ways)

    def warm_up() -> None:
        readers.look(honest_cache)
        readers.read_cache(honest_cache)

    outcomes = run_guarded(tmp_path, [*manifests, *receipts], warm_up)

    check(outcomes, may_pass=lambda one: True)


def test_hostile_documents_of_a_pack_are_refused(honest_pack: Path, tmp_path: Path) -> None:
    documents = _attacks(honest_pack, "pack.json", _ANYWHERE | _PACK, tmp_path, (readers.check_pack,))
    others = _attacks(
        honest_pack, "pack.json", _PACK, tmp_path / "more", (readers.look, readers.read_pack, readers.stream_pack)
    )

    def warm_up() -> None:
        for way in (readers.look, readers.read_pack, readers.stream_pack, readers.check_pack):
            way(honest_pack)

    outcomes = run_guarded(tmp_path, [*documents, *others], warm_up)

    check(outcomes[: len(documents)])
    # Some lies hurt none but who checks everything: `info` says what pack.json says.
    check(outcomes[len(documents) :], may_pass=lambda one: True)


def test_what_a_pack_says_of_its_images_costs_training_nothing(tmp_path: Path) -> None:
    honest = write_pack(tmp_path / "honest", n_images=4, shard_size=2, views=("v000", "probe"), side_px=16)
    config = config_from_mapping({"student": "vit_demo", "data": str(honest), "out": "out", "batch_size": 2})

    def train(root: Path) -> None:
        data = open_stored(replace(config, data=root), tmp_path)
        data.order.batch(0)
        assert set(data.evaluation_orders) == {"seen", "probe"}

    def rows_at_the_end(root: Path) -> None:
        data = (root / "probe.idx").read_bytes()
        records = np.frombuffer(data, dtype=RECORD, offset=64).copy()
        records["row"] = np.arange(2**32 - 1 - len(records), 2**32 - 1)
        _with_index(root, "probe", data[:64] + seal_records(records).tobytes())

    def four_billion_images(root: Path) -> None:
        tar = {"n_samples": 0, "receipt": _SHA, "sha256": _SHA, "size": 1024}

        def change(document: Document) -> None:
            document.update(n_images=2**32 - 2, shard_size=1 << 20)
            tars = document["packed"]["v000"]["tars"]
            tars += [tar] * (4096 - len(tars))

        reseal(root / "pack.json", change)
        pack = open_pack(root)
        header = index_header(0, pack.document.packed["v000"].n_samples, 4096, pack.code_bytes)
        _with_index(root, "v000", header + (root / "v000.idx").read_bytes()[64:])

    def only_the_probe(root: Path) -> None:
        def change(document: Document) -> None:
            document.update(n_images=2**32 - 2, shard_size=4)
            del document["packed"]["v000"], document["cache"]["view_ids"]["v000"]

        reseal(root / "pack.json", change)

    def a_terabyte_of_index(root: Path) -> None:
        os.truncate(root / "v000.idx", 1 << 40)

    attacks = []
    for change in (rows_at_the_end, four_billion_images, only_the_probe, a_terabyte_of_index):
        root = copied(honest, tmp_path / change.__name__)
        change(root)
        attacks.append(Attack(change.__name__, lambda root=root: train(root)))  # type: ignore[misc]

    outcomes = run_guarded(tmp_path, attacks, lambda: train(honest))

    check(outcomes, may_pass=lambda one: one.name == "four_billion_images")


def _with_index(root: Path, view: str, data: bytes) -> None:
    """Put another index into a pack, which pack.json says is right."""
    (root / f"{view}.idx").write_bytes(data)
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(root / "pack.json", lambda document: document["packed"][view].update(index=record))


def test_hostile_documents_of_a_sample_are_refused(honest_pack: Path, tmp_path: Path) -> None:
    files = files_of((honest_pack / "v000" / "s00000.tar").read_bytes())
    ways = (readers.read_pack, readers.stream_pack, readers.check_pack)
    attacks = []
    small = {name: forge for name, forge in _ANYWHERE.items() if len(forge(files[2][1])) < 1 << 20}
    small = {name: forge for name, forge in small.items() if name not in _UNREAD}
    for number, (name, forge) in enumerate((small | _SAMPLE).items()):
        root = copied(honest_pack, tmp_path / f"pack{number}")
        with_files(root, [*files[:2], (files[2][0], forge(files[2][1])), *files[3:]])
        attacks += [Attack(f"{name}: {way.__name__}", lambda root=root, way=way: way(root)) for way in ways]  # type: ignore[misc]

    outcomes = run_guarded(tmp_path, attacks, lambda: [way(honest_pack) for way in ways])

    # A stream has no index that says otherwise, and training no tar header: only `verify` knows of these.
    unseen = ("another label: stream_pack", "of another sample: read_pack")
    check([one for one in outcomes if one.name not in unseen])
    check([one for one in outcomes if one.name in unseen], may_pass=lambda one: True)


_UNREAD = {
    "an unknown key",
    "a key of a path",
    "a NUL",
    "another version",
    "version true",
    "version 1.0",
    "another format",
    "a field less",
}
"""Forgeries of fields that nobody reads in the document of a sample of a pack."""


def test_hostile_notes_and_plans_of_a_pack_are_refused(tmp_path: Path) -> None:
    note = seal({"format": "proteus-cache/packed-unit", "version": 1, "source": _SHA, "records": ""})
    forged = {name: forge(note) for name, forge in _ANYWHERE.items()}
    attacks = [
        Attack(f"{kind.__name__}: {name}", lambda data=data, kind=kind: kind.parse(data, "note.json"))  # type: ignore[misc]
        for kind in (PackedUnit, PlanDocument)
        for name, data in forged.items()
    ]

    check(run_guarded(tmp_path, attacks, lambda: None))


def test_what_is_no_plain_file_is_refused(honest_cache: Path, honest_pack: Path, tmp_path: Path) -> None:
    attacks: list[Attack] = []
    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "link to a file": lambda path: path.symlink_to("/etc/passwd"),
        "endless link": lambda path: path.symlink_to("/dev/zero"),
        "link to itself": lambda path: path.symlink_to(path.name),
    }
    codec = next((honest_cache / "codec").iterdir()).name
    for store, verify, names in (
        (honest_pack, readers.check_pack, ["pack.json", "v000.idx", "v000/s00000.tar"]),
        (
            honest_cache,
            readers.check_cache,
            ["manifest.json", "images.parquet", f"codec/{codec}", "receipts/v000/s00000.json", "views/v000/s00000.tar"],
        ),
    ):
        for name in names:
            for kind, make in makers.items():
                root = copied(store, tmp_path / f"store{len(attacks)}")
                (root / name).unlink()
                make(root / name)
                attacks.append(Attack(f"{name} is a {kind}", lambda root=root, verify=verify: verify(root)))  # type: ignore[misc]

    def warm_up() -> None:
        readers.check_pack(honest_pack)
        readers.check_cache(honest_cache)

    check(run_guarded(tmp_path, attacks, warm_up))
