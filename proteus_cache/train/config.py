"""Everything that a training run is made of. The defaults are the released Proteus recipe.

`identity` names the fields that change results: a resumed run must have the same. The others (where, how
fast, how often to save) may change between two starts of one run.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, TypeAlias

from proteus_cache.choices import either, nearest, unknown
from proteus_cache.errors import ConfigError
from proteus_cache.pack.pin import parse_pin
from proteus_cache.students.registry import student_size
from proteus_cache.train.blocks import parse_blocks

Precision = Literal["fp32", "fp16", "bf16"]
Setting: TypeAlias = str | int | float | bool | None
"""A field as YAML and JSON hold it."""
_FREE_FIELDS = frozenset(
    {
        *("data", "expect_id", "teacher_weights", "init"),  # their digests are compared
        *("out", "max_steps", "workers", "device", "precision", "accumulate", "compile"),
        *("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_every"),
    }
)


_SEEDS = 2**62  # three heads take seeds of their own, up to 3 times this one, and torch takes 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    student: str
    """One of `proteus_cache.students.registry.STUDENTS`."""
    data: Path | None
    """The pack; None for a live teacher with fresh views."""
    out: Path
    """The RUN folder."""
    expect_id: str | None = None
    """SHA-256 of the pack's pack.json, as `info` shows it; a pack with another one is refused. None takes any."""
    live: bool = False
    """Targets from a live teacher: for fresh views of `images`, or for the stored views of `data` (a replay)."""
    teacher: str | None = None
    """Of a live run."""
    teacher_weights: str | None = None
    """Its weights; None: the published ones."""
    images: Path | None = None
    """Photographs of a live run with fresh views."""
    size_px: int | None = None
    """Side of fresh views; None: the teacher's own, 224 for DINOv2. Stored ones have theirs."""
    seed: int = 0
    """Fixes initial weights, order and masks; below 2**62."""
    init: Path | None = None
    """File with the student's start weights; None: the released random initialisation."""
    init_sha256: str | None = None
    """SHA-256 of that file, written down when a run starts; a file with another one is refused."""

    epochs: int = 300
    """Epochs of the schedule."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule stays that of `epochs`. None: run the whole schedule."""
    batch_size: int | None = None
    """Views in one step over all processes; None: 1,024, and 256 for vit_l14, as published."""
    repeats: int = 1
    """Views of an image in one epoch, which draws one image of as many; 3 as published, 1 for none."""

    lr: float | None = None
    """Peak learning rate; None: 5e-4 x batch / 512."""
    warmup_epochs: int = 5
    """Epochs from `warmup_lr` to `lr`; the cosine's clock starts at epoch 0 all the same."""
    warmup_lr: float = 1e-6
    """Rate of the first epoch, not scaled with the batch."""
    min_lr: float = 1e-5
    """Floor of the cosine, not scaled with the batch."""
    schedule_lag_epochs: int = 1
    """Epochs that the schedule lags: 1 as released (two epochs run at `warmup_lr`), 0 for a plain one."""
    cooldown_epochs: int = 0
    """Epochs at `min_lr` after `epochs`: the released code sets 10 and never runs them."""
    weight_decay: float = 0.05
    """AdamW's decay of all with two axes or more."""
    decay_tokens: bool = True
    """Decay position embedding, CLS and mask token too, as released; false spares them, as DeiT and timm do."""
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    ema_decay: float = 0.99996
    """Of the average of the student's weights, every step, without warm-up."""
    drop_path: float = 0.0
    """Rate at which the last block's branches are left out: 0 as released; DeiT, which the paper follows, has 0.1."""
    head_norm_eps: float = 1e-5
    """Of the heads' LayerNorm, as released; the student's own is 1e-6."""

    weight_token: float = 1.0
    """Of the token loss; a loss of weight 0 is not computed, and a head that none needs is not made."""
    weight_feature: float = 1.0
    weight_patch: float = 1.0
    feature_cls_head: Literal["token", "feature"] = "token"
    """Head of the CLS token in the feature loss: that of the token loss, as released, or the feature head."""
    mask_ratio: float = 0.5
    """Share of the patches hidden in each image of the masked half."""
    weight_block: float = 0.0
    """Of the loss on intermediate blocks, which Proteus has not."""
    blocks: str | None = None
    """Its targets, comma separated, such as block.5,block.11; None: all that the pack holds."""

    precision: Precision | None = None
    """Of the forward pass; None: bf16 on a GPU that has it, scaled fp16 on another, fp32 on a CPU."""
    device: Literal["cpu", "cuda"] | None = None
    """None: the GPU when there is one."""
    workers: int | None = None
    """Reader processes of each rank; 0 reads in the training process; None: from the usable cores."""
    accumulate: int = 1
    """Parts that each process cuts its share of the batch into, to save memory; means stay the batch's."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: int = 20
    """Steps whose losses are fetched together from a GPU; on a CPU every step is."""
    evaluate_every: int | None = 1
    """Epochs between measurements of the losses on seen, probe and held-out views; None: never."""
    compile: bool = False
    """Compile the student with torch.compile: faster steps after some minutes, and other last bits."""

    def __post_init__(self) -> None:
        student_size(self.student)
        for name in _positive_integers():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("warmup_epochs", "schedule_lag_epochs", "cooldown_epochs", "workers", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")
        if self.seed >= _SEEDS:
            raise ConfigError(f"seed must be below 2**62, got {self.seed}")
        for name in _rates():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a finite number and not negative, got {value}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        if self.feature_cls_head not in ("token", "feature"):
            raise ConfigError(f"feature_cls_head must be token or feature, got {self.feature_cls_head!r}")
        self._check_init()
        self._check_pin()
        self._check_live()
        if self.precision not in (None, "fp32", "fp16", "bf16"):
            raise ConfigError(f"precision must be fp32, fp16 or bf16, got {self.precision!r}")
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if not self.weight_token + self.weight_feature + self.weight_patch + self.weight_block > 0:
            raise ConfigError("every loss has weight 0; set weight_token, weight_feature, weight_patch or weight_block")
        if self.blocks is not None:
            parse_blocks(self.blocks)
            if self.weight_block == 0:
                raise ConfigError(f"blocks is set to {self.blocks}, and weight_block is 0; set weight_block too")
        if not 0 < self.mask_ratio <= 1:
            raise ConfigError(f"mask_ratio must be above 0 and at most 1, got {self.mask_ratio}")
        if self.weight_patch > 0 and self.global_batch < 2:
            raise ConfigError("the patch loss masks every second view: batch_size must be at least 2")

    def _check_live(self) -> None:
        ours = ("teacher", "teacher_weights", "images", "size_px")
        given = [name for name in ours if getattr(self, name) is not None]
        if not self.live:
            if given:
                raise ConfigError(
                    f"{given[0]} is of a live teacher, and the run is not live; set live too, or leave it out"
                )
            if self.data is None:
                raise ConfigError("data, the pack, is not set")
            return
        if self.teacher is None:
            raise ConfigError("the run is live, and teacher, who says its targets, is not set")
        if (self.data is None) == (self.images is None):
            raise ConfigError("a live run takes fresh views of images, or the stored views of a pack: give one of them")
        if self.data is not None and self.size_px is not None:
            raise ConfigError("size_px is of fresh views; those of a pack have their size")

    def _check_pin(self) -> None:
        if self.expect_id is None:
            return
        parse_pin(self.expect_id, "expect_id")
        if self.data is None:
            raise ConfigError("expect_id is of a pack, and fresh views come from images; leave it out")

    def _check_init(self) -> None:
        if self.init_sha256 is None:
            return
        if self.init is None:
            raise ConfigError("init_sha256 is set, and init, the file that it is of, is not")
        if re.fullmatch(r"[0-9a-f]{64}", self.init_sha256) is None:
            raise ConfigError(f"init_sha256 must be 64 hexadecimal digits in lower case, got {self.init_sha256!r}")

    @property
    def global_batch(self) -> int:
        """Views in one step over all processes."""
        if self.batch_size is not None:
            return self.batch_size
        return student_size(self.student).batch_size

    def n_steps(self, steps_per_epoch: int) -> int:
        """Steps at which a run is finished."""
        whole = (self.epochs + self.cooldown_epochs) * steps_per_epoch
        return whole if self.max_steps is None else min(whole, self.max_steps)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return 5e-4 * self.global_batch / 512 if self.lr is None else self.lr

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads that the losses need; those of block targets come beside."""
        needed = {
            "token": self.weight_token > 0 or (self.weight_feature > 0 and self.feature_cls_head == "token"),
            "feature": self.weight_feature > 0,
            "patch": self.weight_patch > 0,
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that the losses need; the block loss needs those of `block_targets` beside."""
        needs_cls = self.weight_token > 0 or self.weight_feature > 0
        needs_patch = self.weight_feature > 0 or self.weight_patch > 0
        return ("cls",) * needs_cls + ("patch",) * needs_patch

    @property
    def block_targets(self) -> tuple[str, ...] | None:
        """Targets of the block loss: none when it is off, None for all that are there."""
        if self.weight_block == 0:
            return ()
        return None if self.blocks is None else parse_blocks(self.blocks)

    @property
    def loss_weights(self) -> tuple[float, float, float, float]:
        """Of the token, feature, patch and block loss."""
        return self.weight_token, self.weight_feature, self.weight_patch, self.weight_block

    @property
    def pack_path(self) -> Path:
        """`data`, of a run that has a pack."""
        assert self.data is not None, "a live run with fresh views has no pack"
        return self.data

    def to_mapping(self) -> dict[str, Setting]:
        """All fields as plain values, for YAML and JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def identity(self) -> dict[str, Setting]:
        """The fields that change results, with defaults that depend on others filled in.

        Precision changes them too, but its default depends on the hardware: a checkpoint keeps the one that
        was used.
        """
        values = {name: value for name, value in self.to_mapping().items() if name not in _FREE_FIELDS}
        filled = {"batch_size": self.global_batch, "lr": self.peak_lr, "init": values.pop("init_sha256")}
        if self.blocks is not None:
            filled["blocks"] = ",".join(parse_blocks(self.blocks))
        return values | filled


def config_from_mapping(values: Mapping[str, object], what: str = "config", flags: Collection[str] = ()) -> TrainConfig:
    """A config from the plain values of a YAML file or a command line.

    Args:
        values: field -> value; whole numbers may stand for floats, strings for paths.
        what: file or place, for the message.
        flags: fields that were given as `--field`, for the message.

    Raises:
        ConfigError: an unknown field (the nearest is named), a missing one, or a value of another type.
    """
    types = typing.get_type_hints(TrainConfig)
    parsed = {}
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"{what}: {unknown('setting', name, types)}")
        where = f"--{name.replace('_', '-')}" if name in flags else f"{what}: {name}"
        parsed[name] = _parse(value, types[name], where)
    parsed.setdefault("data", None)
    missing = [name for name in ("student", "out") if name not in parsed]
    missing += ["data"] * (parsed["data"] is None and not parsed.get("live"))
    if missing:
        raise ConfigError(f"{what}: {missing[0]} is not set")
    return TrainConfig(**parsed)


_KINDS = {int: "a whole number", float: "a number", str: "a name", bool: "true or false", Path: "a path"}


def _parse(value: object, wanted: object, what: str) -> typing.Any:  # any field's type
    """`value` as one of the types that a field allows."""
    options = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, UnionType) else (wanted,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Path and isinstance(value, str | Path):
            return Path(value)
        if option is bool and isinstance(value, bool):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and not isinstance(value, bool):
            return value
    if float in options and isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
        try:
            return float(value)
        except ValueError:
            pass
    choices = [str(choice) for option in options for choice in typing.get_args(option)]
    names = [_KINDS[option] for option in options if option in _KINDS]
    near = nearest(str(value), choices)
    hint = f"; did you mean {either(near)}?" if near else ""
    raise ConfigError(f"{what} must be {either(choices or names)}, got {value!r}{hint}")


def _positive_integers() -> tuple[str, ...]:
    return (
        *("epochs", "max_steps", "batch_size", "repeats", "accumulate"),
        *("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_every", "size_px"),
    )


def _rates() -> tuple[str, ...]:
    return (
        *("lr", "warmup_lr", "min_lr", "weight_decay", "adam_eps", "head_norm_eps"),
        *("weight_token", "weight_feature", "weight_patch", "weight_block"),
    )
