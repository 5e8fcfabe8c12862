"""Whether an extraction as asked for can continue the cache that is there. What was not asked for fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.reader import Cache
from proteus_cache.codecs.codec import codec_for_target
from proteus_cache.errors import UsageError
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.images import list_images
from proteus_cache.teachers.teacher import Teacher


def check_weights(config: ExtractConfig, manifest: Manifest, teacher: Teacher) -> None:
    """Refuse other weights than those that the cache was made with."""
    found, wanted = manifest.teacher.weights_sha256, teacher.identity.weights_sha256
    if found != wanted:
        raise UsageError(
            f"{config.out}: this cache was made with other settings: --weights is {manifest.teacher.weights_source} "
            f"({found[:12]}) there and {teacher.identity.weights_source} ({wanted[:12]}) here; give the same weights "
            "to continue it, or give --out another folder"
        )


def check_settings(config: ExtractConfig, manifest: Manifest) -> None:
    """Refuse to continue a cache with settings that it was not made with, naming all that differ."""
    codecs = {target.name: target.codec.name for target in manifest.targets}
    asked_codecs = {name: codec_for_target(config.codec, name) for name in codecs} if config.codec else None
    asked: list[tuple[str, Any, Any]] = [
        ("--teacher", config.teacher, manifest.teacher.name),
        ("--size", config.size_px, manifest.views.size_px),
        ("--targets", list(config.targets) if config.targets else None, list(codecs)),
        ("--codec", asked_codecs, codecs),
        ("--augment", config.augment, manifest.views.augment),
        ("--view-format", config.view_format, manifest.views.view_format),
        ("--seed", config.seed, manifest.views.seed),
        ("--shard-size", config.shard_size, manifest.shard_size),
        ("--probe-images", config.probe_images, manifest.images.n_probe),
    ]
    differ = [
        (flag, f"{flag} is {_short(found)} there and {_short(wanted)} here")
        for flag, wanted, found in asked
        if wanted is not None and wanted != found
    ]
    if differ:
        flags = " and ".join(flag for flag, _ in differ)
        raise UsageError(
            f"{config.out}: this cache was made with other settings: {', '.join(what for _, what in differ)}; leave "
            f"{flags} out to continue it, or give --out another folder"
        )
    if config.limit is not None and config.limit != manifest.images.n_images:
        n_listed = len(list_images(config.images).table)
        if min(config.limit, n_listed) != manifest.images.n_images:
            raise UsageError(
                f"{config.out}: this cache has {manifest.images.n_images} images and --limit {config.limit} was "
                "asked for; leave --limit out to continue it, or give --out another folder"
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {codec}" for name, codec in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def check_place(out: Path, images: Path) -> None:
    """Refuse images that are not there, before weights are downloaded, and a new cache inside their folder.

    It would be listed with them the next time.
    """
    if not images.exists():
        list_images(images)
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise UsageError(
            f"{out}: is inside the images folder {images}; give --out (or PROTEUS_HOME) a folder beside it"
        )


def check_image_root(cache: Cache, root: Path, source: Path) -> None:
    """The folder given must hold at least one of the cache's first images."""
    first = cache.image_table["path"].slice(0, 16).to_pylist()
    if not any(os.path.isfile(root / path) for path in first):
        raise UsageError(
            f"{source}: holds none of this cache's images (for example {first[0]}); give the folder that does"
        )
    if source.is_file():
        _check_labels(cache, source)


def _check_labels(cache: Cache, source: Path) -> None:
    """A list must give the cache's images the labels that they have there; what a folder is called cannot differ."""
    table, listed = cache.image_table, list_images(source).table
    labels = dict(zip(listed["path"].to_pylist(), listed["label"].to_pylist(), strict=True))
    for path, label in zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True):
        if labels.get(path, label) != label:
            raise UsageError(
                f"{source}: gives {path} the label {labels[path]}, and this cache has {label}; give the list that it "
                "was made with, or give --out another folder"
            )
