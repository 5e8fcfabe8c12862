"""A whole small cache: what is on disk, what readers see, what verify finds, what a second writer does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import zarr

from proteus_cache import open_cache
from proteus_cache.cache.layout import CacheLayout
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import incomplete_views, verify_cache
from proteus_cache.codecs import load_codec
from proteus_cache.documents import parse_sealed, seal
from proteus_cache.errors import ChecksumError, DamageError, FormatError, UsageError
from proteus_cache.report.summary import describe, summarise_cache
from proteus_cache.views.encode import digest_pixels
from tests.cli.running import run
from tests.makers import N_PATCHES, WIDTH, make_cache, make_config, run_extract


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("finished"), probe_images=3)


@pytest.fixture
def cache(finished: Cache, tmp_path: Path) -> Cache:
    """A copy that a test may damage."""
    shutil.copytree(finished.path, tmp_path / "cache")
    return open_cache(tmp_path / "cache")


def test_the_folder_holds_what_the_format_says(finished: Cache) -> None:
    files = sorted(str(path.relative_to(finished.path)) for path in finished.path.rglob("*") if path.is_file())

    parameters = finished.target("patch").codec.parameters
    expected = {
        "manifest.json",
        "images.parquet",
        f"codec/{parameters}.safetensors",
        "targets.zarr/zarr.json",
    }
    for view, n_shards in (("v000", 3), ("v001", 3), ("probe", 1)):
        expected |= {f"targets.zarr/{view}/zarr.json"}
        expected |= {f"targets.zarr/{view}/{target}/zarr.json" for target in ("cls", "patch")}
        for shard in range(n_shards):
            expected |= {f"views/{view}/s{shard:05d}.tar", f"receipts/{view}/s{shard:05d}.json"}
            expected |= {f"targets.zarr/{view}/{target}/c/{shard}/0" for target in ("cls", "patch")}
    assert set(files) == expected
    assert (finished.path / "tmp").is_dir()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([N_PATCHES, 0], r"targets\.1\.shape\.1: Input should be greater than or equal to 1"),
        ([1 << 40, WIDTH], r"targets\.1\.shape\.0: Input should be less than or equal to 65536"),
        ([65_536, 257], r"targets\.1\.shape: .*65536 x 257 are more than 16,777,216 values"),
        ([4, 4, 24], r"targets\.1\.shape: List should have at most 2 items"),
    ],
)
def test_a_manifest_with_tokens_of_an_absurd_shape_is_refused(cache: Cache, shape: list[int], message: str) -> None:
    value = parse_sealed(cache.manifest.sealed(), "manifest.json")
    value["targets"][1]["shape"] = shape
    cache.layout.manifest.write_bytes(seal(value))

    with pytest.raises(FormatError, match=message):
        open_cache(cache.path)


def test_plain_zarr_reads_the_targets(finished: Cache) -> None:
    group: Any = zarr.open_group(finished.path / "targets.zarr", mode="r", zarr_format=3)  # its items are arrays

    cls, patch = group["v001/cls"], group["v001/patch"]

    assert (cls.shape, cls.dtype) == ((10, WIDTH), np.float16)
    assert (patch.shape, patch.dtype) == ((10, N_PATCHES * (2 + WIDTH)), np.uint8)
    assert group["probe/cls"].shape == (3, WIDTH)
    for shard in range(3):
        rows = finished.rows("v001", shard)
        assert np.array_equal(patch[rows.start : rows.stop], finished.read_codes("v001", shard, "patch"))


def test_plain_webdataset_reads_the_views(finished: Cache) -> None:
    seen = {}
    for shard in range(3):
        path = str(finished.tar_path("v000", shard))
        for sample in webdataset.WebDataset(path, shardshuffle=False):
            seen[sample["__key__"]] = sample

    assert sorted(seen) == sorted(finished.image_table["key"].to_pylist())
    for key, sample in seen.items():
        document = json.loads(sample["json"])
        assert (document["key"], document["view"]) == (key, "v000")
        assert sample["jpg"].startswith(b"\xff\xd8")


def test_samples_decode_to_what_the_arrays_hold(finished: Cache) -> None:
    group: Any = zarr.open_group(finished.path / "targets.zarr", mode="r", zarr_format=3)  # its items are arrays
    record = finished.target("patch")
    codec = load_codec(record.codec, tuple(record.shape), finished.parameters_blob(record))

    sample = finished[13]

    assert len(finished) == 20
    assert (sample.key, sample.view_index) == (finished.image_table["key"][3].as_py(), 1)
    assert sample.label == finished.image_table["label"][3].as_py()
    assert np.array_equal(sample.targets["cls"], group["v001/cls"][3].astype(np.float32))
    codes = torch.from_numpy(np.asarray(group["v001/patch"][3:4]))
    assert np.array_equal(sample.targets["patch"], codec.decode(codes)[0].numpy())
    assert sample.targets["patch"].shape == (N_PATCHES, WIDTH)
    receipt = finished.receipt("v001", 0)
    assert receipt is not None
    assert digest_pixels(sample.view) == receipt.samples.view_digests[3]
    assert finished[-1].key == finished[19].key
    with pytest.raises(IndexError):
        finished[20]


def test_a_whole_cache_verifies(finished: Cache) -> None:
    assert verify_cache(finished.path) == []
    assert verify_cache(finished.path, read_data=True) == []


def test_verify_finds_a_flipped_bit_in_any_file(cache: Cache) -> None:
    files = [path for path in sorted(cache.path.rglob("*")) if path.is_file()]
    assert len(files) > 25
    for path in files:
        good = path.read_bytes()
        for position in {0, len(good) // 3, len(good) // 2, len(good) - 1}:
            damaged = bytearray(good)
            damaged[position] ^= 16
            path.write_bytes(bytes(damaged))
            try:
                found = bool(verify_cache(cache.path, read_data=True))
            except DamageError:
                found = True
            assert found, f"byte {position} of {path}"
        path.write_bytes(good)
    assert verify_cache(cache.path, read_data=True) == []


def test_verify_finds_missing_cut_and_foreign_files_without_reading_data(cache: Cache) -> None:
    for path in [path for path in sorted(cache.path.rglob("*")) if path.is_file() and path.name != "manifest.json"]:
        good = path.read_bytes()
        path.unlink()
        assert verify_cache(cache.path), f"{path} missing"
        path.write_bytes(good[:-1])
        assert verify_cache(cache.path), f"{path} cut"
        path.write_bytes(good)
    (cache.path / "views" / "notes.txt").write_text("x")
    (finding,) = verify_cache(cache.path)
    assert (finding.path, finding.problem) == ("views/notes.txt", "does not belong to the cache")


def remove_unit(cache: Cache, view: str, shard: int, *, receipt_only: bool = False) -> list[str]:
    """Take a unit away; returns its files but the receipt."""
    files = cache.unit_files(view, shard)
    for file in [] if receipt_only else files:
        (cache.path / file).unlink()
    CacheLayout(cache.path).receipt(view, shard).unlink()
    return files


def test_a_unit_that_is_gone_altogether_is_said_and_is_no_damage(cache: Cache) -> None:
    remove_unit(cache, "v001", 1)
    remove_unit(cache, "probe", 0)

    outcome = run("verify", cache.path, "--read-data", "--json")

    said = json.loads(outcome.stdout)
    assert said["is_whole"] is True
    assert said["incomplete"] == {"probe": {"units": 0, "units_all": 1}, "v001": {"units": 2, "units_all": 3}}
    assert said["next"] == "the same `proteus-cache extract` again, for units of probe, v001 that no pack has"
    lines = run("verify", cache.path, "--read-data").stdout.splitlines()
    assert "v001: 2 of 3 units; the others are not extracted, lost, or moved into a pack" in lines
    assert any(line.startswith(f"cache {cache.path}: what is there is whole; checked") for line in lines)
    assert incomplete_views(open_cache(cache.path)) == {"probe": (0, 1), "v001": (2, 3)}


def test_files_of_a_unit_that_was_cut_off_are_not_called_foreign(cache: Cache) -> None:
    files = remove_unit(cache, "v001", 2, receipt_only=True)

    said = json.loads(run("verify", cache.path, "--json", code=1).stdout)

    assert sorted(finding["path"] for finding in said["findings"]) == sorted(files)
    for finding in said["findings"]:
        assert finding["problem"] == "its unit has no receipt: cut off, under way, or lost"
        assert finding["remedy"].startswith("run the same `proteus-cache extract` again")
    assert said["next"] == "the same `proteus-cache extract` again, for units of v001 that no pack has"


@pytest.mark.parametrize("read_data", [True, False])
@pytest.mark.parametrize("folder", ["views/v000", "targets.zarr/v000", "receipts/v000", "codec"])
def test_a_file_in_place_of_a_folder_does_not_end_the_check(cache: Cache, folder: str, read_data: bool) -> None:
    shutil.rmtree(cache.path / folder)
    (cache.path / folder).write_text("x")
    (cache.path / "views/v001/s00001.tar").unlink()

    findings = verify_cache(cache.path, read_data)

    missing = {finding.path for finding in findings if finding.problem == "missing"}
    assert "views/v001/s00001.tar" in missing
    assert folder in ("codec", "receipts/v000") or any(path.startswith(folder) for path in missing)
    (named,) = (finding for finding in findings if finding.path == folder)
    assert folder == "codec" or named.problem == "a file stands where a folder is needed"


def test_a_damaged_manifest_is_one_finding_with_what_to_do(cache: Cache) -> None:
    path = cache.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"vit", b"viT", 1))

    said = json.loads(run("verify", cache.path, "--json", code=1).stdout)

    (finding,) = said["findings"]
    assert finding["path"] == "manifest.json"
    assert finding["problem"].startswith("damaged (its bytes have digest ")
    assert finding["remedy"] == "nothing else can be judged without it: copy it from another copy"
    assert said["next"] is None
    with pytest.raises(ChecksumError, match="copy it again from where it came from"):
        open_cache(cache.path)


def test_a_damaged_unit_is_not_read(cache: Cache) -> None:
    path = cache.path / "targets.zarr/v000/patch/c/1/0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(
        ChecksumError, match=r"patch/c/1/0: damaged .* run `proteus-cache repair .*redoes unit v000/s00001"
    ):
        cache.read_codes("v000", 1, "patch")


def test_a_receipt_of_another_unit_or_cache_is_refused(cache: Cache, tmp_path: Path) -> None:
    layout = CacheLayout(cache.path)
    shutil.copy(layout.receipt("v000", 1), layout.receipt("v001", 1))
    with pytest.raises(FormatError, match="receipt of another unit"):
        cache.receipt("v001", 1)

    other = make_cache(tmp_path / "other", seed=5)
    shutil.copy(CacheLayout(other.path).receipt("v001", 1), layout.receipt("v001", 1))
    with pytest.raises(FormatError, match="belongs to another cache"):
        cache.receipt("v001", 1)


def test_a_damaged_unit_is_redone_once_its_receipt_is_removed(cache: Cache, finished: Cache) -> None:
    (cache.path / "views/v000/s00002.tar").write_bytes(b"junk")
    CacheLayout(cache.path).receipt("v000", 2).unlink()
    config = make_config(finished.path.parent, out=cache.path, probe_images=3)

    done = run_extract(config)

    assert done.units_committed == 1
    assert verify_cache(cache.path, read_data=True) == []
    assert cache.view_id("v000") == finished.view_id("v000")


def test_identities_depend_on_every_receipt(cache: Cache, finished: Cache, tmp_path: Path) -> None:
    again = make_cache(tmp_path / "again", probe_images=3)

    assert cache.cache_id() == finished.cache_id()
    assert len({finished.view_id("v000"), finished.view_id("v001"), finished.view_id("probe")}) == 3
    assert again.manifest.images.sha256 == finished.manifest.images.sha256
    CacheLayout(cache.path).receipt("v000", 2).unlink()
    assert cache.cache_id() != finished.cache_id()
    with pytest.raises(UsageError, match="v000/2 is not extracted yet"):
        cache.view_id("v000")


def test_a_probe_alone_is_no_identity(cache: Cache) -> None:
    for view in ("v000", "v001"):
        CacheLayout(cache.path).receipt(view, 0).unlink()

    summary = summarise_cache(cache.path)

    assert (summary["cache_id"], summary["probe"]["units"], summary["is_complete"]) == (None, 1, False)
    assert "none yet: no view index is complete" in describe(summary)[1]


def test_what_is_not_a_cache_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_cache(tmp_path / "missing")
    with pytest.raises(UsageError, match="is an empty folder; give a cache: the folder that `extract` wrote"):
        open_cache(tmp_path)
    (tmp_path / "pack.json").write_text("{}")
    with pytest.raises(UsageError, match="is a pack; give a cache"):
        open_cache(tmp_path)
