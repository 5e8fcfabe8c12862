"""Which views are measured, and which others stand beside them; both sides must hold the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proteus_cache.errors import UsageError
from proteus_cache.fidelity.sides import Entry, Facts, Side

DEFAULT_SAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Sample:
    """The views of one measurement."""

    measured: list[Entry]
    """Held-out ones where there are any."""
    bank: list[Entry]
    """Views of other images, one of each: other codecs are fitted to these, and they are the neighbours of k-NN."""
    is_held_out: bool

    @property
    def n_images(self) -> int:
        """Images that the measured views show."""
        return len({entry.key for entry in self.measured})

    @property
    def views(self) -> list[str]:
        """View indices of the measured views, ascending."""
        return sorted({entry.view for entry in self.measured})


def choose_sample(side: Side, views: Sequence[str], n_samples: int) -> Sample:
    """Up to `n_samples` held-out views, and as many views of trained images.

    Held-out shards are taken whole, view index by view index: a shard is a random draw of all images. Where nothing is
    held out, the last images of the list are measured, at most half of them.

    Args:
        side: whose codec is measured.
        views: view indices that both sides hold.
        n_samples: at most so many.

    Raises:
        UsageError: no view is stored.
    """
    first = views[0]
    held_out = [shard for shard in side.facts.held_out if shard in side.shards(first)]
    others = [shard for shard in side.shards(first) if shard not in held_out]
    measured = _take(_views_of(side, views, held_out), n_samples)
    if measured:
        return Sample(measured, _take(_views_of(side, [first], others), n_samples), True)
    backwards = _take(_views_of(side, [first], others[::-1], backwards=True), 2 * n_samples)
    if not backwards:
        raise UsageError(f"{side.facts.path}: holds no view yet, so there is nothing to measure")
    n_measured = -(-len(backwards) // 2)
    return Sample(backwards[:n_measured][::-1], backwards[n_measured:][::-1], False)


def match(measured: Side, reference: Side, entries: Sequence[Entry]) -> list[Entry]:
    """The same views in the reference.

    Raises:
        UsageError: the reference lacks one, or holds another picture under its name.
    """
    found = []
    for entry in entries:
        other = reference.find(entry)
        if other is None:
            raise UsageError(
                f"{reference.facts.path}: holds no view {entry.view} of {entry.key}, which {measured.facts.path} has; "
                "the two must be made from the same images, and the reference must be complete"
            )
        if other.digest != entry.digest:
            raise UsageError(
                f"{reference.facts.path}: its view {entry.view} of {entry.key} is another picture than that of "
                f"{measured.facts.path} (digests {other.digest} and {entry.digest}); both must hold the same views"
            )
        found.append(other)
    return found


def common_views(measured: Facts, reference: Facts) -> list[str]:
    """View indices that both sides hold.

    Raises:
        UsageError: there is none.
    """
    common = [view for view in measured.view_names if view in reference.view_names]
    if not common:
        held = [", ".join(facts.view_names) or "none" for facts in (measured, reference)]
        raise UsageError(
            f"{measured.path} and {reference.path}: have no view index in common ({held[0]}, and {held[1]})"
        )
    return common


def check_reference(measured: Facts, reference: Facts) -> None:
    """Refuse a reference that cannot tell what is exact.

    Raises:
        UsageError: it is of another teacher, lacks a target, or holds it in a lossy codec.
    """
    ours, theirs = measured.teacher, reference.teacher
    if ours.weights_sha256 != theirs.weights_sha256 or dict(ours.architecture) != dict(theirs.architecture):
        raise UsageError(
            f"{reference.path}: was made by {theirs.name} with weights {theirs.weights_sha256[:12]}, and "
            f"{measured.path} by {ours.name} with weights {ours.weights_sha256[:12]}; both must be of one teacher"
        )
    for name, target in measured.targets.items():
        if name not in reference.targets:
            raise UsageError(
                f"{reference.path}: holds no target {name}, only {', '.join(reference.targets)}; {measured.path} has "
                f"{', '.join(measured.targets)}, and a reference needs all of them"
            )
        exact = reference.targets[name]
        if list(exact.shape) != list(target.shape):
            raise UsageError(
                f"{reference.path}: its target {name} has shape {_shape(exact.shape)}, and that of {measured.path} "
                f"{_shape(target.shape)}"
            )
        if exact.codec.name not in ("float16", "float32"):
            raise UsageError(
                f"{reference.path}: its target {name} is {exact.codec.name}, which is no reference; give a cache or "
                "pack in float32 or float16, or --teacher"
            )


def _views_of(side: Side, views: Sequence[str], shards: Sequence[int], *, backwards: bool = False) -> Iterator[Entry]:
    for view in views:
        for shard in shards:
            if shard in side.shards(view):
                entries = side.entries(view, shard)
                yield from reversed(entries) if backwards else entries


def _take(entries: Iterator[Entry], count: int) -> list[Entry]:
    return [entry for entry, _ in zip(entries, range(count), strict=False)]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
