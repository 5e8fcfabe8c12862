"""How far a student trained from stored targets is from one trained by the live teacher on the same views.

For each codec the same images go through the same teacher into a cache; then the student is trained twice for the same
steps, from the stored targets and as a replay (`train --live --replay`). Everything else is equal: views, order, masks,
initial weights. float32 keeps the teacher's own numbers, so its row is rounding alone.

    losses    largest relative difference of any loss at any step
    weights   largest absolute difference of any weight after the last step, and the distance between the two students
              as a share of the way that the student went

Run: python benchmarks/replay.py --images DIR --teacher vit --weights FILE [--student vit_demo] [--steps 50]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.pack.build import run_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.processes import Worker
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train

CODECS = ("float32", "float16", "int8")


def main() -> None:
    """Print a table, one row a codec."""
    asked = _arguments()
    torch.manual_seed(0)
    what = f"{asked.student} from {asked.teacher}, {asked.steps} steps of {asked.batch_size} views"
    print(f"{what}, lr {asked.lr:g}, fp32 on the CPU")
    print("| codec | losses | weights | distance / way |")
    print("| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for codec in asked.codecs:
            pack = _pack(Path(folder), codec, asked)
            start = _train(pack, Path(folder, f"{codec}-start"), asked, live=False, steps=1, lr=1e-12)
            cached = _train(pack, Path(folder, f"{codec}-cached"), asked, live=False, steps=asked.steps, lr=asked.lr)
            live = _train(pack, Path(folder, f"{codec}-live"), asked, live=True, steps=asked.steps, lr=asked.lr)
            largest, share = _distance(cached, live, start)
            print(f"| {codec} | {_loss_difference(cached, live):.1e} | {largest:.1e} | {share:.1e} |", flush=True)


def _pack(folder: Path, codec: str, asked: argparse.Namespace) -> Path:
    config = ExtractConfig(
        images=asked.images,
        out=folder / f"cache-{codec}",
        home=folder / "home",
        teacher=asked.teacher,
        weights=asked.weights,
        views=1,
        codec=codec,
        device="cpu",
    )
    extract(config, plan_cache(config), Worker(0, 1), lambda _: None)
    out = folder / codec
    run_pack(plan_pack(config.out, out), workers=1)
    return out


def _train(pack: Path, out: Path, asked: argparse.Namespace, *, live: bool, steps: int, lr: float) -> Path:
    config = TrainConfig(
        student=asked.student,
        data=pack,
        out=out,
        live=live,
        teacher=asked.teacher if live else None,
        teacher_weights=asked.weights if live else None,
        batch_size=asked.batch_size,
        max_steps=steps,
        lr=lr,
        warmup_epochs=0,
        schedule_lag_epochs=0,
        device="cpu",
    )
    train(config, home=pack.parent / "home")
    return out


def _loss_difference(first: Path, second: Path) -> float:
    pairs = zip(_losses(first), _losses(second), strict=True)
    return max(abs(a - b) / b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def _losses(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[value for name, value in line.items() if name.startswith("loss")] for line in lines if "loss" in line]


def _distance(first: Path, second: Path, start: Path) -> tuple[float, float]:
    """Largest difference of a weight, and the distance of two students over the length of the way from the start."""
    ours, theirs, begin = (load_file(run / "student.safetensors") for run in (first, second, start))
    largest = max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())
    apart = math.sqrt(sum(float((tensor - theirs[name]).square().sum()) for name, tensor in ours.items()))
    way = math.sqrt(sum(float((tensor - begin[name]).square().sum()) for name, tensor in ours.items()))
    return largest, apart / way


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--student", default="vit_demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--codecs", type=lambda text: text.split(","), default=CODECS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
