"""`proteus-cache fidelity` on real stores: what it says, what it writes, what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from proteus_cache.cache.reader import open_cache
from proteus_cache.documents import parse_sealed, seal
from proteus_cache.fidelity.run import Against, measure_fidelity
from proteus_cache.pack.reader import open_pack
from tests.cli.running import run
from tests.cli.test_interrupt import proposed, started
from tests.makers import make_cache


def measured(path: Path, *arguments: object, code: int = 0) -> Any:
    """The report that the command prints."""
    return json.loads(run("fidelity", path, *arguments, "--json", "--quiet", "--device", "cpu", code=code).stdout)


def tokens(stores: Path, pack: str, target: str) -> tuple[Any, Any]:
    """(views, tokens, channels) float64 of held-out views, exact and from the pack, matched by key."""
    cache, coded = open_cache(stores / "cache"), open_pack(stores / pack)
    (shard,) = cache.manifest.images.held_out
    exact = {cache[number].key: cache[number].targets[target] for number in range(len(cache))}
    found = {coded[number].key: coded[number].targets[target] for number in range(len(coded))}
    receipt = cache.receipt("v000", shard)
    assert receipt is not None
    pairs = [(exact[key], found[key]) for key in receipt.samples.keys]
    return np.stack([pair[0] for pair in pairs]).astype(np.float64), np.stack([pair[1] for pair in pairs])


@pytest.mark.parametrize("pack", ["int8", "int4", "klt"])
def test_a_pack_is_measured_as_numpy_measures_it(stores: Path, tmp_path: Path, pack: str) -> None:
    exact, decoded = tokens(stores, pack, "patch")
    e = (decoded - exact).reshape(-1, exact.shape[-1])
    z = exact.reshape(e.shape) - exact.reshape(e.shape).mean(axis=0)

    report = measured(stores / pack, "--against", stores / "cache", "--no-plot", "--out", tmp_path)

    assert (report["n_views"], report["n_images"], report["is_held_out"]) == (32, 32, True)
    patch = report["targets"]["patch"]["streams"]["patch"]
    assert patch["snr_db"] == pytest.approx(-10 * np.log10((e**2).sum() / (z**2).sum()), abs=1e-4)
    assert patch["worst_token"]["relative_error"] == pytest.approx(
        ((e**2).sum(axis=1) / (z**2).sum(axis=1)).max(), rel=1e-4
    )
    slopes = 1 + (z * e).sum(axis=0) / (z**2).sum(axis=0)
    assert patch["channels"]["slope"]["min"] == pytest.approx(slopes.min(), abs=1e-5)
    assert report["targets"]["patch"]["code_bytes"] == open_pack(stores / pack).targets[1].codec.code_bytes
    assert report["targets"]["cls"]["codec"] == "float16"


def test_the_files_lie_beside_the_pack_and_hold_what_is_printed(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proteus_cache.fidelity.curve.CODECS", ("float16", "int8", "int4", "klt:10dB"))
    pack = tmp_path / "my pack"
    shutil.copytree(stores / "int8", pack)

    outcome = run("fidelity", pack, "--against", stores / "cache", "--device", "cpu", "--json")

    printed = json.loads(outcome.stdout)
    written = parse_sealed((tmp_path / "my pack.fidelity.json").read_bytes(), "report")
    assert written | {key: printed[key] for key in ("report", "picture")} == printed
    assert printed["picture"] == str(tmp_path / "my pack.fidelity.png")
    picture = Image.open(tmp_path / "my pack.fidelity.png")
    assert min(picture.size) > 500
    assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "my pack",
        "my pack.fidelity.json",
        "my pack.fidelity.png",
    ]
    (curve,) = printed["curves"]
    rates = {point["codec"]: point["bits_per_value"] for point in curve["points"]}
    assert {"float16", "int8", "int4"} <= set(rates)
    assert rates["float16"] == 16
    assert all(point["snr_db"] > 0 for point in curve["points"])
    assert run("verify", pack, "--read-data").stdout.count("whole") == 1


def test_a_single_token_says_nothing_of_an_error(stores: Path, tmp_path: Path) -> None:
    arguments = ("--against", stores / "cache", "--samples", 1, "--out", tmp_path)

    report = measured(stores / "int8", *arguments)
    table = run("fidelity", stores / "int8", *arguments, "--device", "cpu").stdout.splitlines()

    cls = report["targets"]["cls"]["streams"]["cls"]
    assert (cls["snr_db"], cls["relative_error"], cls["verdict"]["is_good"]) == (None, None, None)
    assert report["targets"]["patch"]["streams"]["patch"]["snr_db"] > 10
    closeness, bias = ([line.split() for line in table if line.startswith("cls ")])[:2]
    assert closeness[3] == "-"
    assert bias[-2:] == ["not", "judged"]
    assert any(line.startswith("note: cls: all exact tokens are the same, so there is nothing") for line in table)


def test_the_picture_of_an_older_report_goes_and_no_other(stores: Path, tmp_path: Path) -> None:
    arguments = ("--against", stores / "cache", "--no-plot", "--out", tmp_path)
    picture = tmp_path / "int8.fidelity.png"
    picture.write_bytes(b"of somebody else")

    measured(stores / "int8", *arguments)
    assert picture.exists()
    measured(stores / "int8", *arguments)

    assert not picture.exists()


def test_a_report_reads_as_a_table(stores: Path, tmp_path: Path) -> None:
    outcome = run(
        *("fidelity", stores / "klt", "--against", stores / "cache", "--no-plot", "--device", "cpu", "--out", tmp_path)
    )

    lines = outcome.stdout.splitlines()
    assert lines[0] == f"fidelity of pack {stores / 'klt'}, against cache {stores / 'cache'}"
    assert any(line.split()[:2] == ["patch", "klt:12dB"] for line in lines)
    assert sum(line.startswith("target ") for line in lines) == 3
    assert any(line.startswith("mean patch ") for line in lines)
    assert lines[-1] == f"wrote     {tmp_path / 'klt.fidelity.json'}"


def test_a_store_against_itself_is_exact(stores: Path, tmp_path: Path) -> None:
    outcome = run(
        *("fidelity", stores / "cache", "--against", stores / "cache", "--device", "cpu", "--no-plot"),
        *("--out", tmp_path / "a.json"),
    )

    assert "exact" in outcome.stdout
    report = parse_sealed((tmp_path / "a.json").read_bytes(), "report")
    for target in ("cls", "patch"):
        stream = report["targets"][target]["streams"][target]
        assert (stream["snr_db"], stream["relative_error"], stream["verdict"]["is_good"]) == (None, 0.0, True)
    assert [found["shared"] for found in report["neighbours"]] == [1.0, 1.0]
    assert not (tmp_path / "a.png").exists()


def test_the_teacher_says_what_its_float32_cache_says(stores: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", "vit", "--weights", stores / "teacher.safetensors", "--no-plot", "--out", tmp_path]

    again = measured(stores / "int8", *teacher)
    stored = measured(stores / "int8", "--against", stores / "cache", "--no-plot", "--out", tmp_path)

    for name in ("cls", "patch"):
        first, second = (report["targets"][name]["streams"][name] for report in (again, stored))
        assert first["snr_db"] == pytest.approx(second["snr_db"], abs=1e-3)
        assert first["channels"]["slope"]["min"] == pytest.approx(second["channels"]["slope"]["min"], abs=1e-5)
    assert again["neighbours"] == stored["neighbours"]
    assert again["reference"].startswith("teacher vit")


def shrink(pack: Path, by: float) -> None:
    """Plant the bug that centroids are: every decoded patch token drawn towards the mean."""
    document = parse_sealed((pack / "pack.json").read_bytes(), "pack.json")
    (patch,) = (target for target in document["targets"] if target["name"] == "patch")
    old = pack / "codec" / f"{patch['codec']['parameters']}.safetensors"
    parameters = load_file(old)
    parameters["scale"] = parameters["scale"] * by
    blob = save(parameters)
    old.unlink()
    patch["codec"]["parameters"] = hashlib.sha256(blob).hexdigest()
    (pack / "codec" / f"{patch['codec']['parameters']}.safetensors").write_bytes(blob)
    (pack / "pack.json").write_bytes(seal(document))


def test_shrunken_levels_are_found_and_end_with_1(stores: Path, tmp_path: Path) -> None:
    shutil.copytree(stores / "int8", tmp_path / "pack")
    shrink(tmp_path / "pack", 0.99)

    report = measured(tmp_path / "pack", "--against", stores / "cache", "--no-plot", code=1)

    assert not report["is_good"]
    found = report["targets"]["patch"]["streams"]["patch"]
    assert found["channels"]["slope"]["pooled"] == pytest.approx(0.99, abs=0.001)
    assert not found["verdict"]["is_good"]
    assert "slope 0.99" in found["verdict"]["reasons"][0]
    assert report["targets"]["cls"]["streams"]["cls"]["verdict"]["is_good"]
    # A slope that lies within the tolerance is none: the mean decides nothing there.
    shutil.copytree(stores / "int8", tmp_path / "fine")
    shrink(tmp_path / "fine", 0.997)
    assert measured(tmp_path / "fine", "--against", stores / "cache", "--no-plot")["is_good"]


def test_without_held_out_views_that_is_said_aloud(tmp_path: Path) -> None:
    make_cache(tmp_path, n_images=10, views=1, codec="float32")
    run("pack", tmp_path / "cache", "--codec", "int8", "--out", tmp_path / "pack", "--workers", 1)

    outcome = run("fidelity", tmp_path / "pack", "--against", tmp_path / "cache", "--device", "cpu", "--no-plot")

    assert "5 views that the codec may have been fitted to" in outcome.stdout
    assert "note: no held-out view is stored here" in outcome.stdout
    assert "not judged" in outcome.stdout
    assert "patch: too few images to judge (5 of at least 30)" in outcome.stdout


def test_images_without_labels_have_neighbours_and_no_accuracy(tmp_path: Path) -> None:
    make_cache(tmp_path / "made", n_images=12, views=1)  # for its images and teacher
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted((tmp_path / "made" / "images").rglob("*.JPEG"))):
        shutil.copy(image, flat / f"{number}.JPEG")
    shutil.copy(tmp_path / "made" / "teacher.safetensors", tmp_path)
    made = make_cache(tmp_path, images=flat, views=1, codec="float32", out=tmp_path / "cache")

    report = measure_fidelity(made.path, Against(store=made.path), with_curve=False, device="cpu")

    assert [(found.exact, found.decoded, found.shared) for found in report.neighbours] == 2 * [(None, None, 1.0)]
    assert any("not every image has a label" in note for note in report.notes)


def test_infinite_tokens_name_the_sample(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_cache.codecs.scalar import Int8Codec

    usual = Int8Codec.decode

    def overflowing(self: Int8Codec, codes: torch.Tensor) -> torch.Tensor:
        decoded = usual(self, codes)
        if len(self.shape) == 2 and len(decoded) > 3:
            decoded[3, 1, 2] = torch.inf
        return decoded

    monkeypatch.setattr(Int8Codec, "decode", overflowing)
    outcome = run(
        *(
            "fidelity",
            stores / "int8",
            "--against",
            stores / "cache",
            "--no-plot",
            "--out",
            tmp_path,
            "--device",
            "cpu",
        ),
        code=1,
    )

    assert "decoded target patch of image_" in outcome.stderr
    assert "(v000) holds NaN or infinite tokens" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [1.0, 4.0, 6.0])
def test_ctrl_c_leaves_nothing_half_written(stores: Path, tmp_path: Path, delay_s: float) -> None:
    arguments = ["fidelity", stores / "int8", "--against", stores / "cache", "--out", tmp_path, "--device", "cpu"]

    with started(*arguments) as command:
        time.sleep(delay_s)  # wherever that is: imports, reading, or fitting codecs
        if command.process.poll() is not None:
            pytest.skip("it was faster")
        command.press_ctrl_c()
        status, out, errors = command.end()

    if status == 0:
        pytest.skip("it had just finished")
    assert (status, out) == (1, "")
    if "nothing was begun" not in errors:
        assert "interrupted; the store is as it was; to measure again: proteus-cache fidelity" in errors
        assert proposed(errors) == [str(argument) for argument in arguments]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{pack}", "say what to measure against: --against CACHE"),
        ("{pack} --against {cache} --teacher vit", "and not both"),
        ("{pack} --against {cache} --weights x", "--weights goes with --teacher"),
        ("{pack} --against {pack}", "its target patch is int8, which is no reference"),
        ("{pack} --against {tmp}", "is an empty folder; give a pack or cache"),
        ("{tmp}/nowhere --against {cache}", "no such folder"),
        ("{pack} --against {cache} --samples 0", "--samples must be at least 1, got 0"),
        ("{pack} --against {cache} --samples few", "--samples takes a whole number, got 'few'"),
        ("{pack} --against {cache} --out {tmp}/a/b.json", "give a folder that is there, or the name of a .json"),
        ("{pack} --against {cache} --out {tmp}/report.txt", "give a folder that is there, or the name of a .json"),
        ("{pack} --against {cache} --device cdua", r"unknown device 'cdua'; did you mean cuda?"),
        ("{pack} --teacher demo", "was made by vit with weights"),
        ("{pack} --teacher vit", "--weights"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(stores: Path, tmp_path: Path, arguments: str, message: str) -> None:
    places = {"pack": stores / "int8", "cache": stores / "cache", "tmp": tmp_path}

    outcome = run("fidelity", *[word.format(**places) for word in arguments.split()], "--no-plot", code=2)

    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert not list(stores.glob("*.fidelity.*"))


def test_damaged_codes_are_refused_by_name(stores: Path, tmp_path: Path) -> None:
    shutil.copytree(stores / "int4", tmp_path / "pack")
    (shard,) = open_pack(stores / "int4").document.held_out
    tar = tmp_path / "pack" / "v000" / f"s{shard:05d}.tar"
    record = open_pack(stores / "int4").sample_reader().index("v000").read(np.arange(32 * shard, 32 * shard + 1))[0]
    data = bytearray(tar.read_bytes())
    data[int(record["codes_offset"]) + 100] ^= 1
    tar.write_bytes(data)

    outcome = run("fidelity", tmp_path / "pack", "--against", stores / "cache", "--no-plot", code=1)

    assert "the codes of this sample are damaged" in outcome.stderr


def test_another_teachers_weights_are_refused(stores: Path, tmp_path: Path) -> None:
    from tests.makers import make_teacher

    make_teacher(tmp_path / "other.safetensors", seed=5)

    outcome = run(
        *("fidelity", stores / "int8", "--teacher", "vit", "--weights", tmp_path / "other.safetensors", "--no-plot"),
        code=2,
    )

    assert "only the same teacher can tell what is exact" in outcome.stderr


def test_a_picture_can_be_drawn_of_an_exact_store(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_cache.fidelity.plot import draw

    monkeypatch.setattr("proteus_cache.fidelity.curve.CODECS", ("float16", "int8"))
    report = measure_fidelity(stores / "float16", Against(store=stores / "float16"), device="cpu")

    image = Image.open(io.BytesIO(draw(report)))

    assert image.format == "PNG"
    (point,) = (point for point in report.curves[0].points if point.codec == "float16")
    assert point.snr_db is None


def test_the_teacher_runs_once_over_every_view(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_cache.teachers.teacher import Teacher

    seen: list[bytes] = []
    usual = Teacher.targets

    def counted(self: Teacher, views: torch.Tensor, names: Any) -> dict[str, torch.Tensor]:
        seen.extend(view.numpy().tobytes() for view in views)
        return usual(self, views, names)

    monkeypatch.setattr(Teacher, "targets", counted)
    weights = str(stores / "teacher.safetensors")
    report = measure_fidelity(
        stores / "int8", Against(teacher="vit", weights=weights, home=stores), with_curve=False, device="cpu"
    )

    assert len(seen) == len(set(seen)) == len(report.sample.measured) + len(report.sample.bank)


def test_a_full_temporary_folder_is_one_line(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("proteus_cache.fidelity.reference.TemporaryFile", Full)
    outcome = run(
        *("fidelity", stores / "int8", "--teacher", "vit", "--weights", stores / "teacher.safetensors"),
        *("--no-plot", "--device", "cpu"),
        code=1,
    )

    assert "cannot keep what the teacher says (No space left on device); 52.2 KB are needed there" in outcome.stderr


def test_a_pack_of_cls_alone_has_no_picture(stores: Path, tmp_path: Path) -> None:
    run("pack", stores / "cache", "--targets", "cls", "--codec", "int8", "--out", tmp_path / "cls", "--workers", 1)

    report = measured(tmp_path / "cls", "--against", stores / "cache")

    assert list(report["targets"]) == ["cls"]
    assert (report["picture"], report["curves"]) == (None, [])
    assert [found["feature"] for found in report["neighbours"]] == ["cls"]
