"""Does a student learn as much from coded targets as from exact ones: the demo, trained from each codec's pack.

Everything but the codec is equal: scenes, views, order, masks, start weights, settings. Every seed trains one student
from each pack. Scored are

    k-NN        accuracy on the demo's test scenes, as the demo measures it
    held out    the losses on views of the test scenes against the float16 targets, all directions
    kept        the same losses along the components that the klt pack keeps; the heads of a klt run were trained along
                these only, so this compares students, and `held out` the students with their heads
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from proteus_cache.codecs.codec import Basis
from proteus_cache.demo.run import RECIPE, TEST_IMAGES_A_CLASS, TEST_SEED, TRAIN_IMAGES_A_CLASS, TRAIN_SEED, VIEWS, K
from proteus_cache.demo.scenes import write_scenes
from proteus_cache.evaluate.evaluate import evaluate
from proteus_cache.evaluate.knn import KnnScore
from proteus_cache.evaluate.models import STUDENT_MODEL
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import extract
from proteus_cache.losses import Components
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.reader import Pack, is_pack, open_pack
from proteus_cache.processes import Worker
from proteus_cache.students.registry import build_student
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train
from proteus_cache.train.masking import draw_masks, n_masked_images, n_masked_patches
from proteus_cache.train.model import Distillation, build_distillation
from proteus_cache.train.run_folder import HEADS, LOSS_NAMES, STUDENT
from proteus_cache.train.targets import ComponentTarget, Target

EXACT = "float16"
WITHIN = 2.0
"""Pooled standard deviations."""
_BATCH = 60


def measure(folder: Path, codecs: list[str], n_seeds: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train and score; what an earlier call finished in this folder is kept.

    Args:
        folder: for scenes, packs and runs.
        codecs: beside float16; the first one with a basis gives the kept components.
        n_seeds: students of each codec.
        recipe: settings that differ from the demo's.
    """
    _write_images(folder)
    exact = _extracted(folder, "train")
    arms = [EXACT, *codecs]
    packs = {codec: _packed(exact, folder / "packs" / _file_name(codec), codec) for codec in arms}
    test = open_pack(_packed(_extracted(folder, "test"), folder / "packs" / "test", EXACT))
    bases = [basis for path in packs.values() if (basis := open_pack(path).codecs["patch"].basis) is not None]
    views, targets = _stored(test)
    runs = []
    for seed in range(n_seeds):
        for codec in arms:
            done = _one(folder, codec, packs[codec], seed, recipe, test, views, targets, bases[0] if bases else None)
            runs.append(done)
            print(json.dumps(done), flush=True)
    return {"runs": runs, "packs": {codec: _told_pack(path) for codec, path in packs.items()}, **_compared(runs, arms)}


def lines(result: dict[str, Any]) -> list[str]:
    """A table with a row for each score."""
    arms = list(result["arms"])
    rows = [
        "| score | " + " | ".join(arms) + " |",
        "| --- " * (len(arms) + 1) + "|",
        "| bytes of codes a view | " + " | ".join(f"{result['packs'][arm]['code_bytes']:,}" for arm in arms) + " |",
    ]
    for name in result["arms"][EXACT]:
        cells = [_told(result, arm, name) for arm in arms]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _told(result: dict[str, Any], arm: str, name: str) -> str:
    score = result["arms"][arm][name]
    apart = "" if arm == EXACT else f" ({result['apart'][arm][name]:+.1f} sd)"
    return f"{score['mean']:.4f} ± {score['sd']:.4f}{apart}"


def misses(result: dict[str, Any]) -> list[str]:
    """What is worse than float16 by more than the goal: k-NN, or the losses along what the codec keeps."""
    missed = []
    for codec, apart in result["apart"].items():
        for name, worse in (("k-NN", -1), ("kept" if "kept" in apart else "held out", 1)):
            if worse * apart[name] > WITHIN:
                missed.append(f"student from {codec}: {name} is {apart[name]:+.1f} pooled standard deviations apart")
    return missed


def _write_images(folder: Path) -> None:
    write_scenes(folder / "images" / "train", per_class=TRAIN_IMAGES_A_CLASS, seed=TRAIN_SEED)
    write_scenes(folder / "images" / "test", per_class=TEST_IMAGES_A_CLASS, seed=TEST_SEED)


def _extracted(folder: Path, part: str) -> Path:
    config = ExtractConfig(
        images=folder / "images" / part,
        out=folder / "caches" / part,
        home=folder / "home",
        teacher="demo",
        views=VIEWS,
        codec=EXACT,
        device="cpu",
    )
    config.out.parent.mkdir(exist_ok=True)
    extract(config, plan_cache(config, processes=1), Worker(0, 1), lambda _: None)
    return config.out


def _packed(cache: Path, out: Path, codec: str) -> Path:
    if not is_pack(out):
        out.parent.mkdir(exist_ok=True)
        report = build_pack(cache, out, codec=None if codec == EXACT else codec, workers=1)
        print("\n".join(report.step_lines()), flush=True)
    return out


def _file_name(codec: str) -> str:
    return codec.replace(":", "-")


def _told_pack(path: Path) -> dict[str, Any]:
    pack = open_pack(path)
    basis = pack.codecs["patch"].basis
    return {"code_bytes": pack.code_bytes, "kept": None if basis is None else basis.vectors.shape[1]}


def _stored(pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
    """All views and targets of a pack."""
    samples = [pack[number] for number in range(len(pack))]
    views = torch.stack([torch.from_numpy(sample.view) for sample in samples])
    return views, {
        name: torch.stack([torch.from_numpy(sample.targets[name]) for sample in samples]) for name in ("cls", "patch")
    }


def _one(
    folder: Path,
    codec: str,
    data: Path,
    seed: int,
    recipe: dict[str, Any],
    test: Pack,
    views: Tensor,
    targets: dict[str, Tensor],
    basis: Basis | None,
) -> dict[str, Any]:
    out = folder / "runs" / f"{_file_name(codec)}-{seed}"
    out.parent.mkdir(exist_ok=True)
    settings: dict[str, Any] = RECIPE | recipe
    config = TrainConfig(**settings, data=data, out=out, seed=seed, device="cpu")
    train(config, resume=True, replace=True)
    model = _trained(config, test)
    scores: dict[str, Any] = {"codec": codec, "seed": seed, "k-NN": _accuracy(out, folder)}
    whole = _losses(model, config, views, targets, None)
    scores |= {"held out": whole[0]} | {f"held out, {name}": loss for name, loss in _named(whole)}
    if basis is not None:
        along = _losses(model, config, views, targets, basis)
        scores |= {"kept": along[0]} | {f"kept, {name}": loss for name, loss in _named(along)}
    return scores


def _named(losses: list[float]) -> list[tuple[str, float]]:
    return [(name, loss) for name, loss in zip(LOSS_NAMES[1:], losses[1:], strict=True) if loss == loss]


def _accuracy(run: Path, folder: Path) -> float:
    report = evaluate(run, folder / "images", home=folder / "home", device="cpu", workers=1)
    return next(
        score.top1
        for model in report.models
        if model.model == STUDENT_MODEL
        for score in model.scores
        if isinstance(score, KnnScore) and score.k == K and score.top1 is not None
    )


def _trained(config: TrainConfig, pack: Pack) -> Distillation:
    """The student of a finished run with the heads that its run folder holds."""
    teacher, mean, std = pack.teacher, tuple(pack.view_spec.mean), tuple(pack.view_spec.std)
    student = build_student(config.student, size_px=pack.side_px, patch_px=teacher.patch_px, mean=mean, std=std, seed=0)
    model = build_distillation(
        replace(config, drop_path=0.0),
        student,
        teacher_width=pack.target_shapes["cls"][0],
        mean=mean,
        std=std,
    )
    model.student.load_state_dict(load_file(config.out / STUDENT))
    heads = load_file(config.out / HEADS)
    assert model.mask_token is not None
    model.mask_token.data.copy_(heads.pop("mask_token"))
    model.heads.load_state_dict(heads)
    return model.eval()


@torch.no_grad()
def _losses(
    model: Distillation, config: TrainConfig, views: Tensor, targets: dict[str, Tensor], basis: Basis | None
) -> list[float]:
    """Sum and parts over all views, every second one masked as in a run of seed 0, so that all are asked the same."""
    n_patches = targets["patch"].shape[1]
    n_masked = n_masked_patches(config.mask_ratio, n_patches)
    totals = torch.zeros(len(LOSS_NAMES))
    counts = (float(len(views)), float(n_masked_images(_BATCH) * (len(views) // _BATCH)))
    assert len(views) % _BATCH == 0
    for step, first in enumerate(range(0, len(views), _BATCH)):
        rows = slice(first, first + _BATCH)
        masks = draw_masks(0, step, torch.arange(_BATCH).numpy(), n_patches=n_patches, n_masked=n_masked)
        asked = _asked({name: tokens[rows] for name, tokens in targets.items()}, basis)
        totals += model(views[rows], asked, torch.from_numpy(masks), 1, counts, None)
    return [float(loss) for loss in totals]


def _asked(targets: dict[str, Tensor], basis: Basis | None) -> dict[str, Target]:
    if basis is None:
        return dict(targets)
    patches = targets["patch"]
    known = Components(patches[:, :0], (patches - basis.mean) @ basis.vectors)
    return {"cls": targets["cls"], "patch": ComponentTarget(known, basis.mean, basis.vectors)}


def _compared(runs: list[dict[str, Any]], arms: list[str]) -> dict[str, Any]:
    """Means and standard deviations, and how far each arm is from float16 in pooled standard deviations."""
    names = [name for name in runs[0] if name not in ("codec", "seed")]
    table: dict[str, dict[str, dict[str, float]]] = {}
    for arm in arms:
        of_arm = [run for run in runs if run["codec"] == arm]
        table[arm] = {
            name: {
                "mean": statistics.mean(run[name] for run in of_arm),
                "sd": statistics.stdev(run[name] for run in of_arm) if len(of_arm) > 1 else float("nan"),
            }
            for name in names
        }
    apart = {
        arm: {
            name: (table[arm][name]["mean"] - table[EXACT][name]["mean"])
            / max(((table[arm][name]["sd"] ** 2 + table[EXACT][name]["sd"] ** 2) / 2) ** 0.5, 1e-12)
            for name in names
        }
        for arm in arms[1:]
    }
    return {"arms": table, "apart": apart}
