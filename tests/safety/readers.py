"""All that a person does with a store that somebody sent, as functions of its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import proteus_cache
from proteus_cache.cache.reader import open_cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import DamageError
from proteus_cache.next_steps import after
from proteus_cache.pack.reader import open_pack
from proteus_cache.pack.verify import verify_pack
from proteus_cache.report.summary import describe, summarise
from proteus_cache.views.encode import decode_view, digest_pixels


def look(root: Path) -> None:
    """`info`."""
    summary = summarise(root)
    describe(summary)
    after(summary)


def read_pack(root: Path) -> list[object]:
    """All samples as training reads them, and an order; pixels and targets in a form that can be compared."""
    pack = open_pack(root)
    pack.training_order(seed=0, batch_size=2).batch(0)
    samples = [pack[number] for number in range(len(pack))]
    return [[s.key, digest_pixels(s.view), [float(np.sum(t)) for t in s.targets.values()]] for s in samples]


def stream_pack(root: Path) -> list[object]:
    """All samples as another trainer reads them."""
    return [[sample["__key__"], float(torch.sum(sample["view"]))] for sample in proteus_cache.webdataset(root)]


def check_pack(root: Path) -> None:
    """`verify --read-data`; raises the first finding."""
    # The receipts of the made-up pack are not those of its cache, which is no finding here.
    found = [finding for finding in verify_pack(root, read_data=True) if "identity" not in finding.problem]
    if found:
        raise DamageError(f"{found[0].path}: {found[0].problem}; {found[0].remedy}")


def read_cache(root: Path) -> None:
    """Everything that a pack would be made of."""
    cache = open_cache(root)
    assert cache.image_table is not None
    for view in cache.views():
        for shard in cache.units(view):
            for target in cache.manifest.targets:
                cache.read_codes(view, shard, target.name)
            for encoded, document in cache.read_views(view, shard).values():
                decode_view(encoded, cache.manifest.views.size_px)
                parse_sealed(document, "sample")
    for number in range(len(cache)):
        assert cache[number].key


def check_cache(root: Path) -> None:
    """`verify --read-data`; raises the first finding."""
    findings = verify_cache(root, read_data=True)
    if findings:
        raise DamageError(f"{findings[0].path}: {findings[0].problem}; {findings[0].remedy}")
