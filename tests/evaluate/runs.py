"""A finished run and labelled images for tests of evaluation: small, real, without a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from proteus_cache.students.registry import build_student, student_metadata
from proteus_cache.train.run_folder import EMA, STUDENT, write_config
from proteus_cache.train.tensors import replace_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE_PX = 28
SEED = 5


def make_run(
    folder: Path,
    *,
    seed: int = SEED,
    student_seed: int | None = None,
    share: float = 0.5,
    student: str = "vit_ti14",
) -> Path:
    """A finished run as training leaves it; its student is as initialised with `student_seed`."""
    folder.mkdir()
    chosen = seed if student_seed is None else student_seed
    built = build_student(student, size_px=SIZE_PX, patch_px=14, mean=MEAN, std=STD, seed=chosen)
    weights: dict[str, Tensor] = dict(built.state_dict())
    metadata = student_metadata(student, size_px=SIZE_PX, patch_px=14, mean=MEAN, std=STD)
    metadata |= {"student": student, "seed": str(seed), "steps": "4", "teacher": "dinov2_vits14"}
    replace_tensors(folder / STUDENT, weights, metadata)
    average = {name: 0.5 * tensor for name, tensor in weights.items()}
    replace_tensors(folder / EMA, average, metadata | {"initialisation_share": repr(share)})
    write_config(folder, {"pack": {"teacher": "dinov2_vits14", "teacher_weights_sha256": 64 * "0"}})
    return folder


def make_labelled(folder: Path, n_of_class: dict[str, int], seed: int = 0) -> Path:
    """Noise around one colour of each class, as PNG."""
    generator = np.random.default_rng(seed)
    for number, (name, count) in enumerate(n_of_class.items()):
        (folder / name).mkdir(parents=True)
        colour = np.array([(70 * number) % 256, (150 * number) % 256, (220 * number) % 256])
        for index in range(count):
            noise = generator.normal(0, 20, (40, 50, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder
