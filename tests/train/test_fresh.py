"""Fresh views: the images, order, crops and pixels of a cache of the same seed, float erasing, and nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_cache import open_cache
from proteus_cache.cache.reader import Cache
from proteus_cache.errors import BadImageError, ImageListError, ProteusCacheError, StorageError, UsageError
from proteus_cache.evaluate.models import load_run
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.order import Order
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pixels import channel_values, normalise
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.train import fresh
from proteus_cache.train.checkpoint import checkpoint_steps
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.feed import DeviceBatch
from proteus_cache.train.fresh import FreshBatch, FreshData, FreshImages, open_fresh
from proteus_cache.train.loop import train
from proteus_cache.views.encode import decode_view
from tests.makers import N_PATCHES, SIZE_PX, WIDTH, make_config, make_images, make_teacher, run_extract
from tests.train.runs import results, run_config, step_lines, tiny_student

N_IMAGES, SHARD, N_PROBE, BATCH = 24, 2, 5, 4


@pytest.fixture(scope="module", autouse=True)
def _small_student() -> Iterator[None]:
    with tiny_student():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images` and `teacher.safetensors`, and `cache`: two view indices and a probe of them, lossless."""
    path = tmp_path_factory.mktemp("fresh")
    options: dict[str, Any] = {"view_format": "png", "codec": "float32", "shard_size": SHARD, "probe_images": N_PROBE}
    run_extract(make_config(path, N_IMAGES, **options))
    return path


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


@pytest.fixture(scope="module")
def pack(folder: Path) -> Pack:
    build_pack(folder / "cache", folder / "pack", workers=1)
    return open_pack(folder / "pack")


def _config(folder: Path, out: Path, **settings: object) -> TrainConfig:
    live = {"live": True, "teacher": "vit", "teacher_weights": str(folder / "teacher.safetensors")}
    return run_config(None, out, **(live | {"images": folder / "images", "epochs": 3} | settings))  # type: ignore[arg-type]


def _images(folder: Path) -> FreshImages:
    return FreshImages(folder / "images", seed=0, shard_size=SHARD, n_probe=N_PROBE)


def _data(folder: Path, **settings: object) -> FreshData:
    weights = str(folder / "teacher.safetensors")
    teacher = load_teacher("vit", weights=weights, home=folder / "home", size_px=None)
    return FreshData(_config(folder, folder / "run", **settings), _images(folder), teacher)


def _batches(
    data: FreshData, order: Order, steps: range, *, n_workers: int = 0, rank: int = 0, world_size: int = 1
) -> list[FreshBatch]:
    with data.open(order, steps, rank=rank, world_size=world_size, n_workers=n_workers, pin=False) as reader:
        return list(reader)


def _stored(cache: Cache, view: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Key to the normalised pixels of a stored view, and which of them were erased."""
    teacher, found = cache.manifest.teacher, {}
    for shard in cache.units(view):
        for key, (data, document) in cache.read_views(view, shard).items():
            pixels = torch.from_numpy(decode_view(data, SIZE_PX))[None]
            values = normalise(pixels, channel_values(teacher.mean), channel_values(teacher.std))
            erased = np.zeros((SIZE_PX, SIZE_PX), bool)
            if erasing := json.loads(document)["recipe"]["erasing"]:
                box = erasing["box"]
                erased[box["top"] : box["top"] + box["height"], box["left"] : box["left"] + box["width"]] = True
            found[key] = (values[0].permute(1, 2, 0).numpy(), erased)
    return found


def _keys(data: FreshData, order: Order, step: int) -> list[str]:
    return data._images.keys(order.batch(step).records)


# What is seen, and in which order.


def test_the_first_epochs_show_the_views_of_a_cache_before_encoding(folder: Path, cache: Cache) -> None:
    data, n_erased = _data(folder), 0
    order = data.order

    for epoch, view in enumerate(("v000", "v001")):
        stored = _stored(cache, view)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        for batch in _batches(data, order, steps):
            assert batch.epoch == epoch
            assert batch.views.dtype == torch.float32
            for key, fresh_view in zip(_keys(data, order, batch.step), batch.views.numpy(), strict=True):
                values, erased = stored[key]
                assert np.array_equal(fresh_view[~erased], values[~erased])
                n_erased += int(erased.any())
                if erased.any():  # the same noise, neither rounded to a 255th nor clipped
                    clipped = (fresh_view < values.min() - 0.01) | (fresh_view > values.max() + 0.01)
                    assert not np.array_equal(fresh_view[erased], values[erased])
                    close = np.abs(fresh_view - values)[erased & ~clipped.any(axis=-1)]
                    assert close[np.abs(values)[erased & ~clipped.any(axis=-1)] < 0.9].max() < 0.02
    assert n_erased > 4


def test_images_are_held_out_mixed_and_drawn_as_those_of_a_pack(folder: Path, cache: Cache, pack: Pack) -> None:
    data = _data(folder)
    stored, ours = pack.training_order(seed=0, batch_size=BATCH), data.order

    assert len(cache.manifest.images.held_out) == 1
    assert data._images.held_out == tuple(cache.manifest.images.held_out)
    assert (ours.n_samples, ours.steps_per_epoch) == (stored.n_samples, stored.steps_per_epoch)
    for step in range(2 * ours.steps_per_epoch):
        theirs = stored.batch(step)
        assert theirs.view_indices is not None
        keys = [pack.sample(f"v{theirs.view_indices[0]:03d}", record).key for record in theirs.records.tolist()]
        assert _keys(data, ours, step) == keys


def test_views_never_repeat(folder: Path) -> None:
    data = _data(folder)
    n = data.order.steps_per_epoch

    shown: dict[str, list[bytes]] = {}
    for batch in _batches(data, data.order, range(5 * n)):
        for key, view in zip(_keys(data, data.order, batch.step), batch.views, strict=True):
            shown.setdefault(key, []).append(view.numpy().tobytes())

    assert all(len(set(views)) == 5 for views in shown.values() if len(views) == 5)
    assert len(shown) == data._images.n_trained


def test_repeats_show_other_views_of_an_image_side_by_side(folder: Path, pack: Pack) -> None:
    data, n = _data(folder, repeats=2), _data(folder, repeats=2).order.steps_per_epoch
    stored = pack.training_order(seed=0, batch_size=BATCH, repeats=2)

    drawn = [data.order.batch(step) for step in range(3 * n)]

    for step in range(n):  # epoch 0 is that of a pack with two view indices
        views, theirs = drawn[step].view_indices, stored.batch(step).view_indices
        assert views is not None
        assert theirs is not None
        assert views.tolist() == theirs.tolist()
    shown = [
        (row, view)
        for plan in drawn
        if plan.view_indices is not None
        for row, view in zip(plan.records.tolist(), plan.view_indices.tolist(), strict=True)
    ]
    assert len(set(shown)) == len(shown)
    assert {view for _, view in shown} == set(range(6))
    assert all(row == shown[place + 1][0] for place, (row, _) in enumerate(shown) if place % 2 == 0)


def test_losses_after_an_epoch_are_measured_on_the_images_of_a_cache(folder: Path, cache: Cache, pack: Pack) -> None:
    data, probe, held_out = _data(folder), _stored(cache, "probe"), pack.held_out_order(batch_size=BATCH)
    first = _stored(cache, "v000")
    assert held_out is not None

    orders = data.evaluation_orders
    keys = {kind: data._images.keys(order.records) for kind, order in orders.items()}

    assert list(orders) == ["seen", "probe", "held_out"]
    assert keys["seen"] == keys["probe"] == list(probe)
    assert keys["held_out"] == [pack.sample("v000", record).key for record in held_out.records.tolist()]
    for kind, stored in (("seen", first), ("probe", probe), ("held_out", first)):
        batches = _batches(data, orders[kind], range(orders[kind].n_steps))
        for key, view in zip(keys[kind], torch.cat([batch.views for batch in batches]).numpy(), strict=True):
            values, erased = stored[key]
            assert np.array_equal(view[~erased], values[~erased])


def test_without_probe_or_held_out_images_nothing_is_measured(folder: Path) -> None:
    data = open_fresh(_config(folder, folder / "run"), folder / "home")

    assert data.evaluation_orders == {}
    assert data.n_views is None


def test_targets_are_those_of_the_cache_where_nothing_was_erased(folder: Path, cache: Cache, pack: Pack) -> None:
    data, n_compared = _data(folder), 0
    stored = {sample.key: sample.targets for sample in (pack.sample("v000", record) for record in range(N_IMAGES))}
    erased = {key: box.any() for key, (_, box) in _stored(cache, "v000").items()}

    for batch in _batches(data, data.order, range(data.order.steps_per_epoch)):
        part = DeviceBatch(batch.step, batch.epoch, 1, batch.views, batch.codes, torch.empty(0, 0, dtype=torch.int64))
        targets = data.targets_of(part)
        assert {name: tuple(target.shape) for name, target in targets.items()} == {
            "cls": (BATCH, WIDTH),
            "patch": (BATCH, N_PATCHES, WIDTH),
        }
        for place, key in enumerate(_keys(data, data.order, batch.step)):
            if not erased[key]:
                n_compared += 1
                for name, target in targets.items():
                    np.testing.assert_allclose(target[place].numpy(), stored[key][name], atol=1e-5)
    assert n_compared > N_IMAGES / 2


# Whoever renders.


def _equal(first: list[FreshBatch], second: list[FreshBatch]) -> bool:
    def plain(batches: list[FreshBatch]) -> list[tuple[int, int, list[int], bytes]]:
        return [(b.step, b.epoch, b.positions.tolist(), b.views.numpy().tobytes()) for b in batches]

    return plain(first) == plain(second)


def test_workers_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(folder)
    steps = range(2, 2 + data.order.steps_per_epoch)

    here = _batches(data, data.order, steps)

    monkeypatch.setattr(fresh, "JOB_VIEWS", 3)  # a batch is made of several jobs
    assert _equal(_batches(data, data.order, steps), here)
    assert _equal(_batches(data, data.order, steps, n_workers=2), here)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch(folder: Path, world_size: int) -> None:
    data = _data(folder)
    whole = _batches(data, data.order, range(6))

    shares = [_batches(data, data.order, range(6), rank=rank, world_size=world_size) for rank in range(world_size)]

    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.views for part in parts]), batch.views)
        assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions)


def test_a_share_of_nothing_is_left_out(folder: Path) -> None:
    data = _data(folder)
    order = data.evaluation_orders["probe"]  # 5 views in batches of 4

    shares = [_batches(data, order, range(2), rank=rank, world_size=2) for rank in (0, 1)]

    assert [len(share) for share in shares] == [1, 2]
    with pytest.raises(UsageError, match="a batch of 4 cannot be shared by 5 ranks; raise --batch-size"):
        _batches(data, order, range(2), rank=0, world_size=5)


def test_what_was_read_is_counted(folder: Path) -> None:
    data = _data(folder)
    files = list((folder / "images").rglob("*.JPEG"))

    with data.open(data.order, range(5), rank=0, world_size=1, n_workers=0, pin=False) as reader:
        n_read = sum(1 for _ in reader)

    size = {str(file.relative_to(folder / "images")): file.stat().st_size for file in files}
    read = [path for step in range(5) for path in data._images.paths(data.order.batch(step).records)]
    assert n_read == 5
    assert reader.bytes_read == sum(size[path] for path in read)
    assert reader.waited_s > 0
    assert data.bytes_per_view == pytest.approx(np.mean(list(size.values())))


# Whole runs.


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    """Results of a run that nothing stopped."""
    train(_config(folder, folder / "undisturbed", workers=0, checkpoint_every=4, ema_decay=0.9))
    return results(folder / "undisturbed")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, undisturbed: dict[str, str], workers: int
) -> None:
    for stop in (3, 7, 100):
        config = _config(folder, tmp_path, workers=workers, checkpoint_every=4, ema_decay=0.9, max_steps=stop)
        result = train(config, resume=stop > 3)

    assert result.steps == 18
    assert results(tmp_path) == undisturbed


def _go_on(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    with tiny_student():
        train(_config(Path(folder), Path(out), workers=1, checkpoint_every=1, ema_decay=0.9), resume=True)


@pytest.mark.timeout(120)
def test_a_killed_run_leaves_no_workers_and_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_go_on, args=(str(folder), str(tmp_path)))
    process.start()
    while process.is_alive() and max(checkpoint_steps(tmp_path / "checkpoints"), default=0) < 5:
        process.join(0.01)
    children = _descendants(process.pid or 0)
    process.kill()
    process.join()

    assert process.exitcode == -signal.SIGKILL
    assert len(children) >= 2  # a fork server and a worker
    assert _all_end(children, within_s=5)
    train(_config(folder, tmp_path, workers=0, checkpoint_every=4, ema_decay=0.9), resume=True)
    assert results(tmp_path) == undisturbed


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found += _descendants(int(folder.name))
    return found


def _all_end(pids: list[int], *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(_is_alive(pid) for pid in pids):
            return True
        os.sched_yield()
    return False


def _is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_their_reader_and_a_killed_one_is_said(folder: Path) -> None:
    data = _data(folder)

    with data.open(data.order, range(10**6), rank=0, world_size=1, n_workers=2, pin=False) as reader:
        next(reader)
        workers = _workers()
    assert len(workers) == 2
    assert _all_end(workers, within_s=5)

    with data.open(data.order, range(10**6), rank=0, world_size=1, n_workers=1, pin=False) as reader:
        next(reader)
        os.kill(_workers()[-1], signal.SIGKILL)
        with pytest.raises(ProteusCacheError, match=r"was ended from outside .* --resume .* checkpoints are kept"):
            list(reader)


def _workers() -> list[int]:
    """Rendering processes: they come from the fork server."""
    server: int = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # nothing public
    return _descendants(server)[1:]


def test_a_live_run_measures_its_losses_and_can_be_evaluated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "FreshImages", lambda source, seed: _images(source.parent))

    result = train(_config(folder, tmp_path / "run", warmup_lr=1e-3, lr=1e-2), home=folder / "home")

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "seen" in line]
    assert result.steps == 15
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert all(line[kind] > 0 for line in epochs for kind in ("seen", "probe", "held_out"))
    assert epochs[-1]["seen"] < epochs[0]["seen"]
    models = load_run(tmp_path / "run", folder / "home")
    assert (models.teacher, models.steps) == ("vit", 15)
    assert models.teacher_sha256 == _data(folder)._teacher.identity.weights_sha256


def test_blocks_can_be_learned_too(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path / "run", max_steps=2, weight_block=1.0, blocks="block.0,block.1.raw")

    train(config)

    assert all(line["loss_block"] > 0 for line in step_lines(tmp_path / "run"))


# What is refused, and what a bad image does.


def test_a_run_is_resumed_with_the_same_images_and_teacher_only(folder: Path, tmp_path: Path) -> None:
    images, weights = make_images(tmp_path / "images", 8), make_teacher(tmp_path / "teacher.safetensors")
    settings = {"images": images, "teacher_weights": str(weights)}
    train(_config(folder, tmp_path / "run", max_steps=1, **settings))

    make_teacher(weights, seed=1)
    with pytest.raises(UsageError, match="its checkpoint was made with teacher weights .* resume with the same"):
        train(_config(folder, tmp_path / "run", max_steps=2, **settings), resume=True)
    make_teacher(weights)
    next(images.rglob("*.JPEG")).rename(images / "class_0" / "other.JPEG")
    with pytest.raises(UsageError, match="its checkpoint was made with images digest"):
        train(_config(folder, tmp_path / "run", max_steps=2, **settings), resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"batch_size": 25},
            UsageError,
            r"images: a batch of 25 is larger than the 24 views that an epoch draws",
        ),
        ({"weight_block": 1.0}, UsageError, r"set blocks, such as `blocks: block.1` \(vit has block.0 to block.1\)"),
        ({"weight_block": 1.0, "blocks": "block.7"}, UsageError, "vit has no target 'block.7'"),
        ({"mask_ratio": 0.01}, UsageError, "hides no patch of a view"),
        ({"size_px": 33}, UsageError, "33"),
        ({"images": Path("/nowhere")}, ImageListError, "/nowhere: no such folder or list of images; give one"),
        ({"teacher": "vitt"}, UsageError, "unknown teacher 'vitt'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(_config(folder, tmp_path / "run", **settings))

    assert not (tmp_path / "run").exists()


def test_an_empty_folder_has_no_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()

    with pytest.raises(ImageListError, match="no images in it or in its folders"):
        train(_config(folder, tmp_path / "run", images=tmp_path / "images"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_ends_the_run_by_name(folder: Path, tmp_path: Path, workers: int) -> None:
    images = make_images(tmp_path / "images", 8)
    bad = sorted(images.rglob("*.JPEG"))[3]
    bad.write_bytes(bad.read_bytes()[:200])

    with pytest.raises(BadImageError, match=rf"{bad.name}: cannot be decoded: .* put a good copy in its place and go"):
        train(_config(folder, tmp_path / "run", images=images, workers=workers))


def test_an_image_that_is_gone_ends_the_run_by_name(folder: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 8)
    data = FreshData(
        _config(folder, tmp_path / "run", images=images),
        FreshImages(images, seed=0),
        load_teacher("vit", weights=str(folder / "teacher.safetensors"), home=tmp_path, size_px=None),
    )
    gone = sorted(images.rglob("*.JPEG"))[3]
    gone.unlink()

    with pytest.raises(StorageError, match=f"{gone.name}: cannot be read: No such file"):
        _batches(data, data.order, range(2))


def test_a_loss_that_is_not_finite_names_the_images(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProteusCacheError, match=r"loss of step \d+ is not finite .* its 4 samples are named in"):
        train(_config(folder, tmp_path / "run", lr=1e30, warmup_lr=1e30))

    document = json.loads((tmp_path / "run" / "not-finite.json").read_text())
    for sample in document["samples"]:
        assert (folder / "images" / sample["path"]).is_file()
        assert sample["view"] == f"v{document['epoch']:03d}"
        assert sample["key"].startswith(Path(sample["path"]).stem)
