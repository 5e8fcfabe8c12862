"""What a view costs, against decoding plus timm's own DeiT transform of the same images, on one core.

    python benchmarks/views.py [IMAGES] [--rounds 5] [--limit 200] [--json]

Both sides read the same files in turn, image by image, so that a busy machine slows both alike; reported is
the median over rounds of (time for our views) / (time for timm's). Ours does more: it hashes the source,
writes the recipe down, encodes the view and decodes it again. Without IMAGES it reads pictures that it makes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from proteus_cache.images import list_images
from proteus_cache.views.encode import decode_view, digest_pixels, encode_view
from proteus_cache.views.make import make_view
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.render import render
from proteus_cache.views.source import read_source
from proteus_cache.views.spec import ViewSpec

SPEC = ViewSpec()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?", help="a folder of images; made when left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=200, help="images that are read")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.images or make_pictures(Path(folder), n=32)
        result = measure(root, arguments.rounds, arguments.limit)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{result['n_images']} images, {arguments.rounds} rounds, milliseconds for each image (median round)")
    for name, milliseconds in result["milliseconds"].items():
        print(f"  {name:32} {milliseconds:8.3f}")
    print(f"make_view / timm: {result['ratio']:.3f} (rounds {', '.join(f'{r:.3f}' for r in result['ratios'])})")


def measure(root: Path, rounds: int, limit: int) -> dict[str, Any]:
    """Time both sides on the images below `root`, and the parts of ours."""
    listing = list_images(root)
    rows = listing.table.slice(0, limit).to_pylist()
    transform = create_transform(
        SPEC.size_px,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )

    def ours(row: dict[str, Any], view: str) -> None:
        make_view(root / row["path"], row["path"], row["key"], row["label"], view, SPEC)

    def timms(row: dict[str, Any], view: str) -> None:
        # timm draws 0 bits for posterize now and then, and Pillow refuses.
        for _ in range(10):
            try:
                with Image.open(root / row["path"]) as image:
                    transform(image.convert("RGB"))
                return
            except ValueError:
                continue

    for row in rows[:8]:
        ours(row, "v000")
        timms(row, "v000")
    totals = [interleaved(rows, f"v{number:03d}", ours, timms) for number in range(rounds)]
    ratios = [our / timm for our, timm in totals]
    milliseconds = {
        "make_view": statistics.median(our for our, _ in totals) / len(rows) * 1e3,
        "decode and timm's transform": statistics.median(timm for _, timm in totals) / len(rows) * 1e3,
        **parts(root, rows),
    }
    return {
        "n_images": len(rows),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "milliseconds": milliseconds,
    }


def interleaved(
    rows: list[dict[str, Any]], view: str, *sides: Callable[[dict[str, Any], str], None]
) -> tuple[float, ...]:
    """Seconds that each side took over all rows, the sides taking turns in changing order."""
    spent = [0.0] * len(sides)
    for number, row in enumerate(rows):
        for offset in range(len(sides)):
            side = (number + offset) % len(sides)
            start = time.perf_counter()
            sides[side](row, view)
            spent[side] += time.perf_counter() - start
    return tuple(spent)


def parts(root: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds for each step of ours, one image after the other."""
    spent: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    for row in rows:
        with timed("  read, decode, hash the source"):
            source = read_source(root / row["path"])
        with timed("  draw"):
            recipe = draw_recipe(SPEC, row["key"], "v000", source.width, source.height)
        with timed("  render"):
            drawn = render(source.image, recipe, SPEC)
        with timed("  encode"):
            data = encode_view(drawn, SPEC.view_format)
        with timed("  decode the view"):
            pixels = decode_view(data, SPEC.size_px)
        with timed("  digest"):
            digest_pixels(pixels)
    return {name: seconds / len(rows) * 1e3 for name, seconds in spent.items()}


def make_pictures(folder: Path, n: int) -> Path:
    """Write `n` JPEGs of 500 x 375 pixels with the falling spectrum of photographs."""
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        layers = []
        for side in (4, 16, 64, 375):
            noise = draws.integers(0, 256, (side, side, 3), dtype=np.uint8)
            layer = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
            layers.append(np.asarray(layer, dtype=np.float64) / (1 + side / 16))
        picture = sum(layers) / sum(1 / (1 + side / 16) for side in (4, 16, 64, 375))
        Image.fromarray(np.asarray(picture).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main()
