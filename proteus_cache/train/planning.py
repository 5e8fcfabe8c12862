"""What a run will read and write, said before it starts; and whether its checkpoints fit on the disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from proteus_cache import storage
from proteus_cache.errors import SpaceError
from proteus_cache.pack.order import TrainingOrder
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.plan import human_bytes
from proteus_cache.students.registry import student_size
from proteus_cache.train.checkpoint import checkpoint_steps
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.run_folder import CHECKPOINTS
from proteus_cache.train.source import check_targets, mean_sample_bytes, n_patches

_BYTES_PER_PARAMETER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """A run in numbers."""

    student: str
    parameters: int
    """Of the student, without heads."""
    views: int
    """Stored views in the pack, the probe left out."""
    views_per_epoch: int
    batch_size: int
    steps_per_epoch: int
    n_steps: int
    bytes_per_step: int
    """Read from the pack, on average."""
    bytes_to_read: int
    """Over all steps."""
    checkpoint_bytes: int
    bytes_to_write: int
    """Largest at any time: the checkpoints that are kept, one more while it is written, and the results."""
    free_bytes: int
    free_inodes: int | None

    processes: int

    def to_mapping(self) -> dict[str, int | str | None]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        inodes = "" if self.free_inodes is None else f", {self.free_inodes:,} inodes"
        share = "" if self.processes == 1 else f" on {self.processes} processes"
        return [
            f"student   {self.student}, {self.parameters / 1e6:.2f} M parameters",
            f"data      {self.views:,} views, {self.views_per_epoch:,} in an epoch",
            f"steps     {self.n_steps:,} of {self.batch_size:,} views{share}, {self.steps_per_epoch:,} in an epoch",
            f"reads     {human_bytes(self.bytes_per_step)} a step, {human_bytes(self.bytes_to_read)} in all",
            f"writes    {human_bytes(self.bytes_to_write)}, {human_bytes(self.checkpoint_bytes)} a checkpoint",
            f"free      {human_bytes(self.free_bytes)}{inodes}",
        ]


def plan_training(config: TrainConfig, processes: int) -> TrainPlan:
    """The numbers of a run; nothing is read but the pack's description.

    Raises:
        UsageError: pack and config do not go together.
    """
    return plan_for_pack(config, open_pack(config.data), processes)


def plan_for_pack(config: TrainConfig, pack: Pack, processes: int) -> TrainPlan:
    """As `plan_training`, with the pack at hand."""
    check_targets(pack, config)
    order = pack.training_order(seed=config.seed, batch_size=config.global_batch)
    n_steps = steps_of(config, order)
    parameters = student_parameters(config.student, pack)
    trained = parameters + added_parameters(config, pack)
    checkpoint = _BYTES_PER_PARAMETER * (3 * trained + parameters)  # weights and two moments; the average
    results = _BYTES_PER_PARAMETER * (trained + parameters)
    free = storage.free_space(config.out)
    bytes_per_step = config.global_batch * mean_sample_bytes(pack)
    return TrainPlan(
        student=config.student,
        parameters=parameters,
        views=len(pack),
        views_per_epoch=order.n_samples,
        batch_size=config.global_batch,
        steps_per_epoch=order.steps_per_epoch,
        n_steps=n_steps,
        bytes_per_step=bytes_per_step,
        bytes_to_read=n_steps * bytes_per_step,
        checkpoint_bytes=checkpoint,
        bytes_to_write=(config.keep_checkpoints + 1) * checkpoint + results,
        free_bytes=free.bytes,
        free_inodes=free.inodes,
        processes=processes,
    )


def steps_of(config: TrainConfig, order: TrainingOrder) -> int:
    """Steps at which a run is finished."""
    whole = config.epochs * order.steps_per_epoch
    return whole if config.max_steps is None else min(whole, config.max_steps)


def check_space(config: TrainConfig, plan: TrainPlan) -> None:
    """Refuse a run whose checkpoints do not fit; those that are there already count as fitting.

    Raises:
        SpaceError: says how much is missing, and the most checkpoints that would fit.
    """
    n_there = len(checkpoint_steps(config.out / CHECKPOINTS))
    missing = plan.bytes_to_write - n_there * plan.checkpoint_bytes - plan.free_bytes
    if missing <= 0:
        return
    fitting = config.keep_checkpoints - -(-missing // plan.checkpoint_bytes)
    remedy = (
        f"keep_checkpoints: {fitting} in --config would fit"
        if fitting >= 1
        else "free space there, or choose an --out on another disk"
    )
    raise SpaceError(
        f"{config.out}: the run needs {human_bytes(plan.bytes_to_write)} (results, {config.keep_checkpoints} "
        f"checkpoints, one more while it is written), and {human_bytes(plan.free_bytes)} are free; {remedy}"
    )


def student_parameters(name: str, pack: Pack) -> int:
    """Parameters of a student on the grid of a pack, from its widths alone."""
    size = student_size(name)
    width, patch_px = size.width, pack.teacher.patch_px
    embedding = width * (3 * patch_px**2 + 1) + width * (n_patches(pack) + 2)
    block = 12 * width**2 + 15 * width  # attention 4 W^2, MLP 8 W^2; biases 9 W, norms 4 W, LayerScale 2 W
    return embedding + size.depth * block + 2 * width


def added_parameters(config: TrainConfig, pack: Pack) -> int:
    """Parameters of heads and mask token."""
    width = student_size(config.student).width
    head = 2 * width + (width + 1) * pack.teacher.width
    return len(config.heads) * head + width * (config.weight_patch > 0)
