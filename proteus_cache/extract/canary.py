"""Canaries: the same fixed input at planning, at the start of every extracting process, and again and again.

Planning writes down what teacher and decoder give. A process that begins to extract must give the same: pixels
exactly, the teacher's outputs within a tolerance that admits another kind of GPU and another precision and refuses
another teacher. Later repeats must give what this process gave at first, to the bit: the batch always runs alone, in
one shape, so that a difference is a device that drifts. One view of every committed unit goes through the teacher once
more, too. Rendering processes load the same libraries and are not watched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from proteus_cache.cache.manifest import CanaryRecord, Manifest
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.writer import Unit
from proteus_cache.codecs.codec import Codec
from proteus_cache.devices import or_explain
from proteus_cache.errors import CanaryError, ProteusCacheError
from proteus_cache.extract.memory import smaller_batch
from proteus_cache.extract.records import decoder_version, libraries
from proteus_cache.extract.spot_check import check_one_view
from proteus_cache.teachers.canary import (
    N_IMAGES,
    TOLERANCE,
    canary_targets,
    project,
    relative_difference,
)
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.views.known import decode_known

logger = logging.getLogger(__name__)

CANARY_EVERY = 50
"""Units of one process between two repeats."""
RMS_FACTOR = 8.0
"""How much larger or smaller than on the planning views a unit's root mean square may be."""
_KEPT = "finished units are kept"


def record_canary(teacher: Teacher, tokens: dict[str, Tensor], at_once: int) -> CanaryRecord | None:
    """What a manifest keeps of the canaries; None when the outputs of this precision are not finite.

    Args:
        teacher: on the device and in the precision that were chosen.
        tokens: target to (n, *shape) of the planning views.
        at_once: views in one forward, at most.
    """
    found = _targets(teacher, list(tokens), at_once)
    if not all(bool(values.isfinite().all()) for values in found.values()):
        return None
    return CanaryRecord(
        projections={name: project(values) for name, values in found.items()},
        rms={name: _rms(values) for name, values in tokens.items()},
        decoded=decode_known(),
    )


class CanaryWatch:
    """The canaries of one extracting process."""

    def __init__(self, cache: Cache, teacher: Teacher, codecs: dict[str, Codec], at_once: int) -> None:
        """Run the batch for the first time and compare with the plan.

        Args:
            cache: that is extracted into; one without canaries in its manifest is only watched for drift.
            teacher: on its device, in its precision.
            codecs: of all targets, on the same device.
            at_once: views in one forward, at most; fixed for the process.

        Raises:
            CanaryError: the decoder or the teacher is not the plan's.
        """
        self._cache = cache
        self._teacher = teacher
        self._codecs = codecs
        self._at_once = at_once
        self._decoded = _decoded()
        planned = cache.manifest.canary
        if planned is not None:
            self._check_decoder(planned)
        self._first = self._run()
        if planned is not None:
            self._check_teacher(planned)
        self._is_exact = self._differences(self._run()) == {}
        if not self._is_exact:
            logger.warning(
                "the device %s gives other bits for the same batch; canaries are compared within %g",
                _device_name(teacher.device),
                self._tolerance(),
            )

    def repeat(self) -> None:
        """Run the batch and decode the JPEGs again.

        Raises:
            CanaryError: not what this process got at first.
        """
        decoded = _decoded()
        if decoded != self._decoded:
            raise CanaryError(
                f"{self._cache.path}: the decoder gives other pixels than when this process started ("
                f"{_changed(decoded, self._decoded)}); memory or processor of this machine is failing: do not use it"
            )
        differ = self._differences(self._run())
        if differ and (self._is_exact or max(differ.values()) > self._tolerance()):
            name, ratio = max(differ.items(), key=lambda item: item[1])
            raise CanaryError(
                f"{self._cache.path}: the teacher gives other numbers for the same batch than when this process "
                f"started (target {name}, relative difference {ratio:.1e}); the device "
                f"{_device_name(self._teacher.device)} or its memory is failing: do not use it"
            )

    def look_at(self, unit: Unit) -> None:
        """Put one view of a committed unit through the teacher again, in the unit's precision.

        Raises:
            CanaryError: the cache holds something else.
        """
        precision = self._teacher.precision
        if precision != unit.precision:
            self._teacher.to(self._teacher.device, unit.precision)  # type: ignore[arg-type]  # checked by the receipt
        try:
            check_one_view(self._cache, unit, self._teacher, self._codecs)
        finally:
            if precision != unit.precision:
                self._teacher.to(self._teacher.device, precision)

    def _run(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Target to what the teacher says of the images, and its codes, on the CPU."""
        device = self._teacher.device
        found = _targets(self._teacher, list(self._codecs), self._at_once)
        with torch.inference_mode():
            codes = {name: self._codecs[name].encode(values.to(device)).cpu() for name, values in found.items()}
        return {name: (values, codes[name]) for name, values in found.items()}

    def _differences(self, found: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Target to the relative difference from the first time, of those that are not equal to the bit."""
        return {
            name: _relative(values, self._first[name][0])
            for name, (values, codes) in found.items()
            if not (_same_bits(values, self._first[name][0]) and torch.equal(codes, self._first[name][1]))
        }

    def _tolerance(self) -> float:
        return max(TOLERANCE[self._teacher.precision], TOLERANCE[self._cache.manifest.teacher.precision])

    def _check_decoder(self, planned: CanaryRecord) -> None:
        if planned.decoded == self._decoded:
            return
        manifest = self._cache.manifest
        then, here = manifest.views.decoder, decoder_version()
        if then == here:
            remedy = f"both are {here}, so this installation or machine is damaged: install it anew, or use another"
        else:
            version = manifest.libraries.get("pillow", "?")
            remedy = f"it was {then} then and is {here} here: install pillow=={version}, or extract into another --out"
        raise CanaryError(
            f"{self._cache.path}: the decoder gives other pixels here than when this cache was planned ("
            f"{_changed(self._decoded, planned.decoded)}); {remedy}; {_KEPT}"
        )

    def _check_teacher(self, planned: CanaryRecord) -> None:
        limit = self._tolerance()
        for name, expected in planned.projections.items():
            if name not in self._first:
                continue
            values = self._first[name][0]
            if not bool(values.isfinite().all()):
                raise CanaryError(
                    f"{self._cache.path}: the teacher's outputs are not finite in {self._teacher.precision} here, and "
                    f"were when this cache was planned; {self._what_differs()}: add --precision fp32, or use another "
                    f"device; {_KEPT}"
                )
            ratio = relative_difference(project(values), expected)
            if ratio > limit:
                raise CanaryError(
                    f"{self._cache.path}: the teacher gives other outputs here than when this cache was planned "
                    f"(target {name} differs by {_percent(ratio)}, and {_percent(limit)} is let pass); "
                    f"{self._what_differs()}: mend that, or extract into another --out; {_KEPT}"
                )

    def _what_differs(self) -> str:
        """Versions and precision that are not the plan's, in words."""
        manifest, here = self._cache.manifest, libraries()
        differ = [
            f"{name} was {manifest.libraries[name]} and is {here[name]}"
            for name in ("torch", "timm")
            if manifest.libraries.get(name) not in (None, here[name])
        ]
        if manifest.teacher.precision != self._teacher.precision:
            differ.append(f"precision was {manifest.teacher.precision} and is {self._teacher.precision}")
        device = _device_name(self._teacher.device)
        same = f"weights and versions are the same, so the device {device} or its memory may be failing"
        return ", ".join([*differ, f"the device is {device}"]) if differ else same


def implausible(manifest: Manifest, target: str, mean_square: float) -> str | None:
    """Why the values of a target over one unit cannot be this teacher's, in words; None where they can.

    Outputs of the final norm have a root mean square that images hardly change. Blocks without it may have any, and
    are let pass.
    """
    planned = manifest.canary.rms.get(target, 0.0) if manifest.canary else 0.0
    if planned <= 0.0 or target.endswith(".raw"):
        return None
    ratio = float(mean_square) ** 0.5 / planned
    if 1 / RMS_FACTOR <= ratio <= RMS_FACTOR:
        return None
    return f"target {target} has {ratio:.3g} times the root mean square that it had on the planning views"


def _targets(teacher: Teacher, names: Sequence[str], at_once: int) -> dict[str, Tensor]:
    n = min(at_once, N_IMAGES)
    return or_explain(
        lambda: canary_targets(teacher, names, n),
        n,
        lambda fewer: canary_targets(teacher, names, fewer),
        smaller_batch(n),
    )


def _decoded() -> dict[str, str]:
    try:
        return decode_known()
    except ProteusCacheError as error:
        raise CanaryError(
            f"{error}; this JPEG comes with proteus-cache, so the installation is damaged: install it anew"
        ) from error


def _changed(found: dict[str, str], expected: dict[str, str]) -> str:
    names = sorted(name for name in expected if found.get(name) != expected[name])
    return f"{len(names)} of {len(expected)} built-in JPEGs: {', '.join(names)}"


def _same_bits(found: Tensor, first: Tensor) -> bool:
    return torch.equal(found.view(torch.int32), first.view(torch.int32))


def _relative(found: Tensor, first: Tensor) -> float:
    """0 where only codes differ; infinite for what is not finite."""
    difference = float((found.double() - first.double()).norm() / first.double().norm().clamp_min(1e-30))
    return difference if difference < float("inf") else float("inf")  # NaN, too


def _rms(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(values.numel())


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
