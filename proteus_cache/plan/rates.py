"""What one GPU does in a second, and who says so.

`GPUS` holds the views a second of the paper's teacher and of the students whose rates are known; every number has
its source beside it, and docs/costs.md explains them. Any other model is put between the two whose FLOPs enclose its
own, because the FLOP/s that a GPU reaches grow with the model: an estimate, and called one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from proteus_cache.plan.costs import FORWARD, STEP, VitShape, plain_vit, student_shape

RENDER_S: Final = 5.1e-3
"""Seconds of one core to make one view of a photograph for the teacher; measured by us, docs/benchmarks.md."""
READ_S: Final = 0.6e-3
"""Seconds of one core to read, check and decode one packed view of 224 px; measured by us, docs/costs.md."""
DEFAULT_KIND: Final = "a100"
"""What is planned for where no GPU is found or named."""
_SMALLEST_SHARE: Final = 0.5
"""Of the smallest model in the table: far below it launching kernels takes longer than computing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Views a second, and who says so."""

    views_per_s: float | None
    """None when it is not known."""
    source: str
    """For people, without a full stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One model whose rate on a GPU is known: a teacher's forward, or steps of a student."""

    model: str
    forward_flops: float
    """Of one view."""
    passes: float
    """Forwards that the work for one view is worth: 1 for a teacher, 4.5 for a student."""
    views_per_s: float
    source: str

    @property
    def flops_per_s(self) -> float:
        """What the GPU reached."""
        return self.views_per_s * self.passes * self.forward_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    kind: str
    """As in `--gpu-kind`."""
    title: str
    pattern: str
    """Regular expression of the names under which torch knows it."""
    known: tuple[Known, ...]
    """From the smallest model to the largest."""

    def rate(self, model: str, shape: VitShape, passes: float) -> Rate:
        """Views a second of one such GPU.

        Args:
            model: its name.
            shape: of the model, at the size of the views.
            passes: forwards that the work for one view is worth.
        """
        flops = shape.forward_flops
        for known in self.known:
            is_same = known.model == model and known.passes == passes
            if is_same and math.isclose(known.forward_flops, flops, rel_tol=0.01):
                return Rate(views_per_s=known.views_per_s, source=known.source)
        if flops < _SMALLEST_SHARE * self.known[0].forward_flops:
            return Rate(views_per_s=None, source="not known for so small a model: --measure finds out")
        reached, like = self._reached(flops)
        source = f"estimate: its FLOPs at {reached / 1e12:.0f} TFLOP/s, {like}"
        return Rate(views_per_s=reached / (passes * flops), source=source)

    def _reached(self, flops: float) -> tuple[float, str]:
        """FLOP/s for a model of so many FLOPs a forward, linear in their logarithm, and where that comes from."""
        for small, large in zip(self.known, self.known[1:], strict=False):
            if small.forward_flops <= flops <= large.forward_flops:
                share = math.log(flops / small.forward_flops) / math.log(large.forward_flops / small.forward_flops)
                reached = small.flops_per_s + share * (large.flops_per_s - small.flops_per_s)
                return reached, f"between {small.model} and {large.model}"
        nearest = self.known[0] if flops < self.known[0].forward_flops else self.known[-1]
        return nearest.flops_per_s, f"as {nearest.model}"


def kind_of(device_name: str) -> str | None:
    """The kind of a GPU by the name that its driver gives it; None for one that is not in the table.

    A slice of a GPU (MIG), or a board with less power or fewer units than the one measured, is not in it.
    """
    if "MIG" in device_name:
        return None
    return next((gpu.kind for gpu in GPUS.values() if re.search(gpu.pattern, device_name)), None)


def gpu_named(device_name: str | None) -> Gpu | None:
    """What is known of a GPU by the name that its driver gives it."""
    kind = None if device_name is None else kind_of(device_name)
    return None if kind is None else GPUS[kind]


_G14 = VitShape(width=1536, depth=40, n_patches=256, patch_px=14, block_weights=4 * 1536**2 + 3 * 1536 * 4096)
"""DINOv2-g/14 at 224 px."""
_PLAIN_G14 = VitShape(width=1408, depth=40, n_patches=256, patch_px=14, block_weights=4 * 1408**2 + 2 * 1408 * 6144)
"""The ViT-g/14 that others publish rates of."""
_ON_H200 = {"vit_ti14": 5340.0, "vit_s14": 2985.0, "vit_l14": 448.0}
_TEACHER_ON_H200 = 617.0
_ON_RTX_3090 = {
    "vit_ti14": (2294.0, plain_vit(192, 12, size_px=224, patch_px=16)),
    "vit_s14": (1053.0, plain_vit(384, 12, size_px=224, patch_px=16)),
    "vit_b14": (390.9, plain_vit(768, 12, size_px=224, patch_px=16)),
    "vit_l14": (85.3, plain_vit(1024, 24, size_px=224, patch_px=14)),
}


def _teacher(views_per_s: float, source: str) -> Known:
    return Known(
        model="dinov2_vitg14",
        forward_flops=_G14.forward_flops,
        passes=FORWARD,
        views_per_s=views_per_s,
        source=source,
    )


def _student(model: str, views_per_s: float, source: str) -> Known:
    shape = student_shape(model, size_px=224, patch_px=14)
    return Known(model=model, forward_flops=shape.forward_flops, passes=STEP, views_per_s=views_per_s, source=source)


def _h200() -> Gpu:
    """Measured with this package."""
    students = [
        _student(name, rate, "measured by us in whole runs on one H200, bf16 (docs/training.md)")
        for name, rate in _ON_H200.items()
    ]
    teacher = _teacher(_TEACHER_ON_H200, "measured by us on one H200, fp16, batch 128 (docs/benchmarks.md)")
    return Gpu(kind="h200", title="H200", pattern=r"\bH200\b(?!.*NVL)", known=(*students, teacher))


def _nemo(kind: str, title: str, pattern: str, training_per_s: float) -> Gpu:
    """The teacher from NVIDIA's published training rate of a ViT-g/14; the students as on our H200, less by as much.

    Args:
        kind: as in `--gpu-kind`.
        title: for people.
        pattern: of the device's name.
        training_per_s: samples a second of one GPU.
    """
    per_s = training_per_s * 3 * _PLAIN_G14.forward_flops / _G14.forward_flops
    ratio = per_s / _TEACHER_ON_H200
    students = [
        _student(name, rate * ratio, f"estimate: our H200's rate x {ratio:.2f}, the ratio of the teacher's rates")
        for name, rate in _ON_H200.items()
    ]
    source = f"published by NVIDIA (NeMo): ViT-g/14 trains at {training_per_s:.1f} views/s a GPU; scaled by FLOPs"
    return Gpu(kind=kind, title=title, pattern=pattern, known=(*students, _teacher(per_s, source)))


def _rtx_3090() -> Gpu:
    """Published by timm, in `results/` of huggingface/pytorch-image-models."""
    students = []
    for name, (per_s, shape) in _ON_RTX_3090.items():
        ours = student_shape(name, size_px=224, patch_px=14)
        scaled = per_s * 3 * shape.forward_flops / (STEP * ours.forward_flops)
        source = f"published by timm: a ViT of its size trains at {per_s:,.0f} views/s; scaled by FLOPs"
        students.append(_student(name, scaled, source))
    per_s = 116.6
    source = f"published by timm: ViT-g/14 runs at {per_s:.0f} views/s; scaled by FLOPs"
    teacher = _teacher(per_s * _PLAIN_G14.forward_flops / _G14.forward_flops, source)
    return Gpu(kind="rtx3090", title="RTX 3090", pattern=r"\bRTX 3090\b(?! Ti)", known=(*students, teacher))


GPUS: Mapping[str, Gpu] = {
    gpu.kind: gpu
    for gpu in (
        _nemo("a100", "A100", r"\bA100\b", 693 / 8),
        _nemo("h100", "H100", r"\bH100\b(?!.*(PCIe|NVL))", 1428 / 8),
        _h200(),
        _rtx_3090(),
    )
}
"""By `--gpu-kind`."""
