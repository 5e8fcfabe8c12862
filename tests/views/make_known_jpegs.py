"""Makes the four JPEGs of `proteus_cache/views/known_jpegs/`, anew only if their kinds ever change.

    python -m tests.views.make_known_jpegs FOLDER

Other bytes mean other digests than the manifests of caches have, so that no such cache could be continued.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int) -> Image.Image:
    """Slopes, rings and hard edges of colour, in whole numbers."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // (width - 1)
    green = (x * x + y * y) // 9 % 256
    blue = np.where((x // 7 + y // 5) % 2 == 0, 230, 255 * y // (height - 1))
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def main(folder: Path) -> None:
    """Write the four."""
    folder.mkdir(parents=True, exist_ok=True)
    picture(61, 45).save(folder / "baseline_420.jpg", quality=85, subsampling=2)
    picture(48, 48).save(folder / "view_444.jpg", quality=95, subsampling=0)
    picture(56, 40).save(folder / "progressive.jpg", quality=80, subsampling=1, progressive=True)
    picture(37, 29).convert("L").save(folder / "grey_odd.jpg", quality=75)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
