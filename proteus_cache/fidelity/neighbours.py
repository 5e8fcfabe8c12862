"""What a codec means for use: do decoded tokens have the neighbours that exact ones have?

Measured views are asked, views of other images answer (`Sample.bank`); an image has one view on each side. The features
are those of DINOv2's k-NN: `cls`, and beside it the mean patch token, each divided by its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from proteus_cache.evaluate.knn import knn_scores, nearest

K: Final = 20
"""Neighbours; DINOv2's usual number."""
FEATURES: Final = {"cls": "cls", "patch": "mean patch"}
"""Target to the feature that is made of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """k-NN with one feature, exact against decoded."""

    feature: str
    k: int
    """Neighbours that voted; all of the bank where it is smaller than `K`."""
    n_queries: int
    n_bank: int
    exact: float | None
    """Share of the queries whose class won the vote, with exact features; None without labels."""
    decoded: float | None
    """The same with decoded features on both sides."""
    shared: float
    """Mean share of a query's exact neighbours that are its decoded neighbours too."""
    same_first: float
    """Share of the queries with the same nearest neighbour."""


class FeatureMeter:
    """Collects one feature of queries and bank, exact and decoded."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, part: str, exact: Tensor, decoded: Tensor) -> None:
        """Take in (B, *shape) tokens of views of `part`, "query" or "bank"."""
        for kind, tokens in (("exact", exact), ("decoded", decoded)):
            feature = tokens if self.target == "cls" else tokens.mean(dim=1)
            self._parts.setdefault(f"{part} {kind}", []).append(normalize(feature.float(), dim=1).cpu())

    def finish(
        self, queries: Sequence[int | None], bank: Sequence[int | None], device: torch.device
    ) -> Neighbours | None:
        """The scores, given the labels in the order of the views; None without a query or a bank."""
        if not queries or not bank:
            return None
        features = {name: torch.cat(parts) for name, parts in self._parts.items()}
        found = {
            kind: nearest(features[f"bank {kind}"], features[f"query {kind}"], k=K, device=device)[1]
            for kind in ("exact", "decoded")
        }
        shared = (found["exact"].unsqueeze(2) == found["decoded"].unsqueeze(1)).any(dim=2).double().mean()
        accuracy = _accuracies(features, queries, bank, device)
        return Neighbours(
            feature=FEATURES[self.target],
            k=min(K, len(bank)),
            n_queries=len(queries),
            n_bank=len(bank),
            exact=accuracy.get("exact"),
            decoded=accuracy.get("decoded"),
            shared=float(shared),
            same_first=float((found["exact"][:, 0] == found["decoded"][:, 0]).double().mean()),
        )


def _accuracies(
    features: Mapping[str, Tensor], queries: Sequence[int | None], bank: Sequence[int | None], device: torch.device
) -> dict[str, float | None]:
    labels = [label for label in (*queries, *bank) if label is not None]
    if len(labels) < len(queries) + len(bank):
        return {}
    asked, known = torch.tensor(labels[: len(queries)]), torch.tensor(labels[len(queries) :])
    return {
        kind: knn_scores(
            features[f"bank {kind}"],
            known,
            features[f"query {kind}"],
            asked,
            n_classes=max(labels) + 1,
            ks=(K,),
            device=device,
        )[0].top1
        for kind in ("exact", "decoded")
    }
