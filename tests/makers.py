"""Small real inputs for tests: photographs-to-be, a tiny teacher, and a cache made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import ExtractResult, extract
from proteus_cache.processes import Worker
from proteus_cache.teachers.canary import canary_images

SIZE_PX, PATCH_PX, WIDTH, DEPTH = 32, 8, 24, 2
N_PATCHES = (SIZE_PX // PATCH_PX) ** 2


def make_images(folder: Path, n_images: int, n_classes: int = 3, seed: int = 0) -> Path:
    """JPEG files of smooth random colour in class folders, of several sizes."""
    rng = np.random.default_rng(seed)
    for number in range(n_images):
        height, width = rng.integers(30, 60, 2)
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = folder / f"class_{number % n_classes}" / f"image_{number:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


def make_teacher(path: Path, seed: int = 0, size_px: int = SIZE_PX, patch_px: int = PATCH_PX) -> Path:
    """A tiny ViT with random weights, in the format of `--teacher vit --weights FILE`."""
    architecture = {
        "img_size": size_px,
        "patch_size": patch_px,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "num_classes": 0,
        "init_values": 1.0,
        "global_pool": "token",
    }
    torch.manual_seed(seed)
    model = VisionTransformer(**architecture)  # type: ignore[arg-type]  # one dict of arguments
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    metadata = {
        "timm_vision_transformer": json.dumps(architecture),
        "pixel_mean": "[0.5, 0.4, 0.3]",
        "pixel_std": "[0.2, 0.25, 0.3]",
    }
    save_file(model.state_dict(), path, metadata=metadata)
    return path


def make_config(folder: Path, n_images: int = 10, **changes: Any) -> ExtractConfig:  # fields of the config
    """An extraction of `n_images` new images by a new tiny teacher into `folder/cache`."""
    if not (folder / "images").exists():
        make_images(folder / "images", n_images)
        make_teacher(folder / "teacher.safetensors")
    config = ExtractConfig(
        images=folder / "images",
        out=folder / "cache",
        home=folder / "home",
        teacher="vit",
        weights=str(folder / "teacher.safetensors"),
        views=2,
        shard_size=4,
        batch_size=3,
        workers=0,
        device="cpu",
    )
    return replace(config, **changes)


def run_extract(config: ExtractConfig, worker: Worker | None = None) -> ExtractResult:
    """Plan and extract in this process."""
    return extract(config, plan_cache(config), worker or Worker(0, 1), lambda _: None)


def make_cache(folder: Path, n_images: int = 10, **changes: Any) -> Cache:  # fields of the config
    """A finished small cache."""
    config = make_config(folder, n_images, **changes)
    run_extract(config)
    return open_cache(config.out)


def shows_canaries(views: torch.Tensor) -> bool:
    """Whether this batch for the teacher is one of fixed images, not of views."""
    fixed = torch.from_numpy(canary_images(views.shape[1]))
    return any(torch.equal(views[0].cpu(), image) for image in fixed)


def identity(cache: Cache) -> dict[str, list[object]]:
    """Units, keys and view digests: what must not depend on how an extraction went."""
    found: dict[str, list[object]] = {}
    for view in cache.views():
        for shard in cache.units(view):
            receipt = cache.receipt(view, shard)
            assert receipt is not None
            found[f"{view}/{shard}"] = [
                receipt.samples.keys,
                receipt.samples.view_digests,
                receipt.samples.rows,
            ]
    return found
