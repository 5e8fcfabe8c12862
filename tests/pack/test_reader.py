"""Opening a pack, its samples, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_cache.cache.receipt import FileRecord
from proteus_cache.documents import parse_sealed, seal
from proteus_cache.errors import ChecksumError, DamageError, FormatError, UsageError
from proteus_cache.pack.index import Index, index_header
from proteus_cache.pack.order import BatchPlan
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.storage import sha256_of, write_new
from tests.pack.synthetic import N_PATCHES, WIDTH, expected_codes, expected_view, key_of, write_pack


def test_samples_come_by_view_index_then_row(whole_pack: Pack) -> None:
    rows = [row for row in range(12) if row != 4]

    samples = [whole_pack[index] for index in range(len(whole_pack))]

    assert [(s.view_index, s.key) for s in samples] == [(view, key_of(row)) for view in (0, 1) for row in rows]
    assert [s.label for s in samples[:5]] == [0, 1, 0, 1, 1]
    sample = samples[13]
    assert np.array_equal(sample.view, expected_view("v001", 2, 8))
    codes = expected_codes("v001", 2, whole_pack.targets)
    assert np.array_equal(sample.targets["cls"], codes[0].view("<f2").astype(np.float32))
    assert np.array_equal(sample.targets["patch"].reshape(-1), codes[1].view("<f2").astype(np.float32))
    assert sample.targets["patch"].shape == (N_PATCHES, WIDTH)
    assert sample.targets["patch"].dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([0, WIDTH], r"targets\.1\.shape\.0: Input should be greater than or equal to 1"),
        ([1 << 40, WIDTH], r"targets\.1\.shape\.0: Input should be less than or equal to 65536"),
        ([65_536, 257], r"targets\.1\.shape: .*65536 x 257 are more than 16,777,216 values"),
    ],
)
def test_a_pack_with_tokens_of_an_absurd_shape_is_refused(pack_copy: Pack, shape: list[int], message: str) -> None:
    document = pack_copy.path / "pack.json"
    value = parse_sealed(document.read_bytes(), "pack.json")
    value["targets"][1]["shape"] = shape
    document.write_bytes(seal(value))

    with pytest.raises(FormatError, match=message):
        open_pack(pack_copy.path)


def test_indices_count_from_the_end_too_and_stop_there(whole_pack: Pack) -> None:
    assert len(whole_pack) == 22
    assert whole_pack[-1].key == whole_pack[21].key == key_of(11)
    for index in (22, -23):
        with pytest.raises(IndexError, match="of 22"):
            whole_pack[index]


def test_the_probe_is_there_but_never_counts(whole_pack: Pack) -> None:
    sample = whole_pack.sample("probe", 2)

    assert whole_pack.has_probe
    assert whole_pack.views == ["v000", "v001"]
    assert (sample.view_index, sample.key) == (None, key_of(2))


def test_codes_decode_in_batches(whole_pack: Pack) -> None:
    codes = np.stack([np.concatenate(expected_codes("v000", row, whole_pack.targets)) for row in (0, 1)])

    tokens = whole_pack.decode(torch.from_numpy(codes))

    assert torch.equal(tokens["cls"][1], torch.from_numpy(whole_pack[1].targets["cls"]))


def test_held_out_tars_are_left_to_their_own_order(whole_pack: Pack) -> None:
    held_out = whole_pack.held_out_order(batch_size=8)
    training = whole_pack.training_order(seed=0, batch_size=8)

    assert held_out is not None
    assert held_out.batch(0).records.tolist() == [5, 6, 7]
    assert training.n_samples == 8
    assert not set(training.batch(0).records.tolist()) & {5, 6, 7}


def test_repeats_leave_out_images_that_have_not_all_views(tmp_path: Path) -> None:
    views = ("v000", "v001", "v002")
    missing = {"v000": (4, 5), "v001": (9,)}
    pack = open_pack(write_pack(tmp_path / "pack", n_images=12, views=views, missing=missing, held_out=(0,)))
    order = pack.training_order(seed=0, batch_size=4, repeats=2)

    entries = [entry for step in range(60) for entry in _entries(pack, order.batch(step))]

    assert (order.n_samples, order.steps_per_epoch) == (4, 1)
    assert all(len({key for key, _ in entries[first : first + 2]}) == 1 for first in range(0, len(entries), 2))
    assert {key for key, _ in entries} == {key_of(row) for row in range(4, 12)}
    for key, seen in ((4, {1, 2}), (9, {0, 2}), (11, {0, 1, 2})):
        assert {view for found, view in entries if found == key_of(key)} == seen


def _entries(pack: Pack, plan: BatchPlan) -> list[tuple[str, int]]:
    assert plan.view_indices is not None
    both = zip(plan.view_indices.tolist(), plan.records.tolist(), strict=True)
    return [(pack.sample(f"v{view:03d}", record).key, view) for view, record in both]


def test_an_index_whose_rows_are_not_those_of_its_tar_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = open_pack(write_pack(tmp_path / "pack", missing={"v001": (5,)}))
    monkeypatch.setattr(Index, "rows", lambda self, first, end: np.array([4, 7, 7]))

    with pytest.raises(FormatError, match=r"v001\.idx: the images of tar 1 are not in its order"):
        pack.training_order(seed=0, batch_size=2, repeats=2)


def test_a_pack_without_probe_and_held_out_tars_says_so(tmp_path: Path) -> None:
    pack = open_pack(write_pack(tmp_path / "pack"))

    assert pack.held_out_order(batch_size=2) is None
    assert pack.probe_order(batch_size=2) is None


def test_what_is_not_a_pack_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_pack(tmp_path / "missing")
    with pytest.raises(UsageError, match="is an empty folder; give a pack"):
        open_pack(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UsageError, match="is a cache; give a pack"):
        open_pack(tmp_path)


def test_every_flipped_byte_of_the_document_is_found(pack_copy: Pack) -> None:
    path = pack_copy.path / "pack.json"
    data = path.read_bytes()

    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(DamageError, match=r"pack\.json"):
            open_pack(pack_copy.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code_bytes": 61}, "code_bytes is not the sum"),
        ({"held_out": [9]}, "a held-out tar does not exist"),
        ({"n_images": 13}, "has 4 tars instead of 5"),
        ({"shard_size": 2}, "has 4 tars instead of 6|more samples than a shard"),
        ({"version": 2}, "version"),
        ({"packed": {}}, "packed"),
    ],
)
def test_documents_that_contradict_themselves_are_refused(
    whole_pack: Pack, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    document = whole_pack.document.model_copy(update=change)
    write_new(tmp_path / "pack.json", document.sealed())

    with pytest.raises(FormatError, match=message):
        open_pack(tmp_path)


@pytest.mark.parametrize("name", ["../v002", "v0002", "/v002", "V002", "v002/..", "pipe:ls", ""])
def test_names_in_the_document_cannot_leave_the_pack(whole_pack: Pack, tmp_path: Path, name: str) -> None:
    packed = dict(whole_pack.document.packed)
    packed[name] = packed["v001"]
    view_ids = dict(whole_pack.document.cache.view_ids) | {name: "c" * 64}
    cache = whole_pack.document.cache.model_copy(update={"view_ids": view_ids})
    document = whole_pack.document.model_copy(update={"packed": packed, "cache": cache})
    write_new(tmp_path / "pack.json", document.sealed())

    with pytest.raises(FormatError, match="not views"):
        open_pack(tmp_path)


def test_a_document_of_another_sample_is_refused(pack_copy: Pack) -> None:
    # Tars and index of v000 in the place of v001, every digest made good: only the samples' documents can tell.
    shutil.copytree(pack_copy.path / "v000", pack_copy.path / "v001", dirs_exist_ok=True)
    entry = pack_copy.document.packed["v000"]
    header = index_header(1, entry.n_samples, len(entry.tars), pack_copy.code_bytes)
    path = pack_copy.path / "v001.idx"
    path.write_bytes(header + (pack_copy.path / "v000.idx").read_bytes()[64:])
    index = FileRecord(size=entry.index.size, sha256=sha256_of(path)[1])
    packed = pack_copy.document.packed | {"v001": entry.model_copy(update={"index": index})}
    forged = pack_copy.document.model_copy(update={"packed": packed})
    (pack_copy.path / "pack.json").write_bytes(forged.sealed())

    with pytest.raises(FormatError, match="the document of record 0 belongs to another sample"):
        open_pack(pack_copy.path).sample("v001", 0)


def test_an_index_of_another_view_is_refused(pack_copy: Pack) -> None:
    path = pack_copy.path / "v001.idx"
    path.write_bytes((pack_copy.path / "v000.idx").read_bytes())

    with pytest.raises(FormatError, match=r"v001\.idx: its header is not the one of this pack"):
        pack_copy.sample_reader().index("v001")


def test_a_changed_index_is_refused(pack_copy: Pack) -> None:
    path = pack_copy.path / "v000.idx"
    data = path.read_bytes()
    path.write_bytes(data[:64] + data[128:192] + data[64:128] + data[192:])

    with pytest.raises(ChecksumError, match=r"v000\.idx: is not the index that pack\.json names"):
        pack_copy[0]
    path.unlink()
    with pytest.raises(DamageError, match=r"v000\.idx: missing"):
        open_pack(pack_copy.path)[0]


def test_reader_processes_need_no_torch() -> None:
    code = "import sys, proteus_cache.pack.worker; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
