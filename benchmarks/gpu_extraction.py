"""How much of the teacher's own speed an extraction on a GPU keeps.

    python -m benchmarks.gpu_extraction [IMAGES] [--teacher dinov2_vitg14] [--views 2048] [--rounds 5] [--json]

Each round runs, one after the other: the teacher's bare forward on views that lie on the GPU already (A), and an
extraction of one view index to disk, from JPEG files to the last receipt (B), with workers started and the pipeline
full, that is from the first committed unit to the last. Reported is the median over rounds of B / A, and both rates.
The teacher has random weights. Without IMAGES it reads pictures that it makes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.extraction import linked
from benchmarks.views import make_pictures
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.pipeline import Progress, extract_units, units_to_do
from proteus_cache.extract.planning import PlannedCache, plan_cache
from proteus_cache.extract.rendering import default_workers
from proteus_cache.images import list_images
from proteus_cache.processes import usable_cores
from proteus_cache.teachers.teacher import Teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?", help="a folder of images; made when left out")
    parser.add_argument("--teacher", default="dinov2_vitg14")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--views", type=int, default=4096, help="views in an extraction")
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("nothing measured: torch finds no GPU here")
        return
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.images or make_pictures(Path(folder) / "images", n=256)
        result = measure(root, Path(folder), arguments)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{result['device']}, {result['cores']} cores, torch {result['torch']}")
    print(f"{arguments.teacher} {result['precision']}, {arguments.codec}, batch {arguments.batch_size}")
    print(f"  bare forward    {result['forward']:8.0f} views/s (median)")
    print(f"  extraction      {result['extract']:8.0f} views/s, {result['written_mb_s']:.0f} MB/s written (median)")
    print(f"  ratio           {result['ratio']:8.3f}   rounds {result['ratios']}")


def measure(root: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of both sides, interleaved."""
    device = torch.device("cuda")
    paths = list_images(root).table["path"].to_pylist()
    images = linked(root, folder / "linked", paths, arguments.views)
    config = ExtractConfig(
        images=images,
        out=folder / "cache",
        home=folder,
        teacher=arguments.teacher,
        weights="random:0",
        codec=arguments.codec,
        views=arguments.rounds + 1,
        shard_size=arguments.shard_size,
    )
    planned = plan_cache(config)
    forward, extract, written = [], [], []
    for number in range(arguments.rounds + 1):
        bare = _forward_rate(planned.teacher, planned, device, arguments.batch_size)
        ours, megabytes = _extract_rate(planned, f"v{number:03d}", device, arguments.batch_size)
        if number:  # the first round warms up
            forward.append(bare)
            extract.append(ours)
            written.append(megabytes)
    ratios = [ours / bare for ours, bare in zip(extract, forward, strict=True)]
    return {
        "device": torch.cuda.get_device_name(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "precision": planned.cache.manifest.teacher.precision,
        "forward": statistics.median(forward),
        "extract": statistics.median(extract),
        "written_mb_s": statistics.median(written),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _forward_rate(teacher: Teacher, planned: PlannedCache, device: torch.device, batch_size: int) -> float:
    side = planned.spec.size_px
    views = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8, device=device)
    names = [target.name for target in planned.cache.manifest.targets]
    teacher.to(device, planned.cache.manifest.teacher.precision)
    for _ in range(3):
        teacher.targets(views, names)
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 3:
        for _ in range(4):
            teacher.targets(views, names)
        torch.cuda.synchronize()
        count += 4 * batch_size
    return count / (time.perf_counter() - started)


def _extract_rate(planned: PlannedCache, view: str, device: torch.device, batch_size: int) -> tuple[float, float]:
    """(views/s, MB/s written) between the first and the last committed unit."""
    marks: list[tuple[float, Progress]] = []

    def mark(at: Progress) -> None:
        if not marks or at.units_committed > marks[-1][1].units_committed:
            marks.append((time.perf_counter(), at))

    extract_units(
        planned,
        units_to_do(planned.cache, [view]),
        device=device,
        precision=planned.cache.manifest.teacher.precision,
        batch_size=batch_size,
        workers=default_workers(usable_cores(), 1),
        progress=mark,
    )
    first = next(entry for entry in marks if entry[1].units_committed)
    last = marks[-1]
    seconds = last[0] - first[0]
    units = last[1].units_committed - first[1].units_committed
    n_views = units * planned.cache.manifest.shard_size
    return n_views / seconds, (last[1].bytes_written - first[1].bytes_written) / seconds / 1e6


if __name__ == "__main__":
    main()
