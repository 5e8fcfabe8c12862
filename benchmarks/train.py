"""Training steps from a pack, against the same with everything in memory, and against a live teacher.

    python -m benchmarks.train [--teacher demo] [--student vit_demo] [--batch-size 64] [--precision bf16] [--compile]

Arms, each of which has its turn in every round; medians over the rounds, with the lowest and the highest:

    cached   a pack on the disk (hot page cache) through the loader, as `train` reads it
    limit    batches that lie on the device already: what no reader can beat; codes are decoded in each step, too
    replay   the pack's views, and the teacher in each step: `train --live --replay`
    fresh    views rendered anew from photographs, and the teacher in each step: `train --live`

With --compile, `cached` and `limit` once more with a compiled student. Every turn opens its reader anew. Before its
clock starts, what the reader had ready is thrown away and some steps are taken, so that the queue is as in the middle
of a run, and no arm lives on what was read while another had its turn.

Without --data, photographs are made up, and a pack of their views is extracted with the teacher. A teacher that is
downloaded otherwise has random weights here: the numbers do not depend on them. Several students, comma separated,
share the pack.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.extraction import linked
from benchmarks.views import make_pictures
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.images import list_images
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.loader import PREFETCH
from proteus_cache.pack.reader import open_pack
from proteus_cache.processes import Worker, usable_cores
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.data import TrainingData
from proteus_cache.train.devices import make_accelerator, resolve_device, resolve_precision
from proteus_cache.train.feed import DeviceBatch, DeviceFeed
from proteus_cache.train.fresh import JOB_VIEWS, FreshData, FreshImages
from proteus_cache.train.loop import n_readers, prepare_run
from proteus_cache.train.source import n_patches
from proteus_cache.train.speed import take_turns, timed_steps
from proteus_cache.train.steps import Run
from proteus_cache.train.stored import StoredData
from proteus_cache.workers import AHEAD

GOAL = 0.97
"""Of cached over limit."""
PICTURES = 64
SETTLING_STEPS = 4
BATCHES_IN_MEMORY = 2


def main() -> int:
    """Print the table; 1 when the goal is missed."""
    arguments = _arguments()
    logging.getLogger("proteus_cache").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        teacher = _teacher(arguments, Path(folder))
        images = arguments.images or _photographs(arguments, Path(folder))
        pack = arguments.data or _pack(arguments, images, Path(folder))
        results = [
            measure(arguments, student, pack, images, teacher, Path(folder)) for student in arguments.student.split(",")
        ]
    if arguments.json:
        json.dump(machine() | {"results": results}, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_lines(arguments, results)))
    return 0 if all(result["cached_of_limit"][0] >= GOAL for result in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--weights", help='of the teacher; "random:0" where it would be downloaded')
    parser.add_argument("--student", default="vit_demo", help="one, or several, comma separated")
    parser.add_argument("--data", type=Path, help="a pack that this teacher made; made up when left out")
    parser.add_argument("--images", type=Path, help="photographs; made up when left out")
    parser.add_argument("--batch-size", type=int, help="the student's own when left out")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--codec", default="int8", help="of the pack that is made up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="in a turn")
    parser.add_argument("--workers", type=int, help="reader processes; the usable cores less one when left out")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--compile", action="store_true", help="measure a compiled student beside")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _teacher(arguments: argparse.Namespace, folder: Path) -> Teacher:
    if arguments.weights is None and arguments.teacher.startswith("dinov2"):
        arguments.weights = "random:0"
    return load_teacher(arguments.teacher, weights=arguments.weights, home=folder, size_px=None)


def _photographs(arguments: argparse.Namespace, folder: Path) -> Path:
    """Some pictures under so many names that several batches can be made of them."""
    (folder / "pictures").mkdir()
    pictures = make_pictures(folder / "pictures", n=PICTURES)
    paths = list_images(pictures).table["path"].to_pylist()
    return linked(pictures, folder / "photographs", paths, 4 * _largest_batch(arguments))


def _largest_batch(arguments: argparse.Namespace) -> int:
    students = arguments.student.split(",")
    return max(_config(arguments, student, Path("pack")).global_batch for student in students)


def _pack(arguments: argparse.Namespace, images: Path, folder: Path) -> Path:
    config = ExtractConfig(
        images=images,
        out=folder / "cache",
        home=folder,
        teacher=arguments.teacher,
        weights=arguments.weights,
        codec=arguments.codec,
        limit=4 * _largest_batch(arguments),
        views=1,
        shard_size=512,
        device=arguments.device,
    )
    extract(config, plan_cache(config), Worker(0, 1), lambda _: None)
    return build_pack(config.out, folder / "pack", move=True).path


def _config(arguments: argparse.Namespace, student: str, pack: Path, **changes: Any) -> TrainConfig:  # its fields
    return TrainConfig(
        student=student,
        data=pack,
        out=pack.parent / "run",  # nothing is written
        epochs=1_000_000,  # the clock ends the run
        batch_size=arguments.batch_size,
        precision=arguments.precision,
        device=arguments.device,
        workers=arguments.workers,
        **changes,
    )


def measure(
    arguments: argparse.Namespace, student: str, pack: Path, images: Path, teacher: Teacher, folder: Path
) -> dict[str, Any]:
    """Steps/s of every arm with one student, and ratios taken round by round."""
    config = _config(arguments, student, pack)
    device = resolve_device(config)
    precision = resolve_precision(config, device)
    accelerator = make_accelerator(device, precision)
    stored, replay = StoredData(config, open_pack(pack)), StoredData(config, open_pack(pack), teacher)
    live = replace(config, data=None, live=True, teacher=arguments.teacher, images=images)
    fresh = FreshData(live, FreshImages(images, seed=0), teacher)
    try:
        run = prepare_run(config, stored, accelerator, precision)
        arms = {
            "cached": _arm(run, stored, arguments.steps),
            "limit": _in_memory(run, stored, arguments.steps),
            "replay": _arm(run, replay, arguments.steps),
            "fresh": _arm(run, fresh, arguments.steps),
        }
        if arguments.compile:
            compiled = prepare_run(replace(config, compile=True), stored, accelerator, precision)
            arms["cached, compiled"] = _arm(compiled, stored, arguments.steps)
            arms["limit, compiled"] = _in_memory(compiled, stored, arguments.steps)
        for data in (replay, fresh):
            data.to(accelerator.device, precision)
        seconds = take_turns(arms, arguments.rounds)
    finally:
        accelerator.end_training()
    return _summary(config, precision, accelerator, arguments.steps, seconds)


def _arm(run: Run, data: TrainingData, n_steps: int) -> Callable[[], float]:
    """Turns with batches that are read."""

    def turn() -> float:
        with _reading(run, data) as batches:
            for _ in range(_n_ahead(run, data)):
                next(batches)
            timed_steps(run, batches, data.targets_of, SETTLING_STEPS)
            return timed_steps(run, batches, data.targets_of, n_steps)

    return turn


def _in_memory(run: Run, data: TrainingData, n_steps: int) -> Callable[[], float]:
    """Turns with batches that lie on the device."""
    with _reading(run, data) as batches:
        kept = itertools.cycle(list(itertools.islice(batches, BATCHES_IN_MEMORY)))

    def turn() -> float:
        timed_steps(run, kept, data.targets_of, SETTLING_STEPS)
        return timed_steps(run, kept, data.targets_of, n_steps)

    return turn


@contextmanager
def _reading(run: Run, data: TrainingData) -> Iterator[Iterator[DeviceBatch]]:
    device = run.accelerator.device
    steps = range(sys.maxsize)
    workers = n_readers(run.config, 1)
    pin = device.type == "cuda"
    with data.open(data.order, steps, rank=0, world_size=1, n_workers=workers, pin=pin) as reader:
        yield iter(DeviceFeed(reader, run.config, n_patches(data), device))


def _n_ahead(run: Run, data: TrainingData) -> int:
    """Batches that a reader has ready or under way."""
    workers = n_readers(run.config, 1)
    if isinstance(data, FreshData):
        return -(-workers * AHEAD * JOB_VIEWS // run.config.global_batch) + 1
    return workers * PREFETCH + 1


def _summary(
    config: TrainConfig, precision: Precision, accelerator: Accelerator, n_steps: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    def ratio(above: str, below: str) -> list[float]:
        """Of rates: seconds of the one below over those of the one above, round by round; median, lowest, highest."""
        return _spread([b / a for a, b in zip(seconds[above], seconds[below], strict=True)])

    result = {
        "student": config.student,
        "batch_size": config.global_batch,
        "precision": precision,
        "workers": n_readers(config, 1),
        "device": accelerator.device.type,
        "steps_per_s": {name: _spread([n_steps / taken for taken in turns]) for name, turns in seconds.items()},
        "cached_of_limit": ratio("cached", "limit"),
        "cached_of_replay": ratio("cached", "replay"),
        "cached_of_fresh": ratio("cached", "fresh"),
    }
    if "limit, compiled" in seconds:
        result["compiled_of_eager"] = ratio("limit, compiled", "limit")
        result["compiled_cached_of_limit"] = ratio("cached, compiled", "limit, compiled")
    return result


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def machine() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout else "")


def _lines(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> list[str]:
    about = machine()
    where = about["gpu"] or about["cpu"]
    lines = [
        f"{where}, {about['cores']} cores, {about['threads']} torch threads, torch {about['torch']}, Python "
        f"{about['python']}, commit {about['commit']}",
        f"teacher {arguments.teacher}, {arguments.rounds} rounds of {arguments.steps} steps; steps/s as median (lowest "
        "to highest)",
        "",
    ]
    names = list(results[0]["steps_per_s"])
    lines += _row(["student", "batch", "precision", *names, f"cached of limit (goal {GOAL})", "of replay", "of fresh"])
    lines += _row(["---"] * (len(names) + 6))
    for result in results:
        rates = [_told(result["steps_per_s"][name], 2) for name in names]
        ratios = [_told(result[f"cached_of_{name}"], 3) for name in ("limit", "replay", "fresh")]
        lines += _row([result["student"], str(result["batch_size"]), result["precision"], *rates, *ratios])
    if arguments.compile:
        for result in results:
            lines += [
                "",
                f"{result['student']}: compiled over eager, in memory, {_told(result['compiled_of_eager'], 3)}; "
                f"cached of limit, both compiled, {_told(result['compiled_cached_of_limit'], 3)}",
            ]
    return lines


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _told(spread: list[float], digits: int) -> str:
    median, lowest, highest = (f"{value:.{digits}f}" for value in spread)
    return f"{median} ({lowest} to {highest})"


if __name__ == "__main__":
    sys.exit(main())
