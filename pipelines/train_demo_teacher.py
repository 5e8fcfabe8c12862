"""Train the teacher `demo` that ships with the package, on scenes drawn here: under an hour on two cores.

    python pipelines/train_demo_teacher.py --out proteus_cache/teachers/demo.safetensors

A small ViT learns the class of a scene from its CLS token and, from each patch token, which share of the patch
is background, occluder or a shape of which class; both heads are dropped afterwards. The scenes come from
other seeds than those of `proteus-cache demo`. The report (accuracy on scenes of yet another seed) goes to
stdout and, as metadata, into the file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from proteus_cache.demo.scenes import CLASSES, draw_scene
from proteus_cache.evaluate.knn import knn_scores
from proteus_cache.processes import usable_cores

VIEW_PX: Final = 84
PATCH_PX: Final = 14
ARCHITECTURE: Final[dict[str, Any]] = {
    "img_size": VIEW_PX,
    "patch_size": PATCH_PX,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 0,
    "global_pool": "token",
}
PIXEL_MEAN: Final = (0.485, 0.456, 0.406)
PIXEL_STD: Final = (0.229, 0.224, 0.225)
N_PARTS: Final = len(CLASSES) + 2
"""What a patch may show: a shape of each class, an occluder, background."""
TRAIN_SEED: Final = 20_261_121
TEST_SEED: Final = 20_261_122


@dataclass(frozen=True, slots=True)
class Drawn:
    """Scenes in memory."""

    pixels: Tensor
    """(N, 3, SIDE_PX, SIDE_PX) uint8."""
    parts: Tensor
    """(N, SIDE_PX, SIDE_PX) uint8: 0 background, 1 shape, 2 occluder."""
    labels: Tensor
    """(N,) int64."""


class Heads(nn.Module):
    """The model with what it is trained through."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.scene = nn.Linear(model.embed_dim, len(CLASSES))
        self.part = nn.Linear(model.embed_dim, N_PARTS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised to scene logits (B, classes) and part logits (B, patches, parts)."""
        tokens = self.model.forward_features(images)
        return self.scene(tokens[:, 0]), self.part(tokens[:, 1:])


def main() -> None:
    """Draw, train, test, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--scenes", type=int, default=24_000, help="drawn once, turned and cropped anew each time")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    drawn = draw(arguments.scenes, TRAIN_SEED)
    print(f"drew {arguments.scenes:,} scenes in {time.monotonic() - began:.0f} s", flush=True)
    heads = Heads(VisionTransformer(**ARCHITECTURE))
    train(heads, drawn, steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr)
    report = test(
        heads, steps=arguments.steps, batch_size=arguments.batch_size, minutes=(time.monotonic() - began) / 60
    )
    print(json.dumps(report, indent=1))
    save(heads.model, arguments.out, report)


def draw(n_scenes: int, seed: int) -> Drawn:
    """Scenes of all classes in turn, drawn with all cores."""
    with multiprocessing.get_context("spawn").Pool(usable_cores()) as pool:
        scenes = pool.map(partial(_draw_one, seed), range(n_scenes), chunksize=64)
    return Drawn(
        torch.from_numpy(np.stack([pixels for pixels, _ in scenes])),
        torch.from_numpy(np.stack([parts for _, parts in scenes])),
        torch.arange(n_scenes) % len(CLASSES),
    )


def _draw_one(seed: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scene = draw_scene(index % len(CLASSES), np.random.default_rng([seed, index]))
    parts = scene.shape_mask + 2 * scene.occluder_mask.astype(np.uint8)
    return np.ascontiguousarray(scene.pixels.transpose(2, 0, 1)), parts.astype(np.uint8)


def train(heads: Heads, drawn: Drawn, *, steps: int, batch_size: int, lr: float) -> None:
    """AdamW with warm-up and a cosine to zero; both losses are cross-entropies with equal weight."""
    decayed = [weight for weight in heads.parameters() if weight.ndim > 1]
    others = [weight for weight in heads.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    warm_up = max(1, min(200, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm_up)
            * 0.5
            * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
        ),
    )
    random = torch.Generator().manual_seed(1)
    began = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(drawn.labels), (batch_size,), generator=random)
        images, parts = augmented(drawn, chosen, random)
        scene_logits, part_logits = heads(images)
        scene_loss = functional.cross_entropy(scene_logits, drawn.labels[chosen])
        part_loss = functional.cross_entropy(part_logits.flatten(0, 1), parts.flatten(0, 1))
        optimizer.zero_grad()
        torch.autograd.backward(scene_loss + part_loss)
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            right = (scene_logits.argmax(1) == drawn.labels[chosen]).float().mean().item()
            print(
                f"step {step + 1}/{steps} scene {scene_loss.item():.3f} part {part_loss.item():.3f} "
                f"right {right:.2f} {time.monotonic() - began:.0f} s",
                flush=True,
            )


def augmented(drawn: Drawn, chosen: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes turned, zoomed, moved and recoloured, with what their patches then show.

    Returns:
        Images (B, 3, VIEW_PX, VIEW_PX) normalised; parts (B, patches, N_PARTS), shares that add up to 1.
    """
    pixels, shares = _cut(drawn, chosen, _random_grid(len(chosen), random))
    shape = functional.one_hot(drawn.labels[chosen], len(CLASSES)).float()[:, None] * shares[..., 1:2]
    parts = torch.cat([shape, shares[..., 2:], shares[..., :1]], dim=-1)
    return normalised(_recoloured(pixels, random)), parts


def _cut(drawn: Drawn, chosen: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, VIEW_PX, VIEW_PX) in 0..1 at the places of `grid`; what patches show: (B, patches, 3)."""
    pixels = drawn.pixels[chosen].float() / 255
    masks = functional.one_hot(drawn.parts[chosen].long(), 3).permute(0, 3, 1, 2).float()
    pixels, masks = (
        functional.grid_sample(field, grid, align_corners=False, padding_mode="reflection") for field in (pixels, masks)
    )
    return pixels, functional.avg_pool2d(masks, PATCH_PX).flatten(2).transpose(1, 2)


def _random_grid(n_images: int, random: torch.Generator) -> Tensor:
    """(B, VIEW_PX, VIEW_PX, 2) places to sample: turned a little, mirrored or not, 30 to 110 % of the side."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n_images, generator=random) * (high - low) + low

    angle, zoom = uniform(-0.3, 0.3), uniform(0.3, 1.1)
    mirror = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    reach = (1 - zoom).clamp(min=0) * 0.8
    matrix = torch.stack(
        [
            torch.stack([mirror * zoom * angle.cos(), -zoom * angle.sin(), uniform(-1, 1) * reach], -1),
            torch.stack([mirror * zoom * angle.sin(), zoom * angle.cos(), uniform(-1, 1) * reach], -1),
        ],
        1,
    )
    return functional.affine_grid(matrix, [n_images, 3, VIEW_PX, VIEW_PX], align_corners=False)


def _recoloured(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Contrast, brightness, inversion and greyness as views are changed in, in 0..1."""
    shape = (len(pixels), 1, 1, 1)
    contrast = torch.rand(shape, generator=random) * 1.2 + 0.4
    pixels = (pixels - 0.5) * contrast + 0.5 + (torch.rand(shape, generator=random) - 0.5) * 0.4
    inverted = torch.rand(shape, generator=random) < 0.15
    pixels = torch.where(inverted, 1 - pixels, pixels)
    grey = torch.rand(shape, generator=random) * (torch.rand(shape, generator=random) < 0.3)
    pixels = pixels + grey * (pixels.mean(1, keepdim=True) - pixels)
    return pixels.clamp(0, 1)


def normalised(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 as the model sees them."""
    mean, std = torch.tensor(PIXEL_MEAN)[:, None, None], torch.tensor(PIXEL_STD)[:, None, None]
    return (pixels - mean) / std


@torch.inference_mode()
def test(heads: Heads, *, steps: int, batch_size: int, minutes: float) -> dict[str, float | int]:
    """Accuracies on scenes that nothing was trained on: by the head, by neighbours, by patch."""
    heads.eval()
    fresh = draw(200 * len(CLASSES), TEST_SEED)
    # About the centre crop that evaluation takes: 224/256 of the side.
    grid = functional.affine_grid(
        0.875 * torch.eye(2, 3).expand(len(fresh.labels), 2, 3), [len(fresh.labels), 3, VIEW_PX, VIEW_PX], False
    )
    images, shares = _cut(fresh, torch.arange(len(fresh.labels)), grid)
    images = normalised(images)
    tokens = torch.cat([heads.model.forward_features(batch) for batch in torch.split(images, 256)])
    scene_right = (heads.scene(tokens[:, 0]).argmax(1) == fresh.labels).float().mean().item()
    shown = shares.argmax(-1)
    wanted = torch.where(shown == 1, fresh.labels[:, None], torch.where(shown == 2, N_PARTS - 2, N_PARTS - 1))
    part_right = (heads.part(tokens[:, 1:]).argmax(-1) == wanted).float().mean().item()
    features, bank = functional.normalize(tokens[:, 0], dim=-1), len(fresh.labels) // 2
    scores = knn_scores(
        features[:bank],
        fresh.labels[:bank],
        features[bank:],
        fresh.labels[bank:],
        n_classes=len(CLASSES),
        device=torch.device("cpu"),
    )
    return {
        "test_scenes": len(fresh.labels),
        "scene_accuracy": round(scene_right, 4),
        "patch_accuracy": round(part_right, 4),
        **{f"knn_top1_k{score.k}": round(score.top1, 4) for score in scores if score.top1 is not None},
        "steps": steps,
        "batch_size": batch_size,
        "minutes": round(minutes, 1),
    }


def save(model: VisionTransformer, path: Path, report: dict[str, float | int]) -> None:
    """Write the backbone in half precision, in the form of the teacher `vit`."""
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "timm_vision_transformer": json.dumps(ARCHITECTURE, sort_keys=True),
        "pixel_mean": json.dumps(PIXEL_MEAN),
        "pixel_std": json.dumps(PIXEL_STD),
        "licence": "Apache-2.0",
        "report": json.dumps(report, sort_keys=True),
    }
    save_file(state, path, metadata=metadata)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
