"""docs/formats.md: a reader written from the page alone reads what the program writes."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from safetensors.numpy import load_file

from proteus_cache.cache.reader import Cache
from proteus_cache.documents import seal
from proteus_cache.images import sample_key
from tests.makers import make_cache

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made"), n_images=10, shard_size=4, probe_images=3)


def _document(data: bytes) -> Any:  # JSON
    body, tail = data[:-78], data[-78:]
    assert hashlib.sha256(body + b"}").hexdigest() == tail[11:75].decode()
    return dict(json.loads(data))


def test_the_example_document_is_a_real_one() -> None:
    (example,) = re.findall(r'^(\{"a":1,.*\})\\n$', PAGE.read_text(), re.MULTILINE)

    assert seal({"a": 1, "b": "x"}) == example.encode() + b"\n"


def test_a_reader_from_the_page_reads_manifest_receipts_codes_and_identities(cache: Cache) -> None:
    root = cache.path
    manifest = _document((root / "manifest.json").read_bytes())
    assert hashlib.sha256((root / "images.parquet").read_bytes()).hexdigest() == manifest["images"]["sha256"]
    patch = next(target for target in manifest["targets"] if target["name"] == "patch")
    n_tokens, width = patch["shape"]
    blob = root / "codec" / f"{patch['codec']['parameters']}.safetensors"
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == patch["codec"]["parameters"]
    parameters = load_file(blob)
    view_ids = []
    for view in ("v000", "v001"):
        digests = [manifest["digest"]]
        for path in sorted((root / "receipts" / view).iterdir()):
            receipt = _document(path.read_bytes())
            digests.append(receipt["digest"])
            assert receipt["manifest"] == manifest["digest"]
            for name, record in receipt["files"].items():
                data = (root / name).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (record["size"], record["sha256"])
            shard = (root / f"targets.zarr/{view}/patch/c/{receipt['shard']}/0").read_bytes()
            code_bytes = patch["codec"]["code_bytes"]
            crcs = receipt["samples"]["crc32c"]["patch"]
            for position, row in enumerate(receipt["samples"]["rows"]):
                local = row - receipt["first_row"]
                codes = shard[local * (code_bytes + 4) : local * (code_bytes + 4) + code_bytes]
                assert google_crc32c.value(codes) == crcs[position]
                step = np.frombuffer(codes[: 2 * n_tokens], "<f2").astype(np.float32)
                level = np.frombuffer(codes[2 * n_tokens :], np.int8).reshape(n_tokens, width).astype(np.float32)
                found = parameters["mean"] + parameters["scale"] * (step[:, None] * level)
                sample = cache[row + (10 if view == "v001" else 0)]
                np.testing.assert_allclose(sample.targets["patch"], found, rtol=0, atol=1e-5)
        view_ids.append(hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest())
    assert view_ids == [cache.view_id("v000"), cache.view_id("v001")]
    assert cache.cache_id() == hashlib.sha256("".join(f"{v}\n" for v in view_ids).encode()).hexdigest()


def test_the_image_order_is_the_documented_one(cache: Cache) -> None:
    keys = cache.image_table["key"].to_pylist()

    hashed = [hashlib.blake2b(key.encode(), key=(0).to_bytes(8, "little"), digest_size=16).digest() for key in keys]

    assert hashed == sorted(hashed)


def test_the_key_is_the_documented_one() -> None:
    path = "n01440764/N01440764 10-Ä.tench.JPEG"

    assert sample_key(path) == "n01440764_10___tench_" + hashlib.sha256(path.encode()).hexdigest()[:10]
