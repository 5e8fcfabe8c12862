"""docs/formats.md: a reader written from the page alone reads what the program writes."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from proteus_cache.cache.reader import Cache
from proteus_cache.documents import seal
from proteus_cache.images import sample_key
from proteus_cache.teachers.registry import load_teacher
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


def test_the_canaries_are_the_documented_ones(cache: Cache) -> None:
    size = 32
    last, block = size - 1, max(1, size // 28)
    images = np.zeros((4, size, size, 3), np.uint8)
    for y, x in np.ndindex(size, size):
        images[0, y, x] = 255 * x // last, 255 * y // last, 255 * (x + y) // (2 * last)
        images[1, y, x] = [abs((k * x + (8 - k) * y) * 64 // size % 256 - 128) * 255 // 128 for k in (1, 3, 6)]
        radius = (2 * x - last) ** 2 + (2 * y - last) ** 2
        images[2, y, x] = [radius * k // size**2 % 256 for k in (400, 700, 1100)]
        images[3, y, x] = [(x // block + 31 * (y // block) + 7 * c) * 2654435761 % 2**32 >> 24 for c in range(3)]
    teacher = load_teacher("vit", weights=str(cache.path.parent / "teacher.safetensors"), home=cache.path, size_px=None)
    tokens = teacher.targets(torch.from_numpy(images), ["patch"])["patch"].reshape(4, -1).double().numpy()
    bits = hashlib.shake_128(b"proteus-cache/canary/1/0").digest(4 * tokens.shape[1])

    signs = 1 - 2.0 * np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(-1, 32)
    expected = tokens @ signs / np.sqrt(tokens.shape[1])

    assert cache.manifest.canary is not None
    np.testing.assert_allclose(cache.manifest.canary.projections["patch"], expected, rtol=0, atol=1e-5)
