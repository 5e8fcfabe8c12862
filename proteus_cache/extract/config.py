"""Settings of an extraction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proteus_cache.choices import unknown
from proteus_cache.codecs.names import codec_for_target
from proteus_cache.errors import ConfigError
from proteus_cache.views.spec import check_names

DEFAULT_VIEWS = 4
DEFAULT_TARGETS = ("cls", "patch")
DEFAULT_CODEC = "int8"
DEFAULT_SHARD_SIZE = 1024
DEFAULT_PROBE_IMAGES = 4096
PROBE_FROM_IMAGES = 16384
_PRECISIONS = ("fp32", "fp16", "bf16")
_MOST = {
    **{"views": 10_000, "seed": (1 << 63) - 1, "shard_size": 1 << 16, "batch_size": 1 << 20, "workers": 4096},
    "calibration_images": 1_000_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """One extraction as asked for. None means: what the cache at `out` has, else the default."""

    images: Path
    """Folder or .txt list."""
    out: Path
    """The cache's folder."""
    home: Path
    """Where downloaded and converted weights are kept."""
    teacher: str | None = None
    weights: str | None = None
    """A file, or "random:SEED"; None takes the teacher's official weights."""
    views: int | None = None
    """View indices 0 to views - 1 are extracted; the default is 4."""
    targets: tuple[str, ...] | None = None
    codec: str | None = None
    calibration_images: int | None = None
    """Trained images that int4 and klt are fitted to when the cache is planned; the default is 2,000, and more where
    their views have fewer than 100,000 tokens together. Of no use to other codecs or a cache that is there."""
    augment: str | None = None
    size_px: int | None = None
    """The default is the teacher's own."""
    view_format: str | None = None
    seed: int | None = None
    shard_size: int | None = None
    probe_images: int | None = None
    """Trained images that get one more view, never trained on; the default is 4,096 from 16,384 images on."""
    limit: int | None = None
    """Take this many images of the mixed list; the default is all."""
    batch_size: int | None = None
    """Views in one forward of the teacher; the default is 64 on a GPU and 16 on a CPU."""
    workers: int | None = None
    """Rendering processes of each extracting process; 0 renders in it. The default follows the usable cores."""
    precision: str | None = None
    """fp32, fp16 or bf16; the default is fp16 on a GPU and fp32 on a CPU."""
    device: str | None = None
    """For example "cuda" or "cpu"; the default is the best there is."""

    def __post_init__(self) -> None:
        at_least_one = ("views", "size_px", "shard_size", "limit", "batch_size", "calibration_images")
        for name in (*at_least_one, "workers", "seed", "probe_images"):
            value = getattr(self, name)
            least = int(name in at_least_one)
            flag = name.removesuffix("_px").replace("_", "-")
            if value is not None and not (isinstance(value, int) and value is not True and value >= least):
                raise ConfigError(f"--{flag} must be a whole number of at least {least}, got {value!r}")
            if value is not None and value > _MOST.get(name, value):
                raise ConfigError(f"--{flag} must be at most {_MOST[name]:,}, got {value:,}")
        for name in ("teacher", "weights", "codec", "augment", "view_format", "device"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ConfigError(f"--{name.replace('_', '-')} must be a name, got {value!r}")
        if self.precision is not None and self.precision not in _PRECISIONS:
            raise ConfigError(unknown("precision", self.precision, _PRECISIONS))
        if self.codec is not None:
            codec_for_target(self.codec, "patch")
        check_names(self.augment, self.view_format)
        if self.targets is not None and len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"--targets names one twice: {','.join(self.targets)}")
