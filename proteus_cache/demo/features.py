"""Dense patch features of teacher, student and untrained student in the teacher's space, and their colours.

A student's patches go through its feature head, which maps them to the teacher's width; so one basis, the first
three principal components of the teacher's patches, colours all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from proteus_cache.evaluate.models import STUDENT_MODEL, TEACHER_MODEL, UNTRAINED_MODEL, RunModels
from proteus_cache.evaluate.reading import centre_view
from proteus_cache.students.heads import build_heads
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.train.run_folder import HEADS

_STRIDE_PX: Final = 2
_BATCH: Final = 128


def dense_features(
    models: RunModels, run: Path, teacher: Teacher, images: Sequence[Path], seed: int
) -> dict[str, Tensor]:
    """Patch features on a fine grid, by model name.

    Each image is cut many times, a little further each time, so that patches fall on every second pixel; what
    they say is put together to one map.

    Args:
        models: of the run.
        run: the RUN folder, for the trained heads.
        teacher: at the size of the student's views.
        images: files.
        seed: of the run, for the untrained head.

    Returns:
        `teacher`, `student` and `untrained`, each (images, rows, columns, D of the teacher) float32.
    """
    student, untrained = models.by_name[STUDENT_MODEL], models.by_name[UNTRAINED_MODEL]
    widths = {"student_width": student.identity.width, "teacher_width": teacher.identity.width}
    trained_head, fresh_head = (build_heads(("feature",), **widths, seed=seed)["feature"] for _ in range(2))
    prefix = "feature."
    tensors = {name: tensor for name, tensor in load_file(run / HEADS).items() if name.startswith(prefix)}
    trained_head.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    pixels = [shown_pixels(path, teacher) for path in images]
    return {
        TEACHER_MODEL: _stitched(teacher, nn.Identity(), pixels),
        STUDENT_MODEL: _stitched(student, trained_head, pixels),
        UNTRAINED_MODEL: _stitched(untrained, fresh_head, pixels),
    }


def shown_pixels(path: Path, teacher: Teacher) -> NDArray[np.uint8]:
    """The centre of an image, one patch larger than a view: (H, W, 3)."""
    return centre_view(path, teacher.identity.size_px + teacher.identity.patch_px)


def _stitched(model: Teacher, head: nn.Module, images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Features of all shifted views, (images, rows, columns, D)."""
    size_px, patch_px = model.identity.size_px, model.identity.patch_px
    shifts = range(0, patch_px, _STRIDE_PX)
    views = torch.from_numpy(
        np.stack([image[y : y + size_px, x : x + size_px] for image in images for y in shifts for x in shifts])
    )
    head = head.to(model.device)
    with torch.inference_mode():
        patches = torch.cat(
            [head(model.targets(batch, ["patch"])["patch"]).float().cpu() for batch in torch.split(views, _BATCH)]
        )
    grid, n_shifts = size_px // patch_px, len(shifts)
    # (image, shift y, shift x, patch y, patch x, D) with shifts inside patches.
    fine = patches.reshape(len(images), n_shifts, n_shifts, grid, grid, -1).permute(0, 3, 1, 4, 2, 5)
    return fine.reshape(len(images), grid * n_shifts, grid * n_shifts, -1)


def principal_colours(reference: Tensor) -> Callable[[Tensor], NDArray[np.float32]]:
    """A map from features to colours by the first three principal components of `reference`.

    Args:
        reference: (..., D); its 1st and 99th percentiles along each component become dark and bright.

    Returns:
        A function from (..., D) to (..., 3) in 0..1.
    """
    flat = reference.reshape(-1, reference.shape[-1])
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    basis = vectors[:, values.argsort(descending=True)[:3]]
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))  # an eigenvector has no sign
    projected = (flat - mean) @ basis
    low, high = (torch.quantile(projected[:: max(1, len(flat) // 100_000)], share, dim=0) for share in (0.01, 0.99))

    def colours(features: Tensor) -> NDArray[np.float32]:
        scaled = ((features - mean) @ basis - low) / (high - low).clamp(min=1e-12)
        return np.asarray(scaled.clamp(0, 1).numpy(), dtype=np.float32)

    return colours
