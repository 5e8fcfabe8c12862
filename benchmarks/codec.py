"""What the codecs cost and keep: rate against distortion, speed, and what a student learns from them.

    python -m benchmarks.codec [--part rate,levels,speed,gpu,student] [--json FILE]

    rate     on trained teachers and images that nothing was fitted to: the demo teacher on scenes that are drawn, and
             with --teacher, --weights and --images another one on photographs
    levels   why klt has Lloyd-Max levels, and keeps all frequencies of a component or none; same tokens
    speed    of one core, tokens of 256 x 1536
    gpu      encode and decode beside the forward of dinov2_vitg14 with random weights, where there is a GPU
    student  the demo, trained from klt:20dB and from float16 (half an hour on two cores; only when asked for)

Ends with 1 when a goal was missed, and says which.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.codec_parts import levels, rate, speed, student
from benchmarks.codec_parts.tokens import tokens_of
from benchmarks.train import machine
from proteus_cache.demo.scenes import write_scenes
from proteus_cache.teachers.registry import load_teacher

PARTS = ("rate", "levels", "speed", "gpu", "student")
SCENES_A_CLASS = 600


def main() -> int:
    """Print the tables; 1 when a goal is missed."""
    arguments = _arguments()
    logging.getLogger("proteus_cache").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    about = machine()
    where = about["gpu"] or about["cpu"]
    print(f"{where}, {about['cores']} cores, {arguments.threads} threads, torch {about['torch']}, {about['commit']}")
    result: dict[str, Any] = dict(about)
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for part in arguments.part:
            print(f"\n{part}\n", flush=True)
            result[part], misses = _measure(part, arguments, folder)
            missed += misses
    print("\n" + ("\n".join(f"missed  {line}" for line in missed) or "every goal met"))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result | {"missed": missed}, indent=2) + "\n")
    return 1 if missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=_parts, default=PARTS[:4], help="comma separated; all but student if left out")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--folder", type=Path, help="keep scenes, tokens and runs here, and go on with what is there")
    parser.add_argument("--teacher", help="of the rate, beside the demo's")
    parser.add_argument("--weights", help="of that teacher")
    parser.add_argument("--images", type=Path, help="photographs for that teacher")
    parser.add_argument("--limit", type=int, default=4500, help="of those photographs")
    parser.add_argument("--targets", default="patch,block.1,block.1.raw", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--rounds", type=int, default=9, help="of the speeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256, help="views in a forward on the GPU")
    parser.add_argument("--seeds", type=int, default=3, help="students of each codec")
    parser.add_argument("--epochs", type=int, help="of the students; the demo's if left out")
    parser.add_argument("--codecs", default="klt:20dB", type=lambda text: text.split(","), help="of the students")
    asked = parser.parse_args()
    if (asked.teacher is None) != (asked.images is None):
        parser.error("--teacher and --images go together")
    return asked


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(PARTS)}")
    return names


def _measure(part: str, arguments: argparse.Namespace, folder: Path) -> tuple[Any, list[str]]:
    if part == "rate":
        return _rate(arguments, folder)
    if part == "levels":
        return _levels(arguments, folder), []
    if part == "speed":
        found = speed.measure_core(arguments.rounds)
        print("\n".join(speed.core_lines(found)))
        return found, speed.core_misses(found)
    if part == "gpu":
        if not torch.cuda.is_available():
            print("no GPU here")
            return None, []
        device = torch.device("cuda")
        found = speed.measure_gpu(
            "dinov2_vitg14",
            "random:0",
            device,
            batch=arguments.batch_size,
            n_fitted=2 * arguments.batch_size,
            rounds=arguments.rounds,
        )
        print("\n".join(speed.gpu_lines(found)))
        return found, speed.gpu_misses(found)
    recipe = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    found = student.measure(folder / "student", arguments.codecs, arguments.seeds, recipe)
    print("\n".join(student.lines(found)))
    return found, student.misses(found)


def _rate(arguments: argparse.Namespace, folder: Path) -> tuple[Any, list[str]]:
    found, missed = {}, []
    for name, tokens in _tokens(arguments, folder):
        print("\n".join(rate.HEAD), flush=True)
        result = rate.measure(tokens, lambda line: print(line, flush=True))
        found[name] = result
        missed += [f"{name}: {line}" for line in rate.misses(result)]
    return found, missed


def _levels(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = {}
    for name, tokens in _tokens(arguments, folder):
        found[name] = levels.measure(tokens)
        print("\n".join(levels.lines(found[name])), flush=True)
    return found


def _tokens(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Of every teacher and target, (n, T, D); says which."""
    teachers = [] if arguments.teacher is None else [(arguments.teacher, arguments.weights, arguments.images)]
    scenes = folder / "scenes"
    for name, weights, images in [("demo", None, scenes), *teachers]:
        label = name if weights is None else f"{name} {Path(weights).name}"
        kept = folder / "tokens" / f"{label.replace(' ', '-')}.pt"
        if not kept.exists():
            if images == scenes:
                write_scenes(scenes, per_class=SCENES_A_CLASS, seed=0)
            limit = sys.maxsize if images == scenes else arguments.limit
            teacher = load_teacher(name, weights=weights, home=folder / "home", size_px=None)
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tokens_of(teacher, images, arguments.targets, limit), kept)
        by_target = torch.load(kept)
        for target in arguments.targets:
            print(f"\n{label}, {target}: {' x '.join(map(str, by_target[target].shape))}\n", flush=True)
            yield f"{label}, {target}", by_target[target]


if __name__ == "__main__":
    sys.exit(main())
