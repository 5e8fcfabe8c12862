"""Reading a pack against `webdataset` on the same tars, and against a bare loop of preadv and CRC-32C.

One process on one core, hot page cache, arms interleaved, medians of ratios taken repeat by repeat. All arms
put the codes of a batch into one array; ours and the bare loop read in training order and check every
checksum, webdataset streams and checks none.

    raw      codes and encoded views                      goals: 3 x webdataset at 100 KB, 2.5 x at 400 KB
    bare     the same bytes by preadv and CRC-32C alone   goal: ours reaches 0.7 of it
    decoded  pixels (uint8) and codes, as torch tensors   goal: 1.3 x webdataset

Run: python benchmarks/reading.py [--repeats 7] [--samples 1024]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from proteus_cache.pack.loader import open_loader
from proteus_cache.pack.order import TrainingOrder
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.samples import tar_name

BATCH = 64
SIDE_PX = 224
RAW_GOALS = {100: 3.0, 400: 2.5}
DECODED_GOAL = 1.3
BARE_GOAL = 0.7


def main() -> int:
    """Print every ratio; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    met = True
    with tempfile.TemporaryDirectory() as folder:
        for kilobytes in RAW_GOALS:
            pack = _made_up_pack(Path(folder, str(kilobytes)), arguments.samples, kilobytes * 1000)
            met &= _compare(pack, kilobytes, arguments.repeats)
    return 0 if met else 1


def _made_up_pack(root: Path, n_samples: int, code_bytes: int) -> Pack:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.pack.synthetic import write_pack

    write_pack(
        root,
        n_images=n_samples,
        shard_size=n_samples // 2,
        views=("v000",),
        side_px=SIDE_PX,
        view_format="jpeg",
        patch_bytes=code_bytes,
    )
    return open_pack(root)


def _compare(pack: Pack, kilobytes: int, repeats: int) -> bool:
    order = pack.training_order(seed=1, batch_size=BATCH)
    arms: dict[str, Callable[[], None]] = {
        "ours raw": _ours_raw(pack, order),
        "webdataset raw": _webdataset_raw(pack),
        "bare": _bare(pack, order),
        "ours decoded": _ours_decoded(pack, order),
        "webdataset decoded": _webdataset_decoded(pack),
    }
    passes = {name: 2 if "decoded" in name else 8 for name in arms}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            for _ in range(passes[name]):
                arm()
            if repeat > 0:  # the first one warms caches
                times[name].append((time.perf_counter() - started) / passes[name])
    n_samples = order.steps_per_epoch * BATCH
    for name, seconds in times.items():
        print(f"{kilobytes:4} KB  {name:18}  {n_samples / statistics.median(seconds):9,.0f} views/s")
    met = _ratio(times, "webdataset raw", "ours raw", RAW_GOALS[kilobytes], kilobytes)
    met &= _ratio(times, "bare", "ours raw", BARE_GOAL, kilobytes)
    return met & _ratio(times, "webdataset decoded", "ours decoded", DECODED_GOAL, kilobytes)


def _ratio(times: dict[str, list[float]], reference: str, ours: str, goal: float, kilobytes: int) -> bool:
    ratios = [a / b for a, b in zip(times[reference], times[ours], strict=True)]
    median = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    verdict = "met" if median >= goal else "MISSED"
    print(f"{kilobytes:4} KB  {ours} / {reference}: {median:.2f} ({spread}), goal {goal}: {verdict}")
    return median >= goal


def _ours_raw(pack: Pack, order: TrainingOrder) -> Callable[[], None]:
    reader = pack.sample_reader()
    codes = np.empty((BATCH, pack.code_bytes), dtype=np.uint8)
    largest = max(int(reader.view_sizes("v000", order.batch(s).records).sum()) for s in range(order.steps_per_epoch))
    view_bytes = np.empty(largest, dtype=np.uint8)

    def read() -> None:
        for step in range(order.steps_per_epoch):
            reader.read_raw("v000", order.batch(step).records, codes, view_bytes)

    return read


def _bare(pack: Pack, order: TrainingOrder) -> Callable[[], None]:
    index = pack.sample_reader().index("v000")
    codes = np.empty((BATCH, pack.code_bytes), dtype=np.uint8)
    batches, largest = [], 0
    fields = ("tar", "codes_offset", "codes_crc32c", "view_offset", "view_size", "view_crc32c")
    for step in range(order.steps_per_epoch):
        records = index.read(order.batch(step).records)
        batches.append(list(zip(*(records[field].tolist() for field in fields), strict=True)))
        largest = max(largest, int(records["view_size"].sum()))
    view_bytes = np.empty(largest, dtype=np.uint8)
    files = [os.open(Path(pack.path, tar_name("v000", tar)), os.O_RDONLY) for tar in range(len(pack.counts("v000")))]

    def read() -> None:
        for batch in batches:
            end = 0
            for row, (tar, codes_offset, codes_crc, view_offset, view_size, view_crc) in enumerate(batch):
                code, view = codes[row], view_bytes[end : end + view_size]
                end += view_size
                os.preadv(files[tar], [code], codes_offset)
                os.preadv(files[tar], [view], view_offset)  # type: ignore[list-item]  # arrays are buffers
                if google_crc32c.value(code) != codes_crc or google_crc32c.value(view) != view_crc:
                    raise SystemExit("the tars changed under the benchmark")

    return read


def _ours_decoded(pack: Pack, order: TrainingOrder) -> Callable[[], None]:
    # One loader for all repeats, as one serves a whole training run; it reads when asked, nothing ahead.
    batches = open_loader(pack, order, first_step=0, last_step=sys.maxsize)

    def read() -> None:
        n_views = 0
        for batch in itertools.islice(batches, order.steps_per_epoch):
            n_views += batch.views.shape[0]
            assert batch.codes.dtype == torch.uint8
        assert n_views == order.steps_per_epoch * BATCH

    return read


def _webdataset(pack: Pack) -> Any:  # webdataset ships no types
    import webdataset

    urls = [str(Path(pack.path, tar_name("v000", tar))) for tar in range(len(pack.counts("v000")))]
    return webdataset.WebDataset(urls, shardshuffle=False)


def _webdataset_raw(pack: Pack) -> Callable[[], None]:
    codes = np.empty((BATCH, pack.code_bytes), dtype=np.uint8)

    def read() -> None:
        views = []
        for number, sample in enumerate(_webdataset(pack)):
            codes[number % BATCH] = np.frombuffer(sample["codes"], dtype=np.uint8)
            views.append(sample["jpg"])
            if len(views) == BATCH:
                views = []

    return read


def _webdataset_decoded(pack: Pack) -> Callable[[], None]:
    def collate(samples: list[tuple[Any, bytes]]) -> tuple[torch.Tensor, torch.Tensor]:
        views = torch.from_numpy(np.stack([view for view, _ in samples]))
        codes = torch.from_numpy(np.stack([np.frombuffer(code, dtype=np.uint8) for _, code in samples]))
        return views, codes

    def read() -> None:
        n_views = 0
        samples = _webdataset(pack).decode("rgb8").to_tuple("jpg", "codes")
        for views, codes in samples.batched(BATCH, collation_fn=collate):
            n_views += views.shape[0]
            assert views.dtype == codes.dtype == torch.uint8
        assert n_views == len(pack)

    return read


if __name__ == "__main__":
    sys.exit(main())
