"""What the device does in a second: the teacher as `extract` runs it, steps of a student as `train` takes them.

Views are random pixels. The teacher is timed with the codecs and the copy of the codes to the host; a step with its
masked pass, the decoding of its targets, the optimiser and the average, and the copy of its batch to the device.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from proteus_cache.codecs.codec import Codec, codec_for_target, fit_codec
from proteus_cache.codecs.klt import grid_of
from proteus_cache.codecs.names import wants_many_views
from proteus_cache.devices import gpu_memory, is_out_of_memory
from proteus_cache.errors import ProteusCacheError
from proteus_cache.extract.run import default_batch
from proteus_cache.plan.codes import is_upper_limit, planned_codec
from proteus_cache.plan.rates import Rate
from proteus_cache.students.registry import build_student
from proteus_cache.teachers.dinov2_models import DINOV2
from proteus_cache.teachers.outline import TeacherOutline
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.devices import make_accelerator, resolve_device, resolve_precision
from proteus_cache.train.feed import DeviceBatch, DeviceFeed
from proteus_cache.train.masking import n_masked_images
from proteus_cache.train.model import build_distillation
from proteus_cache.train.state import make_state
from proteus_cache.train.steps import take_step
from proteus_cache.train.targets import CodedTarget, Target, TargetDecoder

_GROWTH = 4
_TOKENS_PER_CHANNEL = 8
"""Of made-up tokens: enough to fit to."""
_MOST_REPEATS = 1000


def teacher_rate(
    outline: TeacherOutline,
    *,
    weights: str | None,
    home: Path,
    targets: Sequence[str],
    codec: str,
    device: torch.device,
    budget_s: float,
) -> tuple[Rate, dict[str, Codec]]:
    """The teacher's rate, and codecs fitted to what it said, on the device.

    Args:
        outline: of the teacher.
        weights: the file of teacher `vit`; DINOv2 and timm models get random ones.
        home: the folder PROTEUS_HOME.
        targets: to be encoded.
        codec: as asked for.
        device: that it runs on.
        budget_s: seconds that timing may take.
    """
    is_made_up = outline.name in DINOV2 or outline.name.startswith("timm:")
    teacher = load_teacher(
        outline.name, weights="random:0" if is_made_up else weights, home=home, size_px=outline.size_px
    )
    precision: Precision = "fp16" if device.type == "cuda" else "fp32"
    teacher.to(device, precision)
    codecs = {
        name: _codec_to_time(codec_for_target(codec, name), tokens, device).to(device)
        for name, tokens in teacher.targets(_views(2, outline.size_px), targets).items()
    }
    extraction = _Extraction(teacher, codecs, device)
    size, per_s = _steady_rate(extraction.run, device, 1, default_batch(device), budget_s)
    source = f"measured here: forward, encoding and copy, {precision}, batch {size}"
    return Rate(views_per_s=per_s, source=source), codecs


def student_rate(student: str, outline: TeacherOutline, codecs: dict[str, Codec], n_gpus: int, budget_s: float) -> Rate:
    """The rate of whole steps of a student on one device.

    Args:
        student: its name.
        outline: of the teacher.
        codecs: of the targets, on the device.
        n_gpus: that share a batch.
        budget_s: seconds that timing may take.
    """
    config = TrainConfig(student=student, data=Path(), out=Path())
    device = resolve_device(config)
    precision = resolve_precision(config, device)
    accelerator = make_accelerator(device, precision)
    training = _Training(config, accelerator, outline, codecs)
    largest = max(2, config.global_batch // n_gpus)
    size, per_s = _steady_rate(training.run, accelerator.device, 2, largest, budget_s)
    return Rate(views_per_s=per_s, source=f"measured here: whole steps, {precision}, batch {size}")


def _codec_to_time(codec: str, tokens: Tensor, device: torch.device) -> Codec:
    """A codec that takes as long as one that was fitted to what the teacher says.

    Codecs that follow the distribution of tokens are fitted to made-up ones whose components all vary alike: then
    `klt` drops none, is as large as planned, and takes the most time.
    """
    if not wants_many_views(codec):
        return fit_codec(codec, tokens.cpu())
    n_tokens, width = tokens.shape[1:]
    n_views = -(-_TOKENS_PER_CHANNEL * width // n_tokens)
    made_up = torch.randn(n_views, n_tokens, width, generator=torch.Generator().manual_seed(0))
    if is_upper_limit(codec):
        n_bytes = planned_codec(codec, (n_tokens, width)).code_bytes - 2 * grid_of(n_tokens)[0] * width
        codec = f"klt:{n_bytes / 1000}KB"
    return fit_codec(codec, made_up, device=device)


class _Extraction:
    """The device's part of an extraction."""

    def __init__(self, teacher: Teacher, codecs: dict[str, Codec], device: torch.device) -> None:
        self._teacher, self._codecs, self._device = teacher, codecs, device
        self._views = torch.empty(0)
        self._codes: dict[str, Tensor] = {}

    def run(self, size: int, n: int) -> None:
        """So many batches of so many views."""
        if len(self._views) != size:
            pin = self._device.type == "cuda"
            views = _views(size, self._teacher.identity.size_px)
            self._views = views.pin_memory() if pin else views
            self._codes = {
                name: torch.empty((size, codec.code_bytes), dtype=torch.uint8, pin_memory=pin)
                for name, codec in self._codecs.items()
            }
        with torch.inference_mode():
            for _ in range(n):
                for name, tokens in self._teacher.targets(self._views, list(self._codecs)).items():
                    self._codes[name].copy_(self._codecs[name].encode(tokens), non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a loader would give."""

    step: int
    epoch: int
    positions: Tensor
    views: Tensor
    codes: Tensor


class _Training:
    """Steps of one student; to `take_step` it is a run."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, outline: TeacherOutline, codecs: dict[str, Codec]
    ) -> None:
        size_px, patch_px, mean, std = outline.size_px, outline.patch_px, outline.mean, outline.std
        student = build_student(config.student, size_px=size_px, patch_px=patch_px, mean=mean, std=std, seed=0)
        bare = build_distillation(config, student, teacher_width=outline.width, mean=mean, std=std)
        self.config = config
        self.accelerator = accelerator
        self.state = make_state(bare, config, accelerator)
        self.counts = (0.0, 0.0)
        self._outline = outline
        sizes = [codecs[name].code_bytes for name in config.targets]
        offsets = itertools.accumulate(sizes, initial=0)
        self._coded = tuple(
            CodedTarget(name, offset, codecs[name]) for name, offset in zip(config.targets, offsets, strict=False)
        )
        self._decoder = TargetDecoder(self._coded).to(accelerator.device)
        self._batch: _Batch | None = None

    def run(self, size: int, n: int) -> None:
        """So many steps of so many views."""
        if self._batch is None or len(self._batch.views) != size:
            self._batch = self._made_up(size)
            self.counts = (float(size), float(n_masked_images(size)))
        batches = itertools.repeat(self._batch, n)
        for batch in DeviceFeed(batches, self.config, self._outline.n_patches, self.accelerator.device):
            take_step(self, batch, self._targets)

    def _targets(self, batch: DeviceBatch) -> dict[str, Target]:
        targets: dict[str, Target] = self._decoder(batch.codes)
        return targets

    def _made_up(self, size: int) -> _Batch:
        """Random views, with the codes of two views of random tokens."""
        device = self.accelerator.device
        codes = [
            target.codec.encode(torch.randn(2, *self._outline.target_shape(target.name), device=device))
            for target in self._coded
        ]
        repeated = torch.cat(codes, dim=1).cpu().repeat(-(-size // 2), 1)[:size]
        tensors = [torch.arange(size), _views(size, self._outline.size_px), repeated]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return _Batch(0, 0, *tensors)


def _steady_rate(
    run: Callable[[int, int], None], device: torch.device, smallest: int, largest: int, budget_s: float
) -> tuple[int, float]:
    """The largest batch that memory and time allow, and its views a second.

    Args:
        run: does so many batches of so many views.
        device: waited for.
        smallest: batch to begin with.
        largest: that makes sense.
        budget_s: seconds in all, about; a first batch that takes longer on a CPU is the only one.
    """

    def timed(size: int, n: int) -> float:
        began = time.perf_counter()
        run(size, n)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    size, growth = smallest, _GROWTH
    try:
        seconds = timed(size, 1)  # a GPU's libraries are loaded in it
        if seconds > budget_s and device.type != "cuda":
            return size, size / seconds
        started = time.perf_counter()
        seconds = timed(size, 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ProteusCacheError(f"the GPU has too little memory for a batch of {smallest} ({gpu_memory()})") from error
    while size < largest and growth > 1:
        grown = min(largest, growth * size)
        spent = time.perf_counter() - started
        if spent + 2 * seconds * grown / size > 0.7 * budget_s:
            break
        try:
            timed(grown, 1)
            seconds, size = timed(grown, 1), grown
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            growth //= 2
            torch.cuda.empty_cache()
    left_s = budget_s - (time.perf_counter() - started)
    n = max(1, min(_MOST_REPEATS, int(left_s / seconds)))
    return size, size * n / timed(size, n)


def _views(n: int, size_px: int) -> Tensor:
    return torch.randint(0, 256, (n, size_px, size_px, 3), dtype=torch.uint8)
