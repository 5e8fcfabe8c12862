"""What trust costs: checks while training reads, and receipts and fsyncs while extraction writes.

    python -m benchmarks.safety [--repeats 7] [--samples 512] [--codes-kb 395] [--units 5] [--json]

Reading: decoded batches of a pack of 224-pixel views (codes as large as those of g/14 in int8), one process, one
core, hot page cache. One arm is the loader's own reader; the other is the same reader with every check taken out:
no CRC of codes and views, no CRC and no bounds of index records, no look at the ends of an image. Interleaved batch by
batch, in seconds of the thread; the share is the median over repeats of 1 - unchecked / checked.

Writing: a real extraction with a real architecture (random weights). All time spent in fsync, rename, link and the
reading back of receipts, and in building and sealing receipts, is added up with a clock under the storage layer and
divided by the time of the whole extraction. The writing runs beside the teacher, so this is an upper limit of what a
GPU would wait. The second look at one view of a unit is timed, too; its share is told for units of 1,024 views.

    goals: checks at most 5 % of the time of decoded reading; receipts and fsyncs at most 2 % of an extraction
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.views import make_pictures
from proteus_cache import storage
from proteus_cache.cache import writer
from proteus_cache.cache.receipt import Receipt
from proteus_cache.extract.canary import CanaryWatch
from proteus_cache.extract.config import DEFAULT_SHARD_SIZE, ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.pack import samples
from proteus_cache.pack.index import Index, Records
from proteus_cache.pack.reader import open_pack
from proteus_cache.pack.samples import Part, SampleReader
from proteus_cache.processes import Worker
from proteus_cache.tar import BLOCK
from proteus_cache.views.encode import open_encoded

BATCH = 64
SIDE_PX = 224
VIEWS_A_UNIT = 64
READING_GOAL = 0.05
WRITING_GOAL = 0.02


def main() -> int:
    """Print both shares; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--codes-kb", type=int, default=395)
    parser.add_argument("--teacher", default="dinov2_vits14", help="of the extraction")
    parser.add_argument("--units", type=int, default=5, help="units of 64 views that are extracted")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        reading = measure_reading(Path(folder, "pack"), arguments.samples, arguments.codes_kb, arguments.repeats)
        writing = measure_writing(Path(folder), arguments.teacher, arguments.units)
    met = reading["share"] <= READING_GOAL and writing["share"] <= WRITING_GOAL
    if arguments.json:
        json.dump({"reading": reading, "writing": writing, "met": met}, sys.stdout, indent=2)
        print()
        return 0 if met else 1
    low, high = min(reading["shares"]), max(reading["shares"])
    print(
        f"reading  {reading['checked_views_per_s']:,.0f} views/s checked, {reading['bare_views_per_s']:,.0f} unchecked"
    )
    print(
        f"  checks             {reading['share']:6.1%} of the time ({low:.1%} to {high:.1%}), goal {READING_GOAL:.0%}"
    )
    print(f"writing  {writing['units']} units of {writing['unit_mb']:.1f} MB, {writing['unit_s']:.1f} s each")
    print(f"  fsync, rename, link {1000 * writing['disk_s']:7.1f} ms a unit")
    print(f"  receipts            {1000 * writing['receipt_s']:7.1f} ms a unit")
    print(f"  both               {writing['share']:6.2%} of the time, goal {WRITING_GOAL:.0%}")
    print(
        f"  second look         {1000 * writing['look_s']:7.1f} ms a unit, {writing['look_share']:.2%} at 1,024 views"
    )
    print("met" if met else "MISSED")
    return 0 if met else 1


def measure_reading(root: Path, n_samples: int, codes_kb: int, repeats: int) -> dict[str, Any]:
    """Decoded reading with and without checks, interleaved."""
    from tests.pack.synthetic import write_pack

    write_pack(
        root,
        n_images=n_samples,
        shard_size=n_samples // 2,
        views=("v000",),
        side_px=SIDE_PX,
        view_format="jpeg",
        patch_bytes=codes_kb * 1000,
    )
    pack = open_pack(root)
    checked, bare = pack.sample_reader(), _UncheckedReader(pack.sample_reader().layout)
    codes = np.empty((BATCH, pack.code_bytes), dtype=np.uint8)
    views = np.empty((BATCH, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    rows = np.arange(BATCH)
    order = pack.training_order(seed=1, batch_size=BATCH)
    shares, totals = [], {"checked": 0.0, "bare": 0.0}
    for repeat in range(repeats + 1):
        spent = {"checked": 0.0, "bare": 0.0}
        for step in range(order.steps_per_epoch):
            part = Part("v000", order.batch(step).records, rows)
            for name in ("checked", "bare") if step % 2 else ("bare", "checked"):
                with _unchecked() if name == "bare" else nullcontext():
                    started = time.thread_time()
                    (checked if name == "checked" else bare).read(part, codes, views)
                    spent[name] += time.thread_time() - started
        if repeat:  # the first one warms caches
            shares.append(1 - spent["bare"] / spent["checked"])
            totals = {name: total + spent[name] for name, total in totals.items()}
    n_views = repeats * order.steps_per_epoch * BATCH
    return {
        "share": statistics.median(shares),
        "shares": [round(share, 4) for share in shares],
        "checked_views_per_s": n_views / totals["checked"],
        "bare_views_per_s": n_views / totals["bare"],
    }


class _UncheckedReader(SampleReader):
    """The same reads without a checksum."""

    def _members(
        self, view: str, records: Records, codes: Iterable[NDArray[np.uint8]], places: Iterable[NDArray[np.uint8]]
    ) -> Iterator[int]:
        between = self._between[: (-self.layout.code_bytes) % BLOCK + BLOCK]
        columns = zip(records["tar"].tolist(), records["codes_offset"].tolist(), codes, places, strict=True)
        for row, (tar, offset, code, place) in enumerate(columns):
            os.preadv(self._tar(view, tar), (code, between, place), offset)  # type: ignore[arg-type]  # buffers
            yield row


@contextmanager
def _unchecked() -> Iterator[None]:
    """Index records and views are taken as they are."""

    def decode(data: memoryview, side_px: int) -> NDArray[np.uint8]:
        image = open_encoded(data)
        assert image is not None
        return np.array(image)

    with (
        patch.object(Index, "read", lambda index, numbers: index._records[numbers]),
        patch.object(samples, "decode_view", decode),
    ):
        yield


def measure_writing(folder: Path, teacher: str, n_units: int) -> dict[str, Any]:
    """One extraction of `n_units` units of 64 views, with a clock in the storage layer and around receipts."""
    images = make_pictures(folder / "images", n=VIEWS_A_UNIT * n_units)
    config = ExtractConfig(
        images=images,
        out=folder / "cache",
        home=folder,
        teacher=teacher,
        weights="random:0",
        views=1,
        shard_size=VIEWS_A_UNIT,
        workers=0,
        device="cpu",
    )
    planned = plan_cache(config)
    clock = _Clock()
    sealed, build, look = Receipt.sealed, writer._receipt, CanaryWatch.look_at
    with (
        patch.object(storage, "disk", _ClockedDisk(clock)),
        patch.object(Receipt, "sealed", lambda receipt: clock.timed("receipt", lambda: sealed(receipt))),
        patch.object(writer, "_receipt", lambda *given: clock.timed("receipt", lambda: build(*given))),
        patch.object(CanaryWatch, "look_at", lambda watch, unit: clock.timed("look", lambda: look(watch, unit))),
    ):
        started = time.perf_counter()
        result = extract(config, planned, Worker(0, 1), lambda _: None)
        seconds = time.perf_counter() - started
    receipt = planned.cache.receipt("v000", 0)
    assert receipt is not None
    assert result.units_committed == n_units
    disk_s, receipt_s = clock.seconds["disk"], clock.seconds["receipt"]
    return {
        "units": n_units,
        "unit_mb": sum(file.size for file in receipt.files.values()) / 1e6,
        "unit_s": seconds / n_units,
        "disk_s": disk_s / n_units,
        "receipt_s": receipt_s / n_units,
        "share": (disk_s + receipt_s) / seconds,
        "look_s": clock.seconds["look"] / n_units,
        "look_share": clock.seconds["look"] / seconds * VIEWS_A_UNIT / DEFAULT_SHARD_SIZE,
        "teacher": teacher,
    }


class _Clock:
    """Seconds by kind."""

    def __init__(self) -> None:
        self.seconds = {"disk": 0.0, "receipt": 0.0, "look": 0.0}

    def timed(self, kind: str, call: Any) -> Any:  # Any: whatever the call returns
        started = time.perf_counter()
        try:
            return call()
        finally:
            self.seconds[kind] += time.perf_counter() - started


class _ClockedDisk(storage.Disk):
    """Adds up what durability takes; writing the bytes themselves is not part of it."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def sync(self, descriptor: int) -> None:
        self._clock.timed("disk", lambda: super(_ClockedDisk, self).sync(descriptor))

    def rename(self, old: Path, new: Path) -> None:
        self._clock.timed("disk", lambda: super(_ClockedDisk, self).rename(old, new))

    def link(self, old: Path, new: Path) -> None:
        self._clock.timed("disk", lambda: super(_ClockedDisk, self).link(old, new))

    def status(self, path: Path) -> os.stat_result:
        found: os.stat_result = self._clock.timed("disk", lambda: super(_ClockedDisk, self).status(path))
        return found


if __name__ == "__main__":
    sys.exit(main())
