"""From teachers and view settings to the records of a manifest, and back; and the versions that may change bits."""

from __future__ import annotations

import platform
from importlib.metadata import version

import PIL
from PIL import features

from proteus_cache import __version__
from proteus_cache.cache.manifest import Manifest, TeacherRecord, ViewsRecord
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.views.encode import JPEG_QUALITY
from proteus_cache.views.spec import ViewSpec


def spec_of(manifest: Manifest) -> ViewSpec:
    """The settings of a cache's views."""
    views = manifest.views
    return ViewSpec(
        augment=views.augment,
        size_px=views.size_px,
        view_format=views.view_format,
        seed=views.seed,
        mean=(views.mean[0], views.mean[1], views.mean[2]),
        std=(views.std[0], views.std[1], views.std[2]),
    )


def views_record(spec: ViewSpec) -> ViewsRecord:
    """What a manifest keeps of them."""
    is_jpeg = spec.view_format == "jpeg"
    return ViewsRecord(
        augment=spec.augment,
        size_px=spec.size_px,
        view_format=spec.view_format,
        jpeg_quality=JPEG_QUALITY if is_jpeg else None,
        jpeg_subsampling="4:4:4" if is_jpeg else None,
        seed=spec.seed,
        mean=list(spec.mean),
        std=list(spec.std),
        decoder=decoder_version(),
    )


def teacher_record(teacher: Teacher, precision: Precision) -> TeacherRecord:
    """What a manifest keeps of a teacher."""
    identity = teacher.identity
    return TeacherRecord(
        name=identity.name,
        implementation=identity.implementation,
        architecture=dict(identity.architecture),
        weights_source=identity.weights_source,
        weights_sha256=identity.weights_sha256,
        licence=identity.licence,
        size_px=identity.size_px,
        patch_px=identity.patch_px,
        width=identity.width,
        depth=identity.depth,
        n_register_tokens=identity.n_register_tokens,
        mean=list(identity.mean),
        std=list(identity.std),
        precision=precision,
    )


def decoder_version() -> str:
    """The library that turns stored bytes into pixels here."""
    turbo = features.version("libjpeg_turbo")
    jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    return f"Pillow {PIL.__version__}, {jpeg}"


def libraries() -> dict[str, str]:
    """Versions that may change bits."""
    names = ("torch", "torchvision", "timm", "numpy", "pillow", "zarr", "numcodecs")
    ours = {"python": platform.python_version(), "proteus-cache": __version__}
    return ours | {name: version(name) for name in names}
