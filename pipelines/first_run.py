"""The main job, end to end, on small images made here: a minute or two on two cores, no download.

    python pipelines/first_run.py [FOLDER]

Draws 200 labelled JPEGs (five kinds of pattern), then runs the commands a user would run, one after the
other: extract, pack, train, eval, info, verify. The teacher has random weights, so its student learns nothing
of use; what is shown is that every step works on this machine, and what each leaves on disk. Run again it
goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGES_OF_CLASS: Final = 40
SEED: Final = 0
SIDES_PX: Final = (96, 160)
VIEW_PX: Final = 112
"""Views no larger than the images; the default would be the teacher's 224."""
TRAIN_STEPS: Final = 12

Grid = NDArray[np.float64]
"""(H, W)."""


def main() -> int:
    """Make the images, run the commands, print a summary; the first status that is not 0, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("first-run"), help="everything is written here")
    folder: Path = parser.parse_args().folder
    started = time.monotonic()
    print(f"Drawing {len(PATTERNS) * IMAGES_OF_CLASS} images into {folder / 'images'}", flush=True)
    draw_images(folder / "images")

    timings: list[tuple[str, float]] = []
    for arguments in commands(folder):
        began = time.monotonic()
        status = run_command(arguments, home=folder / "home")
        if status != 0:
            print(f"\nproteus-cache {arguments[0]} ended with status {status}; see above", file=sys.stderr)
            return status
        timings.append((arguments[0], time.monotonic() - began))
    print(summary(folder, timings, time.monotonic() - started))
    return 0


def commands(folder: Path) -> Iterator[list[str]]:
    """The commands of the main job, in order, as a user would type them after `proteus-cache`."""
    images, cache, pack, run = (str(folder / name) for name in ("images", "cache", "pack", "run"))
    teacher = ["--teacher", "dinov2_vits14", "--weights", "random:0"]
    views = ["--views", "2", "--size", str(VIEW_PX)]
    student = ["--student", "vit_ti14", "--batch-size", "16", "--max-steps", str(TRAIN_STEPS), "--resume"]
    yield ["extract", *teacher, "--images", images, "--out", cache, *views]
    yield ["pack", cache, "--out", pack]
    yield ["train", *student, "--data", pack, "--out", run]
    yield ["eval", run, "--images", images]
    for path in (cache, pack, run):
        yield ["info", path]
    for path in (cache, pack):
        yield ["verify", path, "--read-data"]


def run_command(arguments: list[str], *, home: Path) -> int:
    """Run one command of proteus-cache, its output shown as it comes; its exit status."""
    print(f"\n$ proteus-cache {shlex.join(arguments)}", flush=True)
    # A home of its own: nothing outside of the folder is read or written.
    environment = os.environ | {"PROTEUS_HOME": str(home)}
    command = [sys.executable, "-m", "proteus_cache", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def summary(folder: Path, timings: list[tuple[str, float]], total_s: float) -> str:
    """What happened, in a few lines."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timings if name not in ("info", "verify"))
    return "\n".join(
        [
            "",
            f"Everything ran, in {total_s:.0f} s ({took}).",
            f"Training loss: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}.",
            "The teacher had random weights and the student a few steps, so the accuracies above say nothing",
            "about either; they show that the way from images to a student works on this machine.",
            "With photographs in IMAGES/train and the real teacher:",
            "    proteus-cache extract --teacher dinov2_vitg14 --images IMAGES/train",
            "    proteus-cache train --student vit_s14",
            f"All files are in {folder}; remove the folder when you have seen enough.",
        ]
    )


def draw_images(folder: Path) -> None:
    """Draw the labelled images, one folder for each class; those that are there are kept."""
    for number, (name, draw) in enumerate(PATTERNS.items()):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for index in range(IMAGES_OF_CLASS):
            path = target / f"{name}_{index:03d}.jpg"
            if not path.exists():
                # Named last, so that a killed run leaves no torn image under its name.
                unfinished = path.with_suffix(".part")
                image = draw_image(draw, np.random.default_rng([SEED, number, index]))
                image.save(unfinished, "JPEG", quality=90)
                unfinished.replace(path)


def draw_image(draw: Callable[[Grid, Grid, np.random.Generator], Grid], random: np.random.Generator) -> Image.Image:
    """One image: a pattern between two random colours, turned, shaded and with some noise."""
    height, width = random.integers(*SIDES_PX, size=2, endpoint=True)
    angle = random.uniform(0, np.pi)
    y, x = np.mgrid[0:height, 0:width] - np.array([height / 2, width / 2]).reshape(2, 1, 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    share = np.clip(draw(along, across, random), 0, 1)[..., np.newaxis]
    dark, light = random.uniform(0, 110, 3), random.uniform(145, 255, 3)
    shade = 1 - 0.3 * random.uniform() * (x / width + 0.5)[..., np.newaxis]
    pixels = (dark + share * (light - dark)) * shade + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _stripes(along: Grid, _: Grid, random: np.random.Generator) -> Grid:
    return 0.5 + 2 * np.sin(along * 2 * np.pi / random.uniform(10, 24))


def _checks(along: Grid, across: Grid, random: np.random.Generator) -> Grid:
    period = 2 * np.pi / random.uniform(18, 36)
    return 0.5 + 6 * np.sin(along * period) * np.sin(across * period)


def _rings(along: Grid, across: Grid, random: np.random.Generator) -> Grid:
    left, top = random.uniform(-25, 25, 2)
    radius: Grid = np.hypot(along - left, across - top)
    return 0.5 + 2 * np.sin(radius * 2 * np.pi / random.uniform(10, 24))


def _dots(along: Grid, across: Grid, random: np.random.Generator) -> Grid:
    spacing = random.uniform(16, 30)
    off_along, off_across = (axis - spacing * np.round(axis / spacing) for axis in (along, across))
    light: Grid = 0.3 * spacing + 0.5 - np.hypot(off_along, off_across)
    return light


def _blob(along: Grid, across: Grid, random: np.random.Generator) -> Grid:
    radius, stretch = random.uniform(20, 40), random.uniform(1, 2)
    return 0.5 + 0.2 * (radius - np.hypot(along / stretch, across))


PATTERNS: Final[dict[str, Callable[[Grid, Grid, np.random.Generator], Grid]]] = {
    "blob": _blob,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "stripes": _stripes,
}
"""Class name to the pattern: (along, across) pixel coordinates about the centre to light, 0 to 1."""


if __name__ == "__main__":
    sys.exit(main())
