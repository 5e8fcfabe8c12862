"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.plan.rates import GPUS
from proteus_cache.students.registry import student_size

DEFAULT_TEACHER: Final = "dinov2_vitg14"
IMAGENET_IMAGES: Final = 1_281_167
"""Of ImageNet-1K's training set."""
PAPER_STUDENTS: Final = ("vit_ti14", "vit_s14", "vit_b14", "vit_l14")
_MOST: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What is planned. None means the default of `extract` or `train`."""

    out: Path
    """Where the cache would be."""
    is_out_given: bool = True
    """Whether that is what the user said, or a default."""
    home: Path
    """The folder PROTEUS_HOME."""
    teacher: str = DEFAULT_TEACHER
    weights: str | None = None
    """The file of teacher `vit`."""
    images: Path | None = None
    """A sample of the images is rendered; without `n_images` they are counted too."""
    n_images: int | None = None
    """None: those of `images`, else ImageNet-1K's."""
    views: int | None = None
    targets: tuple[str, ...] | None = None
    codec: str | None = None
    size_px: int | None = None
    students: tuple[str, ...] | None = None
    """None: the four of the paper; `vit_demo` for the teacher `demo`."""
    epochs: int = 300
    gpus: int | None = None
    """None: those here, else 1."""
    gpu_kind: str | None = None
    """One of `rates.GPUS`; None: the kind found here, else an A100."""
    measure: bool = False

    def __post_init__(self) -> None:
        for name in ("n_images", "epochs", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be a whole number of at least 1, got {value}")
            if value is not None and value > _MOST:
                raise ConfigError(f"--{name.replace('_', '-')} must be at most {_MOST:,}, got {value:,}")
        if self.gpu_kind is not None and self.gpu_kind not in GPUS:
            raise UsageError(f"{unknown('kind of GPU', self.gpu_kind, GPUS)} (--measure needs no table)")
        if self.measure and self.gpu_kind is not None:
            raise UsageError("--measure measures what is here; leave --gpu-kind out")
        for name in self.asked_students:
            student_size(name)
        if len(set(self.asked_students)) != len(self.asked_students):
            raise ConfigError(f"--student names one twice: {', '.join(self.asked_students)}")

    @property
    def asked_students(self) -> tuple[str, ...]:
        """With the default filled in."""
        if self.students is not None:
            return self.students
        return ("vit_demo",) if self.teacher == "demo" else PAPER_STUDENTS

    def extraction(self) -> ExtractConfig:
        """The same as an extraction, which checks it."""
        return ExtractConfig(
            images=self.images or Path(),
            out=self.out,
            home=self.home,
            teacher=self.teacher,
            weights=self.weights,
            views=self.views,
            targets=self.targets,
            codec=self.codec,
            size_px=self.size_px,
        )
