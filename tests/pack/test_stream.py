"""The tars for other readers: tarfile, plain webdataset, and the ready pipeline."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import torch
import webdataset

import proteus_cache
from proteus_cache.pack.reader import Pack
from proteus_cache.pack.writer import PackedSample, make_records, tar_buffers
from tests.pack.synthetic import expected_codes, key_of


def test_a_tar_has_its_golden_bytes() -> None:
    codes = [np.arange(5, dtype=np.uint8), np.arange(3, dtype=np.uint8)]
    sample = PackedSample("a_0123456789", 6, None, b"\xff\xd8view", b'{"key":1}\n', codes)

    data = b"".join(bytes(part) for part in tar_buffers([sample], "jpg"))

    assert len(data) == 3 * 1024 + 1024
    assert hashlib.sha256(data).hexdigest() == "91063e3d04e5654d38a3d49358d1344f5b69360a61a9bc7b6b2468df34a9e00c"
    record = make_records([sample], 2)[0]
    for name, content in (("codes", bytes([0, 1, 2, 3, 4, 0, 1, 2])), ("view", sample.view), ("json", sample.json)):
        start = int(record[f"{name}_offset"])
        assert data[start : start + int(record[f"{name}_size"])] == content
    assert (int(record["tar"]), int(record["row"]), int(record["label"])) == (2, 6, 0xFFFFFFFF)


def test_tarfile_sees_plain_sorted_files(whole_pack: Pack) -> None:
    data = (whole_pack.path / "v000" / "s00001.tar").read_bytes()

    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as opened:
        members = opened.getmembers()

    names = [member.name for member in members]
    assert names == [f"{key_of(row)}.{extension}" for row in (3, 5) for extension in ("codes", "png", "json")]
    for member in members:
        assert (member.mode, member.uid, member.gid, member.uname, member.gname, member.mtime) == (
            0o644,
            0,
            0,
            "",
            "",
            0,
        )
        assert member.type == tarfile.REGTYPE
    assert data.endswith(bytes(1024))
    assert len(data) % 512 == 0


def test_plain_webdataset_reads_the_tars(whole_pack: Pack) -> None:
    urls = [str(whole_pack.path / "v001" / f"s{number:05d}.tar") for number in range(4)]

    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))

    assert [sample["__key__"] for sample in samples] == [key_of(row) for row in range(12) if row != 4]
    codes = np.concatenate(expected_codes("v001", 3, whole_pack.targets))
    assert samples[3]["codes"] == codes.tobytes()
    assert samples[3]["png"].shape == (8, 8, 3)
    assert samples[3]["json"]["label"] == 1


def test_the_pipeline_gives_the_samples_of_the_pack(whole_pack: Pack) -> None:
    samples = list(proteus_cache.webdataset(whole_pack.path))

    assert len(samples) == len(whole_pack)
    for index, sample in enumerate(samples):
        ours = whole_pack[index]
        assert (sample["__key__"], sample["label"], sample["view_index"]) == (ours.key, ours.label, ours.view_index)
        assert np.array_equal(sample["view"], ours.view)
        assert all(np.array_equal(sample["targets"][name], ours.targets[name]) for name in ours.targets)


def test_the_pipeline_can_be_extended_and_read_by_workers(whole_pack: Pack) -> None:
    pipeline = proteus_cache.webdataset(str(whole_pack.path)).shuffle(5).to_tuple("__key__", "view", "targets")

    loader = torch.utils.data.DataLoader(pipeline, batch_size=4, num_workers=2)

    keys = [key for batch in loader for key in batch[0]]
    assert sorted(keys) == sorted(whole_pack[index].key for index in range(len(whole_pack)))
