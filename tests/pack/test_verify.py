"""Verify: a whole pack has no findings; damage of any file has one that names it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from proteus_cache.documents import seal
from proteus_cache.pack.document import PackDocument
from proteus_cache.pack.index import seal_records
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.verify import verify_pack
from proteus_cache.storage import sha256_of
from tests.cli.running import run
from tests.pack.synthetic import write_pack


def test_a_whole_pack_has_no_findings(whole_pack: Pack) -> None:
    calls: list[tuple[int, int]] = []

    assert verify_pack(whole_pack.path) == []
    assert verify_pack(whole_pack.path, True, lambda done, total, _: calls.append((done, total))) == []

    assert calls == [(done, 10) for done in range(1, 11)]


def test_a_flipped_bit_in_any_file_is_found(pack_copy: Pack) -> None:
    rng = np.random.default_rng(0)
    files = [path for path in pack_copy.path.rglob("*") if path.is_file() and path.name != "pack.json"]

    for path in files:
        data = path.read_bytes()
        for place in rng.integers(0, len(data), 5):
            path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
            findings = verify_pack(pack_copy.path, read_data=True)
            assert [finding.path for finding in findings] == [str(path.relative_to(pack_copy.path))]
        path.write_bytes(data)


def test_the_damaged_samples_are_named(pack_copy: Pack) -> None:
    path = pack_copy.path / "v000" / "s00001.tar"
    data = bytearray(path.read_bytes())
    data[512] ^= 1
    path.write_bytes(data)

    (finding,) = verify_pack(pack_copy.path, read_data=True)

    assert finding.unit == "v000/s00001"
    assert finding.problem.endswith("codes of image row 3")
    assert verify_pack(pack_copy.path) == []


def test_a_disk_that_fails_on_the_way_is_a_finding_and_not_the_end(
    whole_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)

    findings = verify_pack(whole_pack.path, read_data=True)

    tars = {path.relative_to(whole_pack.path).as_posix() for path in whole_pack.path.rglob("*.tar")}
    assert {finding.path for finding in findings} == tars != set()
    assert all("cannot read: Input/output error" in finding.problem for finding in findings)


def test_missing_cut_and_foreign_files_are_found_without_reading(pack_copy: Pack) -> None:
    (pack_copy.path / "v000" / "s00002.tar").unlink()
    (pack_copy.path / "v001.idx").unlink()
    cut = pack_copy.path / "v001" / "s00001.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    (pack_copy.path / "v000" / "notes.txt").touch()
    (pack_copy.path / "tmp").mkdir()
    (pack_copy.path / "tmp" / "unfinished").touch()

    problems = {finding.path: finding.problem for finding in verify_pack(pack_copy.path)}

    assert problems.pop("v001/s00001.tar").endswith(f"bytes instead of {cut.stat().st_size + 512:,}")
    assert problems == {
        "v000/s00002.tar": "missing",
        "v001.idx": "missing",
        "v000/notes.txt": "does not belong to the pack",
    }


def test_a_finding_names_its_file_and_the_command_once(pack_copy: Pack) -> None:
    path = pack_copy.path / "v000.idx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    lines = run("verify", pack_copy.path, "--read-data", code=1).stdout.splitlines()

    assert lines[:2] == [
        "v000.idx: is not the index that pack.json names",
        f"    run `proteus-cache repair {pack_copy.path}`, which packs anew what is damaged",
    ]


def test_a_damaged_pack_json_is_one_finding_with_what_to_do(pack_copy: Pack) -> None:
    path = pack_copy.path / "pack.json"
    path.write_bytes(path.read_bytes()[:-9])

    said = json.loads(run("verify", pack_copy.path, "--json", code=1).stdout)

    (finding,) = said["findings"]
    assert finding["path"] == "pack.json"
    assert finding["problem"].startswith("not a complete document")
    assert finding["remedy"] == "nothing else can be judged without it: copy it from another copy"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b'"label":0', b'"label":2', "belongs to another sample"),
        (b'"view":"v000"', b'"view":"v001"', "belongs to another sample"),
        (b'"view_digest":"', b'"view_digest":"0', "decodes to other pixels than the teacher saw"),
    ],
)
def test_documents_that_lie_are_found_though_every_digest_holds(
    tmp_path: Path, old: bytes, new: bytes, problem: str
) -> None:
    pack = open_pack(write_pack(tmp_path / "pack", views=("v000",)))
    _rewrite_first_document(pack, old, new)

    (finding,) = [f for f in verify_pack(pack.path, read_data=True) if f.path != "pack.json"]

    assert finding.path == "v000/s00000.tar"
    assert problem in finding.problem


def test_an_identity_that_its_receipts_do_not_give_is_found(tmp_path: Path) -> None:
    pack = open_pack(write_pack(tmp_path / "pack", views=("v000",)))
    cache = pack.document.cache.model_copy(update={"view_ids": {"v000": "0" * 64}})
    (pack.path / "pack.json").write_bytes(pack.document.model_copy(update={"cache": cache}).sealed())

    (finding,) = verify_pack(pack.path)

    assert finding.problem == "the identity of v000 is not that of its receipts"


def _rewrite_first_document(pack: Pack, old: bytes, new: bytes) -> None:
    """Change the first sample's document and every digest above it, as a careful forger would."""
    path = pack.path / "v000" / "s00000.tar"
    reader = pack.sample_reader()
    records = reader.index("v000").read(np.arange(pack.document.packed["v000"].n_samples))
    start, size = int(records["json_offset"][0]), int(records["json_size"][0])
    data = bytearray(path.read_bytes())
    body = bytes(data[start : start + size])[: -len(b',"digest":""}\n') - 64] + b"}"
    changed = body.replace(old, new[: len(old)] if old.endswith(b'"') else new, 1)
    if old.endswith(b'digest":"'):
        place = body.index(old) + len(old)
        changed = body[:place] + bytes(reversed(body[place : place + 16])) + body[place + 16 :]
    import json

    document = seal(json.loads(changed))
    assert len(document) == size
    data[start : start + size] = document
    path.write_bytes(data)
    import google_crc32c

    records["json_crc32c"][0] = google_crc32c.value(document)
    index_path = pack.path / "v000.idx"
    index_path.write_bytes(index_path.read_bytes()[:64] + seal_records(records).tobytes())
    entry = pack.document.packed["v000"]
    tars = [entry.tars[0].model_copy(update={"sha256": sha256_of(path)[1]}), *entry.tars[1:]]
    index = entry.index.model_copy(update={"sha256": hashlib.sha256(index_path.read_bytes()).hexdigest()})
    packed = {"v000": entry.model_copy(update={"tars": tars, "index": index})}
    changed_document: PackDocument = pack.document.model_copy(update={"packed": packed})
    (pack.path / "pack.json").write_bytes(changed_document.sealed())
