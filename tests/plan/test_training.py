from pathlib import Path

import pytest

from proteus_cache.pack.build import run_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.pack.reader import open_pack
from proteus_cache.plan import human_bytes, human_time
from proteus_cache.plan.rates import GPUS
from proteus_cache.plan.training import TrainingSize
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.planning import plan_for_pack, plan_training
from tests.makers import make_cache, make_images, make_teacher


def test_a_run_reads_every_view_of_every_whole_batch() -> None:
    size = TrainingSize(views_per_epoch=1_267_855, batch_size=1024, n_steps=300 * 1238, bytes_per_view=434_688)

    assert size.steps_per_epoch == 1238
    assert size.n_views == 300 * 1238 * 1024
    assert size.bytes_per_step == 1024 * 434_688
    assert size.seconds(19_576) == pytest.approx(380_313_600 / 19_576)
    assert size.bytes_per_s(24_500) == pytest.approx(10.65e9, rel=0.001)


def test_the_reader_of_eight_a100s_must_deliver_what_the_facts_say() -> None:
    # 4-bit codes of 197,376 bytes at 24,500 views/s are 4.8 GB/s; JPEG views of 35 KB come on top.
    size = TrainingSize(views_per_epoch=1, batch_size=1, n_steps=1, bytes_per_view=197_376)

    assert size.bytes_per_s(24_500) == pytest.approx(4.8e9, rel=0.01)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of 224 px views on patches of 14, as the rates are of, from a teacher of next to no width."""
    folder = tmp_path_factory.mktemp("packs")
    make_images(folder / "images", 6)
    make_teacher(folder / "teacher.safetensors", size_px=224, patch_px=14)
    cache = make_cache(folder, views=1)
    run_pack(plan_pack(cache.path, folder / "pack"))
    return folder / "pack"


def config_of(pack: Path, out: Path, **changes: object) -> TrainConfig:
    return config_from_mapping({"student": "vit_s14", "data": pack, "out": out, "batch_size": 4} | changes, "test")


def test_a_training_plan_says_what_a_known_gpu_needs_and_how_long_it_takes(pack: Path, tmp_path: Path) -> None:
    plan = plan_for_pack(config_of(pack, tmp_path), open_pack(pack), 8, GPUS["h200"])

    per_s = 8 * 2985
    read = human_bytes(plan.size.bytes_per_view * per_s)
    seconds = 300 * 4 / per_s
    assert f"needs     {read}/s from the reader to keep 8 x H200 busy (23,880 views/s)" in plan.lines()
    assert f"time      {human_time(seconds)} then; measured by us in whole runs on one H200, bf16" in plan.lines()[5]


def test_a_run_without_masks_is_faster(pack: Path, tmp_path: Path) -> None:
    plan = plan_for_pack(config_of(pack, tmp_path, weight_patch=0), open_pack(pack), 1, GPUS["h200"])

    assert plan.rate is not None
    assert plan.rate.views_per_s == pytest.approx(1.5 * 2985)


def test_a_training_plan_without_a_known_gpu_says_nothing_of_time(pack: Path, tmp_path: Path) -> None:
    plan = plan_for_pack(config_of(pack, tmp_path), open_pack(pack), 1)

    assert plan.rate is None
    assert not any(line.startswith(("needs", "time")) for line in plan.lines())


def test_a_cpu_has_no_known_rate(pack: Path, tmp_path: Path) -> None:
    assert plan_training(config_of(pack, tmp_path, device="cpu"), 1).rate is None
