"""Canaries: another teacher, another decoder, a drifting or dead device stop a worker, and nothing else does."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from proteus_cache import open_cache
from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.cache.writer import commit_unit
from proteus_cache.documents import canonical, seal
from proteus_cache.errors import CanaryError, FormatError, SpaceError, UsageError
from proteus_cache.extract import canary, pipeline, planning
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.processes import Worker
from proteus_cache.teachers.canary import TOLERANCE, canary_images, canary_targets, project, relative_difference
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.views import known, source
from proteus_cache.views.encode import decode_view, digest_pixels
from tests.cli.running import extract_arguments, run
from tests.makers import identity, make_cache, make_config, make_images, make_teacher, run_extract, shows_canaries

EVERY = 2
"""Units between two repeats in these tests; 50 in the program."""
_MOST_MANIFEST_BYTES = 8_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("finished"))


def config_beside(finished: Cache, tmp_path: Path, **changes: Any) -> ExtractConfig:  # fields of the config
    """A new cache of the same images and teacher: ten units of two views, one forward each."""
    return make_config(
        finished.path.parent, out=tmp_path / "cache", **({"shard_size": 2, "batch_size": 2, "views": 2} | changes)
    )


def committed(config: ExtractConfig) -> set[str]:
    cache = open_cache(config.out)
    return {f"{view}/s{shard:05d}" for view in cache.views() for shard in cache.units(view)}


def named(error: BaseException) -> set[str]:
    """Units of the command at the end of the message."""
    command = re.search(r"proteus-cache repair \S+((?: --unit \S+)+)$", str(error))
    return set(command[1].split()[1::2]) if command else set()


def change_outputs(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Put `change(tokens, views, units so far)` between the teacher and its caller.

    Canaries are no units, and neither are single views, which are those that are looked at again.
    """
    targets, n_units = Teacher.targets, 0

    def changed(self: Teacher, views: Tensor, names: list[str]) -> dict[str, Tensor]:
        nonlocal n_units
        n_units += is_unit(views)
        return {name: change(value, views, n_units) for name, value in targets(self, views, names).items()}

    monkeypatch.setattr(Teacher, "targets", changed)


def without_second_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch by canaries alone: which units a failing device was shown again depends on the writing thread."""
    monkeypatch.setattr(canary, "check_one_view", lambda *_: None)


def is_unit(views: Tensor) -> bool:
    return len(views) > 1 and not shows_canaries(views)


def one_ulp(tokens: Tensor) -> Tensor:
    return torch.nextafter(tokens, torch.full_like(tokens, torch.inf))


def with_one_weight_changed(teacher: Path, path: Path, by: float) -> Path:
    from safetensors import safe_open

    state = load_file(teacher)
    with safe_open(teacher, "pt") as file:
        metadata = file.metadata()
    state["patch_embed.proj.weight"][3, 1, 2, 2] += by
    save_file(state, path, metadata=metadata)
    return path


def test_the_manifest_says_what_fixed_input_gave(finished: Cache) -> None:
    record = finished.manifest.canary
    teacher = load_teacher(
        "vit", weights=str(finished.path.parent / "teacher.safetensors"), home=finished.path, size_px=None
    )

    tokens = teacher.targets(torch.from_numpy(canary_images(32)), ["cls", "patch"])

    assert record is not None
    assert len(canonical(record.model_dump(mode="json"))) < _MOST_MANIFEST_BYTES
    for name, values in tokens.items():
        energy = np.square(record.projections[name]).mean() / values.square().mean().item()
        assert 0.6 < energy < 1.6  # 128 squares of normal numbers: within 12.5 % one time in three
    assert record.decoded["grey_odd"] == digest_pixels(
        np.asarray(Image.open(Path(known.__file__).parent / "known_jpegs/grey_odd.jpg").convert("RGB"))
    )
    assert len(set(record.decoded.values())) == 4


def test_canary_images_never_change() -> None:
    assert digest_pixels(canary_images(224)) == "7e924035df07cfac"
    assert digest_pixels(canary_images(32)) == "994f819af79dd91c"


def test_the_summary_tells_how_far_outputs_are_apart() -> None:
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 256, 384, generator=draws)
    for ratio in (1e-4, 0.01, 0.5):
        other = tokens + ratio * torch.randn(tokens.shape, generator=draws)

        assert relative_difference(project(other), project(tokens)) == pytest.approx(ratio, rel=0.25)
    assert relative_difference(project(tokens * torch.nan), project(tokens)) == np.inf


def test_lower_precisions_stay_within_the_tolerance(finished: Cache) -> None:
    teacher = load_teacher("demo", weights=None, home=finished.path, size_px=None)
    exact = canary_targets(teacher, ["cls", "patch"], 4)

    for precision, least in (("bf16", 1e-3), ("fp16", 1e-4)):
        found = canary_targets(teacher.to("cpu", precision), ["cls", "patch"], 1)  # type: ignore[arg-type]
        for name, values in found.items():
            ratio = relative_difference(project(values), project(exact[name]))
            assert least < ratio < TOLERANCE[precision] / 10  # type: ignore[index]


def test_one_weight_changed_is_refused_by_its_digest(finished: Cache, tmp_path: Path) -> None:
    other = with_one_weight_changed(finished.path.parent / "teacher.safetensors", tmp_path / "x.safetensors", 1e-6)
    before = sorted(finished.path.rglob("*"))

    with pytest.raises(UsageError, match="--weights is teacher.safetensors .* there and x.safetensors"):
        run_extract(make_config(finished.path.parent, weights=str(other), views=3))

    assert sorted(finished.path.rglob("*")) == before


def test_one_weight_changed_is_refused_by_the_canary(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.path, tmp_path / "cache")
    other = with_one_weight_changed(finished.path.parent / "teacher.safetensors", tmp_path / "x.safetensors", 9.0)
    monkeypatch.setattr(planning, "check_weights", lambda *_: None)
    before = sorted((tmp_path / "cache").rglob("*"))

    with pytest.raises(
        CanaryError, match=r"other outputs here than when .* differs by [\d.]+ %, and 1 % .*finished units are kept$"
    ):
        run_extract(make_config(finished.path.parent, out=tmp_path / "cache", weights=str(other), views=3))

    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_outputs_that_are_not_finite_here_name_the_way_out(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_beside(finished, tmp_path, precision="bf16")
    planned = plan_cache(config)
    change_outputs(monkeypatch, lambda tokens, *_: tokens * torch.inf)

    with pytest.raises(CanaryError, match="not finite in bf16 here, and were .* --precision fp32"):
        extract(config, planned, Worker(0, 1), lambda _: None)


@pytest.mark.parametrize("kind", ["sources", "views"])
def test_another_decoder_is_refused_with_its_version(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    change_decoder(monkeypatch, kind)
    monkeypatch.setattr(canary, "decoder_version", lambda: "Pillow 99.0, libjpeg-turbo 9.9")
    was = planned.cache.manifest

    with pytest.raises(CanaryError) as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert ("of 4 built-in JPEGs: baseline_420" if kind == "sources" else "1 of 4 built-in JPEGs: view_444") in str(
        caught.value
    )
    assert f"{was.views.decoder} then and is Pillow 99.0, libjpeg-turbo 9.9 here" in str(caught.value)
    assert f"install pillow=={was.libraries['pillow']}" in str(caught.value)
    assert committed(config) == set()


def change_decoder(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """One value of one pixel."""
    if kind == "views":

        def changed_view(data: bytes, side_px: int) -> Any:  # an array
            pixels = decode_view(data, side_px)
            pixels[3, 4, 1] ^= 1
            return pixels

        monkeypatch.setattr(known, "decode_view", changed_view)
        return
    to_rgb = source._to_rgb

    def changed(image: Image.Image) -> Image.Image:
        pixels = np.array(to_rgb(image))
        pixels[3, 4, 1] ^= 1
        return Image.fromarray(pixels)

    monkeypatch.setattr(source, "_to_rgb", changed)


def test_a_decoder_that_is_broken_under_the_same_version_says_so(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    change_decoder(monkeypatch, "sources")

    with pytest.raises(CanaryError, match=r"both are Pillow .* damaged: install it anew"):
        extract(config, planned, Worker(0, 1), lambda _: None)


@pytest.mark.parametrize("first_bad", [1, 4, 5, 8])
def test_a_drifting_device_is_found_at_the_next_repeat_and_the_units_since_the_last_are_named(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bad: int
) -> None:
    monkeypatch.setattr(pipeline, "CANARY_EVERY", EVERY)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    change_outputs(monkeypatch, lambda tokens, _, n: one_ulp(tokens) if n >= first_bad else tokens)

    with pytest.raises(CanaryError, match="relative difference") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    n_good = (first_bad - 1) // EVERY * EVERY
    order = [f"v{view:03d}/s{shard:05d}" for view in range(2) for shard in range(5)]
    assert committed(config) >= set(order[:n_good])
    assert named(caught.value) == committed(config) - set(order[:n_good])
    assert "\n" not in str(caught.value)
    assert verify_cache(config.out, read_data=True) == []


def test_drift_is_found_at_the_end_and_every_unit_since_the_start_is_named(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    change_outputs(monkeypatch, lambda tokens, _, n: one_ulp(tokens) if n == 10 else tokens)

    with pytest.raises(CanaryError, match="10 units that this process committed since") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert named(caught.value) == committed(config)
    assert len(committed(config)) == 10


def test_codes_that_drift_are_found_as_well(finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_second_looks(monkeypatch)
    monkeypatch.setattr(pipeline, "CANARY_EVERY", EVERY)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    done: list[int] = []

    def flip_a_bit_of_the_codec(at: Any) -> None:
        done.append(1)
        if len(done) == 3:
            planned.codecs["patch"].get_buffer("scale")[5] *= 1.01

    with pytest.raises(CanaryError, match="target patch") as caught:
        extract(config, planned, Worker(0, 1), flip_a_bit_of_the_codec)

    assert named(caught.value) == committed(config) - {"v000/s00000", "v000/s00001"}


def test_a_decoder_that_changes_on_the_way_is_found(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CANARY_EVERY", EVERY)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    done: list[int] = []

    def break_it(_: object) -> None:
        done.append(1)
        if len(done) == 3:
            change_decoder(monkeypatch, "sources")

    with pytest.raises(CanaryError, match=r"other pixels than when this process started \(3 of 4") as caught:
        extract(config, planned, Worker(0, 1), break_it)

    assert named(caught.value) == committed(config) - {"v000/s00000", "v000/s00001"}


def test_the_batch_is_run_as_often_as_stated(finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CANARY_EVERY", 3)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    repeats: list[int] = []
    repeat = canary.CanaryWatch.repeat

    def counted(self: canary.CanaryWatch) -> None:
        repeats.append(1)
        repeat(self)

    monkeypatch.setattr(canary.CanaryWatch, "repeat", counted)

    extract(config, planned, Worker(0, 1), lambda _: None)

    assert len(repeats) == 4  # after 3, 6 and 9 units, and once at the end
    assert canary.CANARY_EVERY == 50


@pytest.mark.parametrize(
    ("at_planning", "later"),
    [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")],
)
def test_other_batches_workers_and_precisions_pass(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_planning: str, later: str
) -> None:
    monkeypatch.setattr(pipeline, "CANARY_EVERY", EVERY)
    config = config_beside(finished, tmp_path, precision=at_planning, batch_size=1, shard_size=4)
    plan_cache(config)

    for index, batch_size in ((1, 64), (0, 3)):
        run_extract(replace(config, precision=later, batch_size=batch_size), Worker(index, 2))

    assert identity(open_cache(config.out)) == identity(finished)


def test_a_device_that_is_not_exact_is_said_and_compared_within_the_tolerance(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_second_looks(monkeypatch)
    monkeypatch.setattr(pipeline, "CANARY_EVERY", EVERY)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    noise = torch.Generator().manual_seed(1)

    def drift(tokens: Tensor, _: Tensor, n: int) -> Tensor:
        return tokens * (1 + 1e-5 * torch.randn(1, generator=noise)) + (5 if n > 6 else 0)

    change_outputs(monkeypatch, drift)

    with caplog.at_level(logging.WARNING), pytest.raises(CanaryError) as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert "device CPU gives other bits for the same batch; canaries are compared within 0.01" in caplog.text
    assert named(caught.value) == committed(config) - {f"v000/s{n:05d}" for n in range(5)} - {"v001/s00000"}


def without_canaries(planned: planning.PlannedCache) -> None:
    """Make a planned cache one of a time before there were canaries."""
    path = planned.cache.layout.manifest
    document = json.loads(path.read_bytes())
    del document["canary"], document["digest"]
    path.write_bytes(seal(document))


def test_an_older_cache_is_continued_and_watched(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_beside(finished, tmp_path, shard_size=4, batch_size=4)
    without_canaries(plan_cache(config))

    run_extract(config)

    cache = open_cache(config.out)
    assert cache.manifest.canary is None
    assert identity(cache) == identity(finished)
    assert verify_cache(config.out, read_data=True) == []
    change_outputs(monkeypatch, lambda tokens, _, n: one_ulp(tokens) if n else tokens)
    with pytest.raises(CanaryError, match="3 units that this process") as caught:
        run_extract(replace(config, views=3))
    assert named(caught.value) == {"v002/s00000", "v002/s00001", "v002/s00002"}


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["projections"]["cls"].pop(),
        lambda found: found["projections"]["cls"][0].append(0.0),
        lambda found: found["decoded"].update(grey_odd="x"),
        lambda found: found.update(more=1),
    ],
)
def test_another_form_of_the_section_is_refused(finished: Cache, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((finished.path / "manifest.json").read_bytes())
    del document["digest"]
    change(document["canary"])

    with pytest.raises(FormatError, match=r"manifest.json: canary\."):
        Manifest.parse(seal(document), "manifest.json")


DEAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "the same for every token": (
        lambda tokens: tokens[:, :1].expand_as(tokens).contiguous() if tokens.ndim == 3 else tokens,
        "2 of its views have the same numbers in every token of target patch",
    ),
    "the same for every view": (
        lambda tokens: tokens[:1].expand_as(tokens).contiguous(),
        "all its views have the same numbers in target cls",
    ),
    "zeros": (torch.zeros_like, "all its views have the same numbers in target cls"),
    "far too large": (lambda tokens: 1e3 * tokens, r"target cls has 9\d\d times the root mean square"),
    "far too small": (lambda tokens: 1e-3 * tokens, r"target cls has 0.000\d+ times the root mean square"),
}


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_device_stops_its_unit(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil, why = DEAD[name]
    monkeypatch.setattr(pipeline, "CANARY_EVERY", EVERY)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    change_outputs(monkeypatch, lambda tokens, views, n: spoil(tokens) if n == 4 and is_unit(views) else tokens)

    with pytest.raises(CanaryError, match=f"unit v000/s00003: {why}.*: it was not committed") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert "v000/s00003" not in committed(config)
    assert named(caught.value) <= committed(config) - {"v000/s00000", "v000/s00001"}
    monkeypatch.undo()
    run_extract(config)
    assert len(committed(config)) == 10


def test_pictures_of_one_colour_and_equal_pictures_are_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        path = tmp_path / "images" / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (200, 10, 30)).save(path)
    make_teacher(tmp_path / "teacher.safetensors")
    targets = Teacher.targets

    def without_positions(self: Teacher, views: Tensor, names: list[str]) -> dict[str, Tensor]:
        found = targets(self, views, names)
        plain = (views == views[:, :1, :1]).flatten(1).all(dim=1)
        return {
            name: torch.where(plain.reshape(-1, 1, 1), tokens[:, :1], tokens) if tokens.ndim == 3 else tokens
            for name, tokens in found.items()
        }

    monkeypatch.setattr(Teacher, "targets", without_positions)

    cache = make_cache(tmp_path, augment="none", view_format="png", codec="float16")

    assert len(cache) == 8


def test_the_command_ends_with_one_line_and_what_it_names_mends_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "images", 16)
    make_teacher(tmp_path / "teacher.safetensors")
    arguments = extract_arguments(tmp_path)
    run(*arguments, "--codec", "float32", "--out", tmp_path / "sound")
    run(*arguments, "--codec", "float32", "--plan-only")
    change_outputs(monkeypatch, lambda tokens, _, n: one_ulp(tokens) if n > 2 else tokens)

    said = run(*arguments, code=1).stderr.strip().splitlines()
    monkeypatch.undo()
    command = re.fullmatch(
        r"proteus-cache: \S+/cache: the teacher gives other numbers for the same batch .*; 4 units that this process "
        r"committed since the last good check must be redone on .*: proteus-cache (repair \S+/cache --unit v000/s00000 "
        r"--unit v000/s00001 --unit v001/s00000 --unit v001/s00001)",
        said[-1],
    )
    assert command
    drifted, sound = open_cache(tmp_path / "cache"), open_cache(tmp_path / "sound")
    assert not np.array_equal(drifted[31].targets["patch"], sound[31].targets["patch"])
    run(*command[1].split(), "--images", tmp_path / "images", "--weights", tmp_path / "teacher.safetensors")

    mended = open_cache(tmp_path / "cache")
    assert all(np.array_equal(mended[n].targets["patch"], sound[n].targets["patch"]) for n in range(32))


def test_a_run_that_ends_by_another_error_checks_its_units_first(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    real = commit_unit

    def full_after_three(*args: Any, **more: Any) -> Any:  # as the real one
        if len(committed(config)) == 3:
            raise SpaceError(f"{config.out}: no space")
        return real(*args, **more)

    monkeypatch.setattr(pipeline, "commit_unit", full_after_three)
    change_outputs(monkeypatch, lambda tokens, _, n: one_ulp(tokens) if n > 2 else tokens)

    with pytest.raises(CanaryError, match="no space; and then: .*other numbers for the same batch") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert named(caught.value) == committed(config)
    assert len(committed(config)) == 3


@pytest.mark.parametrize("every", [1, 50])
def test_a_unit_that_fails_the_second_look_is_named_also_after_a_good_canary(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(pipeline, "CANARY_EVERY", every)
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    change_outputs(monkeypatch, lambda tokens, views, n: -tokens if len(views) == 1 and n >= 3 else tokens)

    with pytest.raises(CanaryError, match="is not what the teacher says of this view") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    failed = re.search(r"unit (v\d+/s\d+): target", str(caught.value))
    assert failed is not None
    assert failed[1] in named(caught.value) <= committed(config)


def test_a_unit_that_cannot_be_read_back_is_named(
    finished: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_beside(finished, tmp_path)
    planned = plan_cache(config)
    real = pipeline.commit_unit  # type: ignore[attr-defined]  # where the pipeline finds it

    def flipped(*args: Any, **more: Any) -> Any:  # as the real one
        receipt = real(*args, **more)
        path = config.out / next(path for path in receipt.files if "/cls/" in path)
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:-8] + bytes(8))
        return receipt

    monkeypatch.setattr(pipeline, "commit_unit", flipped)

    with pytest.raises(CanaryError, match=r"cls/c/0/0: its index is damaged .*look at the disk") as caught:
        extract(config, planned, Worker(0, 1), lambda _: None)

    assert "v000/s00000" in named(caught.value)
