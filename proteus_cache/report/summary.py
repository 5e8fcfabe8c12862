"""What a cache, pack or run is: one dictionary for machines, a few lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_cache import storage, stores
from proteus_cache.cache.layout import PROBE, views_tar
from proteus_cache.cache.manifest import TargetRecord, TeacherRecord, ViewsRecord
from proteus_cache.cache.reader import Cache, combine_view_ids, open_cache
from proteus_cache.cache.writer import rows_of_view
from proteus_cache.documents import strict_json
from proteus_cache.errors import FormatError, UsageError
from proteus_cache.plan import human_bytes
from proteus_cache.plan.fitted import fitted_json, fitted_lines

if TYPE_CHECKING:
    from proteus_cache.pack.document import PackTarget

_STEP_BYTES = 1 << 16
_EPOCH_BYTES = 8 << 20
"""What is read of the end of metrics.jsonl for the last line of a step, and of an epoch: some 60,000 steps."""
_EPOCH_MARK = b'"seen"'
_TRAIN_AGAIN = "run the same training with --resume: it writes the file anew"


def kind_of(path: Path) -> stores.Kind:
    """ "cache", "pack" or "run".

    Raises:
        UsageError: `path` is none of them.
    """
    kind = stores.kind_of(path)
    if kind is None:
        raise UsageError(stores.wrong_folder(path, "cache", "pack", "run"))
    return kind


def summarise(path: Path) -> dict[str, Any]:
    """The facts of a cache, pack or run as JSON values.

    Raises:
        UsageError: `path` is none of them.
        DamageError: its documents are damaged.
    """
    return {"cache": summarise_cache, "pack": summarise_pack, "run": summarise_run}[kind_of(path)](path)


def summarise_cache(path: Path) -> dict[str, Any]:
    """The facts of a cache."""
    cache = open_cache(path)
    manifest = cache.manifest
    receipts = {view: [cache.receipt(view, shard) for shard in cache.units(view)] for view in cache.views()}
    views: dict[str, dict[str, Any]] = {
        view: {
            "units": len(found),
            "units_all": rows_of_view(manifest, view)[1],
            "views": sum(len(receipt.samples.rows) for receipt in found if receipt),
            "bytes": sum(file.size for receipt in found if receipt for file in receipt.files.values()),
            "view_id": cache.view_id(view) if cache.is_complete(view) else None,
        }
        for view, found in receipts.items()
    }
    view_ids = [entry["view_id"] for view, entry in views.items() if view != PROBE and entry["view_id"]]
    stored = sum(entry["views"] for view, entry in views.items() if view != PROBE)
    quarantined = {
        image.key for found in receipts.values() for receipt in found if receipt for image in receipt.quarantined
    }
    return {
        "kind": "cache",
        "path": str(path),
        "manifest": cache.manifest_digest,
        "cache_id": combine_view_ids(view_ids) if view_ids else None,
        "teacher": manifest.teacher.model_dump(),
        "images": manifest.images.model_dump(exclude={"classes"})
        | {"n_classes": len(manifest.images.classes or []) or None},
        "view_spec": manifest.views.model_dump(),
        "targets": {
            target.name: target.model_dump(exclude={"name"}) | {"fitted": _fitted(target, cache.parameters_blob)}
            for target in manifest.targets
        },
        "code_bytes": manifest.bytes_per_view,
        "view_bytes": _mean_view_bytes(cache, receipts),
        "shard_size": manifest.shard_size,
        "views": {view: entry for view, entry in views.items() if view != PROBE},
        "probe": views.get(PROBE),
        "n_stored_views": stored,
        "n_quarantined": len(quarantined),
        "n_widened": _widened(receipts),
        "is_complete": all(entry["units"] == entry["units_all"] for entry in views.values()) and bool(views),
        "units_left": sum(entry["units_all"] - entry["units"] for entry in views.values()),
        "bytes": sum(entry["bytes"] for entry in views.values()),
        "libraries": manifest.libraries,
        "licences": manifest.licences,
    }


def _fitted(
    target: TargetRecord | PackTarget,
    blob_of: Callable[[Any], bytes | None],  # of either kind of target
) -> dict[str, Any] | None:
    """What fitting the codec of a target showed; None for codecs that only need a scale, or nothing."""
    from proteus_cache.codecs.names import wants_many_views

    if not wants_many_views(target.codec.name):
        return None
    from proteus_cache.codecs import load_codec

    codec = load_codec(target.codec, tuple(target.shape), blob_of(target))
    return fitted_json(codec.calibration)


def _widened(receipts: dict[str, list[Any]]) -> dict[str, int]:
    """Target to the steps of its codes that an overflow widened; those without any are left out."""
    counted: Counter[str] = Counter()
    for found in receipts.values():
        for receipt in found:
            counted.update(receipt.widened if receipt is not None else {})
    return dict(counted)


def _mean_view_bytes(cache: Cache, receipts: dict[str, list[Any]]) -> float | None:
    """Mean size of a view with its document in the tars, padding included."""
    pairs = [
        (receipt.files[views_tar(view, receipt.shard)].size, len(receipt.samples.rows))
        for view, found in receipts.items()
        for receipt in found
        if receipt is not None
    ]
    n_views = sum(count for _, count in pairs)
    return round(sum(size for size, _ in pairs) / n_views, 1) if n_views else None


def summarise_pack(path: Path) -> dict[str, Any]:
    """The facts of a pack."""
    from proteus_cache.pack.reader import open_pack

    pack = open_pack(path)
    document = pack.document
    packed = {
        view: {
            "views": entry.n_samples,
            "tars": len(entry.tars),
            "bytes": sum(t.size for t in entry.tars) + entry.index.size,
        }
        for view, entry in document.packed.items()
    }
    n_bytes = sum(entry["bytes"] for entry in packed.values())
    return {
        "kind": "pack",
        "path": str(path),
        "pack_id": pack.digest,
        "pack_json_sha256": pack.file_sha256,
        "cache_id": document.cache.cache_id,
        "cache_manifest": document.cache.manifest,
        "teacher": document.teacher.model_dump(),
        "view_spec": document.views.model_dump(),
        "targets": {
            target.name: target.model_dump(exclude={"name"}) | {"fitted": _fitted(target, pack.parameters_blob)}
            for target in document.targets
        },
        "code_bytes": document.code_bytes,
        "shard_size": document.shard_size,
        "n_images": document.n_images,
        "n_classes": len(document.classes or []) or None,
        "held_out": document.held_out,
        "views": {view: entry for view, entry in packed.items() if view != PROBE},
        "probe": packed.get(PROBE),
        "n_stored_views": len(pack),
        "bytes": n_bytes,
        "bytes_per_view": round(n_bytes / max(1, sum(entry["views"] for entry in packed.values())), 1),
        "licences": document.licences,
    }


def summarise_run(path: Path) -> dict[str, Any]:
    """The facts of a training run.

    Raises:
        FormatError: its config.yaml is not what train writes.
    """
    config = _run_config(path / "config.yaml")
    checkpoints = [name for name in storage.list_folder(path / "checkpoints") if name.startswith("step-")]
    return {
        "kind": "run",
        "path": str(path),
        "config": config,
        "last_step": _last_line(path / "metrics.jsonl", of_epoch=False),
        "last_epoch": _last_line(path / "metrics.jsonl", of_epoch=True),
        "checkpoints": checkpoints,
        "weights": [
            name
            for name in ("student.safetensors", "ema.safetensors", "heads.safetensors")
            if storage.size_of(path / name) is not None
        ],
    }


def _run_config(path: Path) -> dict[str, Any]:
    from proteus_cache.yaml_text import MAX_BYTES, read_yaml

    try:
        config = read_yaml(storage.read_bytes(path, MAX_BYTES), str(path))
    except FormatError as error:
        raise FormatError(f"{error}; {_TRAIN_AGAIN}") from error
    if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
        raise FormatError(f"{path}: has no section `train:`, so this is no run; {_TRAIN_AGAIN}")
    if not _has_names(config):
        raise FormatError(f"{path}: holds a name that is no text; {_TRAIN_AGAIN}")
    return config


def _has_names(value: object) -> bool:
    """Whether all keys of YAML values are texts."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_has_names, value.values()))
    return not isinstance(value, list) or all(map(_has_names, value))


def _last_line(metrics: Path, *, of_epoch: bool) -> dict[str, Any] | None:
    """The last complete line of metrics.jsonl that is of a step, or of an epoch.

    Raises:
        FormatError: it is not a line that train writes.
    """
    size = storage.size_of(metrics)
    if not size:
        return None
    start = max(0, size - (_EPOCH_BYTES if of_epoch else _STEP_BYTES))
    data = storage.read_part(metrics, start, size - start)
    data = data[data.find(b"\n") + 1 if start else 0 : data.rfind(b"\n") + 1]
    line = _epoch_line(data) if of_epoch else _step_line(data)
    try:
        return None if line is None else _metrics(strict_json(line, str(metrics)), "seen" if of_epoch else "loss")
    except FormatError as error:
        raise FormatError(f"{metrics}: its last line is damaged; {_TRAIN_AGAIN}") from error


def _step_line(data: bytes) -> bytes | None:
    return next(
        (line for line in reversed(data.split(b"\n")) if line.startswith(b"{") and _EPOCH_MARK not in line), None
    )


def _epoch_line(data: bytes) -> bytes | None:
    end = len(data)
    while (place := data.rfind(_EPOCH_MARK, 0, end)) >= 0:
        end = data.rfind(b"\n", 0, place) + 1
        if data.startswith(b"{", end):
            return data[end : data.find(b"\n", place)]
    return None


def _metrics(line: dict[str, Any], loss: str) -> dict[str, Any]:
    """A line of metrics.jsonl, if its values are numbers and it has a step, an epoch and a loss of this name."""
    is_line = type(line.get("step")) is int and type(line.get("epoch")) is int and loss in line
    if not is_line or not all(value is None or type(value) in (int, float) for value in line.values()):
        raise FormatError("not numbers")
    return line


def describe(summary: dict[str, Any]) -> list[str]:
    """Lines for people."""
    return {"cache": _describe_cache, "pack": _describe_pack, "run": _describe_run}[summary["kind"]](summary)


def _describe_cache(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"cache     {summary['path']}",
        f"id        {summary['cache_id'] or 'none yet: no view index is complete'}",
        *_describe_source(summary),
        f"images    {summary['images']['n_images']:,}, {summary['n_quarantined']} quarantined",
        f"bytes     {human_bytes(summary['bytes'])}: {human_bytes(summary['code_bytes'])} codes + "
        f"{human_bytes(summary['view_bytes'] or 0)} pixels a view",
    ]
    if summary["n_widened"]:
        counts = ", ".join(f"{count:,} of {name}" for name, count in summary["n_widened"].items())
        lines.append(f"widened   steps of codes, by values beyond what calibration showed: {counts}")
    entries = summary["views"] | ({PROBE: summary["probe"]} if summary["probe"] else {})
    for view, entry in entries.items():
        lines.append(f"{view:<9} {entry['views']:,} views, {entry['units']} of {entry['units_all']} units")
    return lines if entries else [*lines, "views     none here: not extracted yet, or moved into a pack"]


def _describe_pack(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"pack      {summary['path']}",
        f"id        {summary['pack_id']}",
        f"pin       sha256:{summary['pack_json_sha256']} (of pack.json; train --expect-id takes it)",
        f"from      cache {summary['cache_id']}",
        *_describe_source(summary),
        f"bytes     {human_bytes(summary['bytes'])}: {human_bytes(summary['bytes_per_view'])} a view, "
        f"{human_bytes(summary['code_bytes'])} of it codes",
    ]
    entries = summary["views"] | ({PROBE: summary["probe"]} if summary["probe"] else {})
    lines += [f"{view:<9} {entry['views']:,} views in {entry['tars']} tars" for view, entry in entries.items()]
    if summary["held_out"]:
        lines.append(f"held out  {len(summary['held_out'])} tars")
    return lines


def _describe_source(summary: dict[str, Any]) -> list[str]:
    teacher = TeacherRecord.model_validate(summary["teacher"])
    views = ViewsRecord.model_validate(summary["view_spec"])
    targets = ", ".join(
        f"{name} {'x'.join(map(str, target['shape']))} {target['codec']['name']}"
        for name, target in summary["targets"].items()
    )
    return [
        f"teacher   {teacher.name} ({teacher.weights_source}, {teacher.weights_sha256[:12]}), {teacher.precision}",
        f"views     {views.augment}, {views.size_px} px, {views.view_format}, seed {views.seed}",
        f"targets   {targets}",
        *_describe_fits(summary["targets"]),
    ]


def _describe_fits(targets: dict[str, dict[str, Any]]) -> list[str]:
    from proteus_cache.codecs.calibration import CalibrationReport

    fitted = {name: target["fitted"] for name, target in targets.items() if target.get("fitted")}
    return fitted_lines({name: CalibrationReport(**values) for name, values in fitted.items()})


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4g}"


def _describe_run(summary: dict[str, Any]) -> list[str]:
    train = summary["config"]["train"]
    last = summary["last_step"]
    lines = [
        f"run       {summary['path']}",
        f"student   {train.get('student')}",
        f"trained   from {train.get('data')}",
    ]
    if last:
        lines.append(f"step      {last['step']:,} (epoch {last['epoch']}), loss {_number(last['loss'])}")
    if summary["last_epoch"]:
        after = summary["last_epoch"]
        kinds = {kind: after[kind] for kind in ("seen", "probe", "held_out") if after.get(kind) is not None}
        stated = ", ".join(f"{kind.replace('_', '-')} {loss:.4g}" for kind, loss in kinds.items())
        lines.append(f"losses    {stated} (after epoch {after['epoch']})")
    lines.append(f"newest    {summary['checkpoints'][-1] if summary['checkpoints'] else 'no checkpoint'}")
    return [*lines, f"weights   {', '.join(summary['weights']) or 'none yet'}"]
