"""How long coding takes: one core at the shape of DINOv2-g, and a GPU beside its teacher."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from proteus_cache.codecs.codec import Codec, fit_codec
from proteus_cache.codecs.int4 import Int4Codec
from proteus_cache.codecs.klt import KltCodec
from proteus_cache.codecs.scalar import Int8Codec
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.train.speed import take_turns

CODECS = ("int8", "int4", "klt:20dB")
SIDE, WIDTH = 16, 1536
GOALS = {
    "int8 decode": 1500.0,
    "int4 decode": 800.0,
    "klt:20dB decode, no inverse transform": 300.0,
    "klt:20dB encode": 25.0,
}
"""Views a second of one core."""
GPU_SHARE = 0.05
_CALIBRATION_VIEWS = 64
_BATCH = 4


def made_up_tokens(n_views: int, width: int = WIDTH) -> Tensor:
    """(n, 256, width) tokens with structure: variances fall as 1 / i, and half of each is smooth over the patches."""
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    variances = 1 / torch.arange(1, width + 1)
    coarse = torch.randn(n_views, width, SIDE // 4, SIDE // 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic").reshape(n_views, width, SIDE * SIDE)
    rough = torch.randn(n_views, width, SIDE * SIDE, generator=random)
    planes = torch.matmul(turn * variances.sqrt() * 30, (smooth + rough) * 0.5**0.5)
    return planes.transpose(1, 2).contiguous()


def measure_core(rounds: int) -> dict[str, Any]:
    """Views/s of one thread, all arms in turn, round by round."""
    torch.set_num_threads(1)
    tokens = made_up_tokens(_CALIBRATION_VIEWS)
    views = tokens[:_BATCH].clone()
    codecs = {name: fit_codec(name, tokens) for name in CODECS}
    seconds = take_turns({name: _timed(arm) for name, arm in _arms(codecs, views).items()}, rounds)
    rates = {name: sorted(_BATCH / taken for taken in turns) for name, turns in seconds.items()}
    klt = codecs["klt:20dB"]
    assert isinstance(klt, KltCodec)
    return {
        "shape": [SIDE * SIDE, WIDTH],
        "batch": _BATCH,
        "rounds": rounds,
        "bytes": {name: codec.code_bytes for name, codec in codecs.items()},
        "klt": {"kept": klt.n_kept, "dct": klt.has_dct},
        "views_per_s": {name: [statistics.median(found), found[0], found[-1]] for name, found in rates.items()},
        "of_int8": {name: _ratio(seconds, name) for name in seconds},
    }


def core_lines(result: dict[str, Any]) -> list[str]:
    """A table with a row for each arm."""
    lines = ["| one core | ms a view | views/s, median (lowest to highest) | of int8 | goal |", "| --- " * 5 + "|"]
    for name, (median, low, high) in result["views_per_s"].items():
        goal = f"{GOALS[name]:,.0f}" if name in GOALS else ""
        ratio = f"{result['of_int8'][name]:.3f}"
        lines.append(f"| {name} | {1000 / median:.2f} | {median:,.0f} ({low:,.0f} to {high:,.0f}) | {ratio} | {goal} |")
    kept = f"keeps {result['klt']['kept']} of {WIDTH} components, DCT {'on' if result['klt']['dct'] else 'off'}"
    return [*lines, "", f"klt:20dB here {kept}; {result['bytes']['klt:20dB']:,} bytes a view"]


def core_misses(result: dict[str, Any]) -> list[str]:
    """Arms below their goals."""
    return [
        f"{name}: {result['views_per_s'][name][0]:,.0f} views/s a core, goal {goal:,.0f}"
        for name, goal in GOALS.items()
        if result["views_per_s"][name][0] < goal
    ]


def _arms(codecs: dict[str, Codec], views: Tensor) -> dict[str, Callable[[], object]]:
    arms: dict[str, Callable[[], object]] = {}
    for name, codec in codecs.items():
        codes = codec.encode(views)
        if isinstance(codec, KltCodec):
            patch_codes = codes[:, codec.lead_bytes :]
            arms[f"{name} decode, no inverse transform"] = lambda codec=codec, codes=patch_codes: codec.dequantise(  # type: ignore[misc]
                codes
            )
            arms[f"{name} decode to components"] = lambda codec=codec, codes=codes: codec.components(codes)  # type: ignore[misc]
        arms[f"{name} decode"] = lambda codec=codec, codes=codes: codec.decode(codes)  # type: ignore[misc]
        arms[f"{name} encode"] = lambda codec=codec: codec.encode(views)  # type: ignore[misc]
    return arms


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def turn() -> float:
        work()  # its memory and caches, after another arm had the core
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return turn


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Of rates, to int8 doing the same, round by round."""
    base = seconds["int8 encode" if name.endswith("encode") else "int8 decode"]
    return statistics.median(b / a for a, b in zip(seconds[name], base, strict=True))


def measure_gpu(
    teacher_name: str, weights: str, device: torch.device, *, batch: int, n_fitted: int, rounds: int
) -> dict[str, Any]:
    """Encode plus decode of each codec as a share of the teacher's forward, taken in turn on one device.

    Args:
        teacher_name: whose patch tokens are coded.
        weights: `random:0` where the published ones are out of reach; times do not depend on them.
        device: a GPU; a CPU runs it too.
        batch: views in one forward, coded together.
        n_fitted: views that codecs are fitted to.
        rounds: that count.
    """
    teacher = load_teacher(teacher_name, weights=weights, home=Path("proteus"), size_px=None)
    side = teacher.identity.size_px
    random = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (max(batch, n_fitted), side, side, 3), dtype=torch.uint8, generator=random)
    result: dict[str, Any] = {"teacher": teacher_name, "batch": batch, "device": _device_name(device), "precision": {}}
    precisions: tuple[Precision, ...] = ("bf16", "fp16") if device.type == "cuda" else ("fp32",)
    codecs: dict[str, Codec] = {}
    for precision in precisions:
        teacher.to(device, precision)
        if not codecs:
            tokens = _patches(teacher, views[:n_fitted], batch)
            codecs = {name: fit_codec(name, tokens, device=device) for name in CODECS}
            result["same"] = {name: _same_as_cpu(codec, tokens[:8].cpu(), device) for name, codec in codecs.items()}
        result["precision"][precision] = _shares(teacher, views[:batch].to(device), codecs, device, rounds)
    return result


def gpu_lines(result: dict[str, Any]) -> list[str]:
    """A table with a row for each precision and codec."""
    lines = [f"{result['device']}, {result['teacher']}, {result['batch']} views at once", ""]
    lines += ["| precision | codec | encode, ms | decode, ms | teacher, ms | share (goal 5 %) |", "| --- " * 6 + "|"]
    for precision, found in result["precision"].items():
        for name, row in found["codecs"].items():
            lines.append(
                f"| {precision} | {name} | {row['encode_ms']:.3f} | {row['decode_ms']:.3f} | {found['teacher_ms']:.2f} "
                f"| {row['share']:.2%} |"
            )
    return [*lines, "", *(f"{name}: {told}" for name, told in result["same"].items())]


def gpu_misses(result: dict[str, Any]) -> list[str]:
    """Codecs that take too large a share, or read other integers than a CPU."""
    slow = [
        f"{name}: encode and decode take {row['share']:.1%} of the {precision} forward, goal {GPU_SHARE:.0%}"
        for precision, found in result["precision"].items()
        for name, row in found["codecs"].items()
        if row["share"] > GPU_SHARE
    ]
    other = [f"{name}: integers differ from the CPU's" for name, same in result["same"].items() if not same["integers"]]
    return slow + other


def _patches(teacher: Teacher, views: Tensor, batch: int) -> Tensor:
    return torch.cat([teacher.targets(part, ("patch",))["patch"] for part in torch.split(views, batch)])


def _shares(
    teacher: Teacher, views: Tensor, codecs: dict[str, Codec], device: torch.device, rounds: int
) -> dict[str, Any]:
    patches = teacher.targets(views, ("patch",))["patch"]
    arms: dict[str, Callable[[], object]] = {"teacher": lambda: teacher.targets(views, ("cls", "patch"))}
    for name, codec in codecs.items():
        codec.to(device)
        codes = codec.encode(patches)
        arms[f"{name} encode"] = lambda codec=codec: codec.encode(patches)  # type: ignore[misc]
        arms[f"{name} decode"] = lambda codec=codec, codes=codes: codec.decode(codes)  # type: ignore[misc]
    seconds = take_turns({name: _timed_on(arm, device) for name, arm in arms.items()}, rounds)
    ms = {name: 1000 * statistics.median(turns) for name, turns in seconds.items()}
    return {
        "teacher_ms": ms["teacher"],
        "codecs": {
            name: {
                "encode_ms": ms[f"{name} encode"],
                "decode_ms": ms[f"{name} decode"],
                "share": (ms[f"{name} encode"] + ms[f"{name} decode"]) / ms["teacher"],
            }
            for name in codecs
        },
    }


def _timed_on(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Turns between two events on the device; plain time on a CPU."""
    if device.type != "cuda":
        return _timed(work)

    def turn() -> float:
        work()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000

    return turn


def _same_as_cpu(codec: Codec, tokens: Tensor, device: torch.device) -> dict[str, Any]:
    """Whether the device reads the same integers from the CPU's codes, and how near its own codes and numbers are."""
    codec.to("cpu")
    codes = codec.encode(tokens)
    here, decoded = _integers(codec, codes), codec.decode(codes)
    codec.to(device)
    there = [part.cpu() for part in _integers(codec, codes.to(device))]
    again = codec.encode(tokens.to(device)).cpu()
    apart = (codec.decode(codes.to(device)).cpu() - decoded).abs().max() / decoded.abs().max()
    codec.to("cpu")
    return {
        "integers": all(torch.equal(a, b) for a, b in zip(here, there, strict=True)),
        "equal_bytes_when_encoding": float((again == codes).double().mean()),
        "largest_difference_of_decoded": float(apart),
    }


def _integers(codec: Codec, codes: Tensor) -> list[Tensor]:
    """What the codec itself reads from the codes of a batch, before it is scaled."""
    if isinstance(codec, KltCodec):
        patch_codes = codes[:, codec.lead_bytes :]
        return [codec.gain_numbers(patch_codes), *codec.integers(patch_codes)]
    # Under gains of 1 a codec with evenly spaced levels decodes to its integers, or twice them less 15.
    ones = torch.ones((len(codes), codec.shape[0]), dtype=torch.float16, device=codes.device).view(torch.uint8)
    bare = _bare(codec).to(codes.device)
    return [bare.decode(torch.cat((ones, codes[:, 2 * codec.shape[0] :]), dim=1))]


def _bare(codec: Codec) -> Codec:
    """The same code with mean 0 and evenly spaced levels."""
    width = codec.shape[-1]
    if isinstance(codec, Int8Codec):
        return Int8Codec(codec.shape, torch.zeros(width), torch.ones(width))
    blob = codec.parameters_blob()
    assert blob is not None
    levels = torch.arange(-15.0, 16.0, 2.0).expand(width, 16)
    return Int4Codec(codec.shape, load(blob) | {"mean": torch.zeros(width), "levels": levels})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
