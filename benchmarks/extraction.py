"""What an extraction costs beside the teacher's forward, and what memory it takes.

    python -m benchmarks.extraction [IMAGES] [--rounds 5] [--limit 128] [--teacher dinov2_vits14] [--json]

Each round runs, one after the other on the same images and one core: decoding plus timm's own DeiT transform (A),
and a whole extraction of one view of each image, from listing to the last receipt, less the teacher's forward (B).
Both are counted in CPU seconds of the process. Reported is the median over rounds of B / A, with the views/s of each.
The teacher has random weights; its forward is left out by subtracting the CPU time spent in it.

Memory: how much the process grows while six units of 256 views pass, in units (the views and codes of one), beyond
what it takes with the model loaded. The forward is replaced by ready tokens there, because a CPU would take minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from benchmarks.views import make_pictures
from proteus_cache.extract.canary import CANARY_EVERY, CanaryWatch
from proteus_cache.extract.config import DEFAULT_SHARD_SIZE, ExtractConfig
from proteus_cache.extract.pipeline import extract_units, units_to_do
from proteus_cache.extract.planning import PlannedCache, plan_cache
from proteus_cache.images import list_images
from proteus_cache.teachers.teacher import Teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?", help="a folder of images; made when left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=128, help="images that are read")
    parser.add_argument("--teacher", default="dinov2_vits14", help="decides the width of the targets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.images or make_pictures(Path(folder) / "images", n=64)
        result = measure(root, Path(folder), arguments.rounds, arguments.limit, arguments.teacher)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{result['n_images']} images, {arguments.rounds} rounds, teacher {arguments.teacher}, int8")
    print(f"  decode + timm DeiT      {result['timm_ms']:8.2f} ms CPU an image (median)")
    print(f"  extract less forward    {result['extract_ms']:8.2f} ms CPU a view (median)")
    print(f"  ratio                   {result['ratio']:8.2f}   rounds {result['ratios']}")
    print(
        f"  canaries, once          {result['canary_ms']:8.0f} ms CPU with their forward: "
        f"{100 * result['canary_share']:.4f} % of {CANARY_EVERY} units of {DEFAULT_SHARD_SIZE:,} views"
    )
    print(f"  memory growth           {result['memory_units']:8.2f} units of {result['unit_mb']:.1f} MB")


def measure(root: Path, folder: Path, rounds: int, limit: int, teacher_name: str) -> dict[str, Any]:
    """CPU seconds of both sides, interleaved, and the memory growth of the last extraction."""
    growth, unit_bytes = _memory(_plan(root, folder, "memory", 6 * 256, teacher_name, shard_size=256))
    clock = _ForwardClock()
    timm_s, extract_s, forward_s, canary_s = [], [], [], []
    for number in range(rounds + 1):
        timm = _timm_seconds(root, limit)
        planned = _plan(root, folder, f"cache{number}", limit, teacher_name, shard_size=max(1, limit // 2))
        ours = _extract_seconds(planned, clock)
        if number:  # the first round warms up
            timm_s.append(timm)
            extract_s.append(ours)
            forward_s.append(clock.seconds)
            canary_s.append(_canary_seconds(planned))
    ratios = [ours / timm for ours, timm in zip(extract_s, timm_s, strict=True)]
    n_images = min(limit, len(list_images(root).table))
    view_s = (statistics.median(extract_s) + statistics.median(forward_s)) / n_images
    return {
        "n_images": n_images,
        "timm_ms": 1000 * statistics.median(timm_s) / n_images,
        "extract_ms": 1000 * statistics.median(extract_s) / n_images,
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "canary_ms": 1000 * statistics.median(canary_s),
        "canary_share": statistics.median(canary_s) / (CANARY_EVERY * DEFAULT_SHARD_SIZE * view_s),
        "memory_units": growth / unit_bytes,
        "unit_mb": unit_bytes / 1e6,
        "torch": torch.__version__,
    }


class _ForwardClock:
    """CPU time that this thread spends in the teacher's forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        forward, clock = Teacher.targets, self

        def timed(self: Teacher, views: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
            started = time.thread_time()
            targets = forward(self, views, names)
            clock.seconds += time.thread_time() - started
            return targets

        Teacher.targets = timed  # type: ignore[method-assign]  # the clock of this benchmark


def _timm_seconds(root: Path, limit: int) -> float:
    transform = create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    paths = list_images(root).table["path"].to_pylist()[:limit]
    started = time.process_time()
    for path in paths:
        with Image.open(root / path) as image:
            try:
                transform(image.convert("RGB"))
            except ValueError:  # timm draws 0 bits for posterize now and then, and Pillow refuses: draw again
                transform(image.convert("RGB"))
    return time.process_time() - started


def _plan(root: Path, folder: Path, name: str, limit: int, teacher_name: str, shard_size: int) -> PlannedCache:
    paths = list_images(root).table["path"].to_pylist()
    config = ExtractConfig(
        images=linked(root, folder / f"images-{name}", paths, limit),
        out=folder / name,
        home=folder,
        teacher=teacher_name,
        weights="random:0",
        views=1,
        shard_size=shard_size,
        workers=0,
        device="cpu",
    )
    return plan_cache(config)


def _extract(planned: PlannedCache, progress: Callable[[], None]) -> None:
    """Without canaries: two units are too few to share their cost, and a teacher that is replaced is found by them."""
    with patch("proteus_cache.extract.pipeline.CanaryWatch"):
        extract_units(
            planned,
            units_to_do(planned.cache, ["v000"]),
            device=torch.device("cpu"),
            precision="fp32",
            batch_size=8,
            workers=0,
            progress=lambda _: progress(),
        )


def _canary_seconds(planned: PlannedCache) -> float:
    """CPU seconds of one repeat of the canaries, the teacher's forward of four images included."""
    watch = CanaryWatch(planned.cache, planned.teacher.to("cpu", "fp32"), planned.codecs, 4)
    started = time.process_time()
    watch.repeat()
    return time.process_time() - started


def _extract_seconds(planned: PlannedCache, clock: _ForwardClock) -> float:
    """CPU seconds of all threads, less those in the forward."""
    clock.seconds = 0.0
    started = time.process_time()
    _extract(planned, lambda: None)
    return time.process_time() - started - clock.seconds


def _memory(planned: PlannedCache) -> tuple[int, int]:
    """(growth in bytes, bytes of one unit), without the forward's own memory."""
    manifest = planned.cache.manifest
    unit_bytes = int(manifest.shard_size * (manifest.bytes_per_view + (planned.view_bytes or 0)))
    ready = {target.name: torch.randn(8, *target.shape).to(torch.float32) for target in manifest.targets}
    instant = patch.object(Teacher, "targets", lambda self, views, names: {n: ready[n][: len(views)] for n in names})
    with instant, _PeakMemory() as memory:
        _extract(planned, lambda: None)
    return memory.growth, unit_bytes


def linked(root: Path, folder: Path, paths: list[str], count: int) -> Path:
    """`count` images as a folder of their own: the first of the list, over again where there are fewer."""
    for number in range(count):
        path = Path(paths[number % len(paths)])
        link = folder / path.parent / f"{number:06d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((root / path).absolute())
    return folder


class _PeakMemory:
    """Largest resident size within the block, less the size at its start."""

    def __enter__(self) -> _PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
        self._first = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, _resident())

    @property
    def growth(self) -> int:
        return self._peak - self._first


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
