"""Every mistake of a user is one line: what happened, where, and what to do."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from proteus_cache.next_steps import command_line
from tests.cli.running import extract_arguments, run, train_arguments
from tests.makers import make_images, make_teacher

_VIT = "extract --teacher vit --weights {weights} --images {images} --device cpu --workers 0 --shard-size 8"
_NEW = f"{_VIT} --out {{tmp}}/new"
_DINO = "extract --teacher dinov2_vits14 --images {images} --out {tmp}/new"
_TRAIN = "train --student vit_ti14 --data {pack} --device cpu --workers 0 --batch-size 8 --out {tmp}/run"
_EVAL = "eval {run} --device cpu"

MISTAKES: list[tuple[str, str]] = [
    # names
    ("extract --images {images}", "no teacher: say which with --teacher"),
    ("extract --teacher dinov2_vits4 --images {images}", r"unknown teacher 'dinov2_vits4'; did you mean dinov2_vits14"),
    ("extract --teacher DINOv2-ViTS14 --images {images}", r"did you mean dinov2_vits14\?"),
    ("extract --teacher resnet50 --images {images}", "unknown teacher 'resnet50'; choose .*vit or timm:NAME"),
    (
        "extract --teacher timm:vit_smal_patch16_224 --weights random:0 --images {images} --out {tmp}/new",
        "no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_224",
    ),
    (
        "extract --teacher timm:resnet50 --weights random:0 --images {images} --out {tmp}/new",
        "timm:resnet50 is no plain ViT",
    ),
    ("train --data {pack}", "no student: say which with --student"),
    ("train --student vit_s --data {pack}", "unknown student 'vit_s'; did you mean vit_s14"),
    ("train --student resnet --data {pack}", "unknown student 'resnet'; choose .*vit_ti14, vit_s14"),
    (f"{_NEW} --codec int9", r"unknown codec 'int9'; did you mean int8 or int4\?"),
    (f"{_NEW} --codec zip", "unknown codec 'zip'; choose float32, float16, int8, int4, klt:20dB or klt:64KB"),
    (f"{_NEW} --targets cls,pach", "vit has no target 'pach'; it has cls, patch and block.0 to block.1"),
    (f"{_NEW} --targets cls,block.9", "no target 'block.9'"),
    (f"{_NEW} --targets cls,cls", "--targets names one twice: cls,cls"),
    (f"{_NEW} --targets ,", "--targets names nothing"),
    (f"{_NEW} --augment diet", r"unknown augment 'diet'; did you mean deit\?"),
    (f"{_NEW} --view-format jpg", r"unknown view format 'jpg'; did you mean jpeg"),
    (f"{_NEW} --precision fp61", r"unknown precision 'fp61'; did you mean fp16"),
    (f"{_NEW} --device cdua", r"--device: unknown device 'cdua'; did you mean cuda\?"),
    (f"{_NEW} --device cuda:x", "--device: unknown device 'cuda:x'"),
    (f"{_TRAIN} --precision fp61", r"--precision must be fp32, fp16 or bf16, got 'fp61'; did you mean fp16"),
    (f"{_TRAIN} --device cdua", r"--device must be cpu or cuda, got 'cdua'; did you mean cuda\?"),
    (f"{_EVAL} --images {{images}} --device cdua", r"unknown device 'cdua'; did you mean cuda\?"),
    (f"{_EVAL} --images {{images}} --protocol kmm", "unknown protocol 'kmm'; choose knn"),
    ("pack {cache} --out {tmp}/new --codec float61", "unknown codec 'float61'; did you mean float16"),
    ("fetch dinov2_vits41", "unknown teacher 'dinov2_vits41'; did you mean dinov2_vits14"),
    ("fetch vit", "nothing to fetch for 'vit'; choose dinov2_vits14"),
    # the command line itself
    ("extrct", r"unknown command 'extrct'; did you mean extract\? See proteus-cache --help"),
    ("frobnicate", "unknown command 'frobnicate'; choose .*extract.*; see proteus-cache --help"),
    ("extract --teachr vit", r"no such option --teachr; did you mean --teacher\? See proteus-cache extract --help"),
    ("train --batchsize 8", r"no such option --batchsize; did you mean --batch-size or --size\?"),
    ("extract --xyzzy", "no such option --xyzzy; see proteus-cache extract --help"),
    ("extract --views", "--views.* see proteus-cache extract --help"),
    ("extract --views two", "--views takes a whole number, got 'two'; see proteus-cache extract --help"),
    ("train --lr=fast", "--lr takes a number, got 'fast'"),
    ("pack", "missing argument 'cache'; see proteus-cache pack --help"),
    ("info {pack} {cache}", "unexpected extra argument"),
    # numbers
    (f"{_NEW} --gpus 0", "--gpus must be a whole number of at least 1, got 0"),
    (f"{_NEW} --views 0", "--views must be a whole number of at least 1, got 0"),
    (f"{_NEW} --size 33", r"size 33 px is no multiple of its patch, 8 px; try 32 or 40"),
    (f"{_NEW} --probe-images 99", "--probe-images 99: only 24 images are trained on; ask for fewer"),
    ("pack {cache} --out {tmp}/new --views 0", "--views must be from 1"),
    ("pack {cache} --out {tmp}/new --workers 0", "--workers must be at least 1"),
    (f"{_TRAIN} --lr nan", "lr must be a finite number"),
    (f"{_TRAIN} --batch-size 1", "batch_size must be at least 2"),
    (f"{_TRAIN} --batch-size 4096", "batch of 4,096 is larger than the 24 views .*choose a smaller --batch-size"),
    (f"{_TRAIN} --batch-size 2 --gpus 3", "batch of 2 cannot be shared by 3"),
    (f"{_TRAIN} --precision fp16", "--precision fp16 needs a GPU; use fp32 or bf16"),
    (f"{_EVAL} --images {{images}} --batch-size 0", "--batch-size must be at least 1"),
    (f"{_NEW} --weights {{images}}", r"teacher vit needs --weights FILE.safetensors .*, got \S+images"),
    # images
    ("extract --teacher vit --weights {weights} --out {tmp}/new", "no images to extract: .*--images DIR"),
    (f"{_NEW} --images {{tmp}}/none", "none: no such folder or list of images; give one with --images"),
    (f"{_NEW} --images {{empty}}", r"empty: no images in it or in its folders; files named \*.jpeg, .* are read"),
    (f"{_NEW} --images {{tifs}}", r"tifs: no images .*it holds 2 named \*.tif"),
    (f"{_NEW} --images {{weights}}", r"teacher.safetensors: neither a folder of images nor a list .*with --images"),
    (f"{_NEW} --images {{cache}}", "cache: is a cache; --images takes the photographs"),
    (f"{_NEW} --images {{pack}}", "pack: is a pack; --images takes the photographs"),
    (f"{_NEW} --images {{run}}", "run: is a run; --images takes the photographs"),
    (f"{_NEW} --images {{mixed}}", r"images both in it \(x.jpg\) and in folders .*give a .txt list"),
    (f"{_NEW} --images {{latin_list}}", "line 1 is not UTF-8; save the list as UTF-8"),
    (f"{_EVAL} --images {{cache}}", "cache: is a cache; --images takes the photographs"),
    (f"{_EVAL} --images {{tmp}}/none", "none: no such folder or list of images; give one with --images"),
    (_EVAL, "no images to evaluate on: .*--images DIR"),
    (f"{_EVAL} --images {{images}}/class_0", "8 of 8 images have no label .*one folder for each class"),
    # where a cache goes
    (f"{_VIT} --out {{weights}}", "teacher.safetensors: is a file; give --out another name"),
    (f"{_VIT} --out {{tifs}}", r"tifs: is no cache, pack or run \(it holds a.tif, b.tif\); give --out a new or empty"),
    (f"{_VIT} --out {{images}}", r"images: is a folder of images \(it holds class_0, .*nothing was written"),
    (f"{_VIT} --out {{images}}/cache", r"images/cache: is inside the images folder \S+images; give --out"),
    (f"{_VIT} --out {{pack}}", r"pack: is a pack \(it holds .*nothing was written"),
    (f"{_VIT} --out {{run}}", r"run: is a run \(it holds checkpoints"),
    # another configuration of a cache
    (f"{_VIT} --out {{cache}} --seed 9", "made with other settings: --seed is 0 there and 9 here; leave --seed out"),
    (
        f"{_VIT} --out {{cache}} --seed 9 --augment none",
        "--augment is deit there and none here, --seed is 0 there and 9 here; leave --augment and --seed out",
    ),
    (f"{_VIT} --out {{cache}} --codec float16", "--codec is .*patch int8 there and .*patch float16 here"),
    (f"{_VIT} --out {{cache}} --teacher dinov2_vits14 --weights random:0", "--teacher is vit there and dinov2_vits14"),
    (
        f"{_VIT} --out {{cache}} --weights {{other_weights}}",
        r"--weights is teacher.safetensors \(\w{12}\) there and other.safetensors \(\w{12}\) here; give the same",
    ),
    (f"{_VIT} --out {{cache}} --images {{other_images}}", "holds none of this cache's images .*the folder that does"),
    (f"{_VIT} --out {{cache}} --limit 5", "has 24 images and --limit 5 was asked for; leave --limit out"),
    # a pack where a cache is meant, and the reverse
    ("pack {pack} --out {tmp}/new", "pack: is a pack; give a cache: the folder that `extract` wrote"),
    ("pack {run} --out {tmp}/new", "run: is a run; give a cache"),
    ("pack {images} --out {tmp}/new", "images: is a folder of images; give a cache"),
    ("pack {weights} --out {tmp}/new", "teacher.safetensors: is a file; give a cache"),
    ("pack {tmp}/none --out {tmp}/new", "none: no such folder; give a cache"),
    ("pack {cache} --out {images}", r"images: is a folder of images \(it holds class_0, class_1, class_2\)"),
    ("pack {cache} --out {cache}/pack", "is inside the cache; give --out a folder of its own"),
    ("pack {cache} --out {weights}", "is a file; give --out"),
    ("pack {cache} --out {pack} --codec float16", r"holds another pack \(its targets are .*give another --out"),
    ("pack {cache} --out {tmp}/new --views v007", "view index v007 is not complete, or not there; complete are v000"),
    ("pack {cache} --out {tmp}/new --targets block.3", "holds no target block.3, only cls, patch"),
    ("pack {cache} --out {tmp}/new --move", "There is no terminal to ask on: add --yes"),
    ("info {images}", "images: is a folder of images; give a cache, pack or run"),
    ("info {weights}", "teacher.safetensors: is a file; give a cache, pack or run"),
    ("info {empty}", "empty: is an empty folder; give a cache"),
    ("info {home}", "home: is a folder of several caches, packs or runs; give .*for example .*home/packs/p"),
    ("verify {tmp}/none", "none: no such folder; give a cache, pack or run"),
    ("verify {images}", "images: is a folder of images; give a cache, pack or run"),
    # training
    ("train --student vit_ti14", "nothing to train from: .* run `proteus-cache extract --teacher NAME` first"),
    ("train --student vit_ti14 --data {run}", "run: is a run; give a pack or cache: .*--data names it"),
    ("train --student vit_ti14 --data {images}", "images: is a folder of images; give a pack or cache"),
    ("train --student vit_ti14 --data {weights}", "is a file; give a pack or cache"),
    ("train --student vit_ti14 --data {tmp}/none", "no such folder; give a pack or cache"),
    ("train --student vit_ti14 --data {home}", "home: is a folder of several .*for example .*home/packs/p"),
    (f"{_TRAIN} --out {{run}}", "holds checkpoints .*go on with --resume, or choose another --out"),
    (f"{_TRAIN} --out {{pack}}", r"pack: is a pack \(it holds"),
    (f"{_TRAIN} --out {{images}}", r"images: is a folder of images \(it holds class_0"),
    (f"{_TRAIN} --out {{weights}}", "is a file; --out names the folder of a run"),
    (f"{_TRAIN} --out {{run}} --resume --seed 5", "its checkpoint was made with seed 0, and now it is 5"),
    # evaluation
    ("eval {pack} --images {images}", "pack: is a pack; give a run: the folder that `train` wrote"),
    ("eval {cache} --images {images}", "cache: is a cache; give a run"),
    ("eval {weights} --images {images}", "is a file; give a run"),
    ("eval {tmp}/none --images {images}", "no such folder; give a run"),
    (f"{_EVAL} --images {{images}} --weights {{weights}}", "--weights names the weights of a teacher; give --teacher"),
    (
        f"{_EVAL} --images {{images}} --teacher dinov2_vits14 --weights random:0",
        "size 32 px is no multiple of its patch, 14 px",
    ),
    # config files
    ("extract --config {tmp}/none.yaml", "cannot read the config: No such file.*--config names a YAML file"),
    ("extract --config {images}", "cannot read the config: Is a directory"),
]

FAILURES: list[tuple[str, str]] = [
    (f"{_DINO} --teacher dinov2_vitb14 --weights {{dino_s}}", "not of dinov2_vitb14: .*they look like dinov2_vits14"),
    (f"{_DINO} --weights {{no_vit}}", "no_vit.safetensors: these weights are not of dinov2_vits14: missing"),
    (f"{_NEW} --weights {{no_vit}}", "its metadata have no timm_vision_transformer"),
    (f"{_NEW} --weights {{tmp}}/none.safetensors", "none.safetensors: no such weights file"),
    (f"{_DINO} --weights {{images}}", "images: no such weights file; pass a .safetensors or .pth file, or random:SEED"),
    (f"{_NEW} --weights {{cut_short}}", "cut_short.safetensors: not a readable safetensors .*copy or fetch it again"),
    (f"{_DINO} --weights {{text}}", r"text.pth: not a readable PyTorch weights file \(\w+: .*copy or fetch it again"),
    (f"{_NEW} --images {{vanished_list}}", r"gone.jpg: cannot be read: No such file or directory; put the file back"),
    (f"{_NEW} --images {{all_bad}}", "none of the first 3 images can be used; the last: .*--images names photographs"),
    (f"{_VIT} --out {{weights}}/below", "a file stands where a folder is needed"),
]


@pytest.fixture(scope="module")
def places(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands of the lists above name."""
    more = tmp_path_factory.mktemp("more")
    for name in ("empty", "tifs", "all_bad"):
        (more / name).mkdir()
    for name in ("a", "b"):
        (more / "tifs" / f"{name}.tif").touch()
    for number in range(3):
        (more / "all_bad" / f"{number}.jpg").write_text("no picture")
    shutil.copytree(folder / "images", more / "mixed")
    (more / "mixed" / "x.jpg").touch()
    shutil.copytree(folder / "pack", more / "home" / "packs" / "p")
    (more / "latin.txt").write_bytes(b"a\xff.jpg\n")
    (more / "vanished.txt").write_text("gone.jpg\n")
    make_images(more / "others", 8, n_classes=2, seed=5)
    for number, path in enumerate(sorted((more / "others").rglob("*.JPEG"))):
        path.rename(path.with_name(f"other_{number}.JPEG"))
    _weights_of_others(folder, more)
    return {name: folder / name for name in ("images", "cache", "pack", "run")} | {
        "weights": folder / "teacher.safetensors",
        "other_weights": more / "other.safetensors",
        "other_images": more / "others",
        "latin_list": more / "latin.txt",
        "vanished_list": more / "vanished.txt",
        "text": more / "text.pth",
        **{name: more / name for name in ("empty", "tifs", "all_bad", "mixed", "home")},
        **{name: more / f"{name}.safetensors" for name in ("no_vit", "cut_short", "dino_s")},
    }


def _weights_of_others(folder: Path, more: Path) -> None:
    make_teacher(more / "other.safetensors", seed=5)
    save_file({"conv1.weight": torch.zeros(3)}, more / "no_vit.safetensors")
    names = {"cls_token": (1, 1, 384), "patch_embed.proj.weight": (384, 3, 14, 14)}
    names |= {f"blocks.{number}.norm1.weight": (384,) for number in range(12)}
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, more / "dino_s.safetensors")
    (more / "cut_short.safetensors").write_bytes((folder / "teacher.safetensors").read_bytes()[:5000])
    (more / "text.pth").write_text("hello")


def said(outcome: Any) -> str:
    """The one line of an outcome that failed, or of warnings and a last one."""
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("proteus-cache: ")]
    assert len(lines) == 1, outcome.stderr
    assert outcome.stdout == ""
    return str(lines[0])


def _refuse(command: str, places: dict[str, Path], tmp_path: Path, code: int) -> str:
    words = [word.format(**places, tmp=tmp_path) for word in command.split()]
    return said(run(*words, code=code))


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_2(places: dict[str, Path], tmp_path: Path, command: str, message: str) -> None:
    assert re.search(message, _refuse(command, places, tmp_path, 2))
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(("command", "message"), FAILURES, ids=[failure for failure, _ in FAILURES])
def test_a_failure_is_one_line_and_exit_1(places: dict[str, Path], tmp_path: Path, command: str, message: str) -> None:
    assert re.search(message, _refuse(command, places, tmp_path, 1))


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("extract", "teacher: vit\nimages: 5\n", "--images must be a path, got 5"),
        ("extract", "teacher: vit\ntargets: 5\n", "--targets must be a list of names, got 5"),
        ("extract", "teacher: vit\ngpus: many\n", "--gpus must be a whole number"),
        ("extract", "techer: vit\n", "unknown setting 'techer'; did you mean teacher"),
        ("extract", ": [\n", "not valid YAML"),
        ("extract", "- teacher\n", "a config is a list of `name: value` lines"),
        ("extract", "# nothing but a comment\n", "no teacher"),
        ("train", "train: 5\n", "`train:` must hold"),
        ("train", "train:\n  student: vit_ti14\nepochs: 3\n", "'epochs' stands beside the section"),
        ("train", "student: vit_ti14\ndata: 5\n", "--data must be a path, got 5"),
        ("train", "student: vit_ti14\nema_dcay: 0.9\n", "did you mean ema_decay"),
        ("train", "student: vit_ti14\nepochs: many\n", "settings.yaml: epochs must be a whole number, got 'many'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_and_exit_2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, text: str, message: str
) -> None:
    monkeypatch.setenv("PROTEUS_IMAGES", str(folder / "images"))
    (tmp_path / "settings.yaml").write_text(text)

    assert message in said(run(command, "--config", tmp_path / "settings.yaml", code=2))


def test_the_same_extract_twice_is_no_mistake(folder: Path) -> None:
    outcome = run(*extract_arguments(folder))

    assert "to do     nothing: all 6 units are there" in outcome.stderr
    assert "48 views" in outcome.stdout


def test_several_caches_are_listed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path))
    shutil.copytree(folder / "cache", tmp_path / "caches" / "one")
    run(*extract_arguments(folder), "--out", tmp_path / "caches" / "two", "--views", 1, "--seed", 3)

    message = said(run("train", "--student", "vit_ti14", code=2))

    assert re.search(r"several .*caches/one, .*caches/two; choose one with --data", message)


def test_an_unfinished_cache_cannot_be_packed(folder: Path, tmp_path: Path) -> None:
    run(*extract_arguments(folder), "--out", tmp_path / "planned", "--plan-only")

    message = said(run("pack", tmp_path / "planned", "--out", tmp_path / "pack", code=2))

    assert "no view index is complete yet; run the same extract again to finish it" in message


def test_an_unfinished_run_names_the_command_that_finishes_it(folder: Path, tmp_path: Path) -> None:
    run(*train_arguments(folder), "--out", tmp_path / "my run", "--max-steps", 1)
    (tmp_path / "my run" / "student.safetensors").unlink()

    message = said(run("eval", tmp_path / "my run", "--images", folder / "images", code=2))

    command = ["train", "--config", tmp_path / "my run" / "config.yaml", "--resume", "--out", tmp_path / "my run"]
    assert message.endswith(f"finish the run first: {command_line(*command)}")
    again = run(*command)
    assert "wrote student.safetensors" in again.stdout


def test_a_pack_without_patch_targets_cannot_train(folder: Path, tmp_path: Path) -> None:
    packed = run("pack", folder / "cache", "--out", tmp_path / "cls_only", "--targets", "cls")

    message = said(run("train", "--student", "vit_ti14", "--data", tmp_path / "cls_only", "--batch-size", 8, code=2))

    assert re.search(r"need the targets cls, patch, and the pack holds only cls; pack .*--targets cls,patch", message)
    assert "next:" not in packed.stdout, "no training is suggested that would be refused"


def test_a_damaged_config_of_a_run_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(": [")

    message = said(run("info", tmp_path, code=1))

    assert message.startswith(f"proteus-cache: {tmp_path / 'config.yaml'}: not valid YAML")


def test_a_pickle_with_code_as_weights_is_refused_without_running_it(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"cls_token": Payload()}))

    message = said(
        run(
            *("extract", "--teacher", "dinov2_vits14", "--weights", tmp_path / "bad.pth"),
            *("--images", folder / "images", "--out", tmp_path / "cache"),
            code=1,
        )
    )

    assert "bad.pth: refused, its pickle holds something other than plain tensors" in message
    assert not (tmp_path / "ran").exists()


def test_odd_images_are_taken_and_bad_ones_named(folder: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 6) / "odd"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    Image.fromarray(noise, "CMYK").save(images / "cmyk.jpg")
    Image.fromarray(noise[..., 0]).save(images / "grey.jpg")
    Image.fromarray(noise).save(images / "rgba.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(images / "16bit.png")
    Image.fromarray(noise[:1, :1, :3]).save(images / "1x1.jpg")
    Image.fromarray(noise[..., :3]).save(images / "png.JPEG", "PNG")
    (images / "empty.jpg").touch()
    (images / "text.png").write_text("text")
    whole = next((tmp_path / "images" / "class_0").iterdir()).read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])

    places = ("--images", tmp_path / "images", "--out", tmp_path / "cache")
    outcome = run(*extract_arguments(folder), *places, "--views", 1)

    assert "12 views in 1 view index, 3 images quarantined" in outcome.stdout
    reasons = {"empty": "the file is empty", "text": "neither JPEG nor PNG", "cut": "cannot be decoded"}
    for name, reason in reasons.items():
        assert re.search(rf"quarantined path=odd/{name}\.\w+ reason={reason}", outcome.stderr)


def test_too_many_bad_images_end_the_run(folder: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 24)
    for path in sorted(images.rglob("*.JPEG"))[:12]:
        path.write_bytes(b"bad")

    outcome = run(*extract_arguments(folder), "--images", images, "--out", tmp_path / "cache", code=1)

    last = outcome.stderr.splitlines()[-1]
    assert re.search(r"11 images cannot be used, more than the 10 that are let .*; the last: .*Repair or remove", last)


def test_an_image_that_changed_or_went_is_named(folder: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 24)
    arguments = [*extract_arguments(folder), "--images", images, "--out", tmp_path / "cache", "--views"]
    run(*arguments, 1)
    victim = images / "class_1" / "image_010.JPEG"
    before = victim.read_bytes()

    Image.new("RGB", (40, 40)).save(victim, "JPEG")
    changed = said_last(run(*arguments, 2, code=1))
    victim.unlink()
    gone = said_last(run(*arguments, 2, code=1))
    victim.write_bytes(before)

    assert re.search(r"image_010.JPEG: changed since its first view was made .*put the old file back", changed)
    assert re.search(r"image_010.JPEG: cannot be read: No such file or directory; put the file back", gone)
    assert "48 views" in run(*arguments, 2).stdout


def said_last(outcome: Any) -> str:
    """The last line of stderr."""
    return str(outcome.stderr.splitlines()[-1])


def test_one_class_is_scored_with_a_note(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images" / "class_0", tmp_path / "images" / "class_0")

    outcome = run("eval", folder / "run", "--images", tmp_path / "images", "--device", "cpu")

    assert "note: there is one class only, so every answer is right" in outcome.stdout


def test_a_gpu_without_memory_is_one_line_with_the_batch_that_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proteus_cache.teachers.teacher import Teacher

    targets = Teacher.targets

    def limited(self: Teacher, views: torch.Tensor, *others: Any) -> dict[str, torch.Tensor]:
        if len(views) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return targets(self, views, *others)

    monkeypatch.setattr(Teacher, "targets", limited)

    extracted = said(run(*extract_arguments(folder), "--out", tmp_path / "cache", code=1))
    scored = said(run("eval", folder / "run", "--images", folder / "images", "--device", "cpu", code=1))

    assert re.search(r"too little memory for 16 views at once .*--batch-size 4 fits: run the same command", extracted)
    assert re.search(r"too little memory for 18 images at once .*--batch-size 4 fits: run the same command", scored)


def test_a_gpu_without_memory_elsewhere_says_what_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_cache.evaluate import evaluate

    def exhaust(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "place", exhaust)

    message = said(run("eval", folder / "run", "--images", folder / "images", "--device", "cpu", code=1))

    assert "the GPU is out of memory (how much is free is not known); free some there" in message


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Starts a command with a file system of 1 MB at its first argument; skips where that is not allowed."""
    script = 'mkdir -p "$1" && mount -t tmpfs -o size=1m$2 tmpfs "$1" && shift 2 && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run(
        [*inside, str(tmp_path_factory.mktemp("disk")), "", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs a kernel that lets this user mount a tmpfs of its own")
    return inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", r"disk/cache: \d\.\d+ MB are needed \(with 5 % to spare\) and 1\.\d+ MB are free; --views \d+ fits"),
        (",ro", r"disk/cache: cannot make folder: Read-only file system; it is mounted read-only: give another folder"),
    ],
)
def test_a_small_or_read_only_disk_is_refused(
    folder: Path, tmp_path: Path, small_disk: list[str], options: str, message: str
) -> None:
    views = "20" if not options else "1"
    arguments = [*map(str, extract_arguments(folder)), "--out", str(tmp_path / "disk" / "cache"), "--views", views]
    command = [*small_disk, str(tmp_path / "disk"), options, sys.executable, "-m", "proteus_cache", *arguments]

    outcome = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (outcome.returncode, outcome.stdout) == (1, ""), outcome.stderr
    assert re.search(message, outcome.stderr.splitlines()[-1])


def test_a_config_of_a_run_makes_it_again(folder: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())

    run("train", "--config", folder / "run" / "config.yaml", "--out", tmp_path / "again")

    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["pack"] == settings["pack"]
