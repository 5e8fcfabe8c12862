"""The 52 linear classifiers of a linear probe, trained at once: one matrix product for each kind of input.

A head is one kind of input ({1, 4} last blocks, with or without the mean patch token) and one of 13 base rates. Heads
share no weight and losses are summed, so each learns as if it were alone: SGD with momentum on its own cross-entropy.
The gradient is written out (softmax minus one-hot), so no graph is kept and a step needs no memory beyond its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from proteus_cache.evaluate.features import LAST_BLOCKS

BASE_LRS: Final = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's base rates; a head's rate is its base rate times batch / 256."""
KINDS: Final = tuple((n_last_blocks, avgpool) for n_last_blocks in (1, LAST_BLOCKS) for avgpool in (False, True))
"""Kinds of input: how many last blocks, and whether the mean patch token of the last one is added."""
N_HEADS: Final = len(KINDS) * len(BASE_LRS)

_MOMENTUM = 0.9
_INITIAL_STD = 0.01
_LR_BATCH = 256
_TOP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The settings of one head."""

    n_last_blocks: int
    """Whose CLS tokens it reads: 1 or 4. A model with fewer blocks gives all it has."""
    avgpool: bool
    """It reads the mean patch token of the last block too."""
    base_lr: float

    def __str__(self) -> str:
        blocks = f"{self.n_last_blocks} block{'s' if self.n_last_blocks > 1 else ''}"
        return f"{blocks}{' + mean patch' if self.avgpool else ''}, lr {self.base_lr:g}"


HEADS: Final = tuple(Head(n_last_blocks=n, avgpool=avgpool, base_lr=lr) for n, avgpool in KINDS for lr in BASE_LRS)
"""All 52, in the order in which `HeadGrid` numbers them."""


def cosine(step: int, n_steps: int) -> float:
    """The share of its rate that a head learns with at `step`, counted from 0: 1 at first, falling to 0."""
    return (1 + math.cos(math.pi * step / n_steps)) / 2


@dataclass(frozen=True, slots=True)
class _Group:
    """The heads of one kind of input; L heads, C classes."""

    columns: slice
    """Of a feature row: what they read, D' wide."""
    weight: Tensor
    """(L * C, D')."""
    bias: Tensor
    """(L * C,)."""
    weight_momentum: Tensor
    bias_momentum: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(B, D') -> (B, L, C)."""
        flat = torch.addmm(self.bias, features, self.weight.T)
        return flat.reshape(len(features), len(BASE_LRS), -1)

    def step(self, features: Tensor, labels: Tensor, lr: Tensor, share: float) -> None:
        """One step of SGD of every head on its own mean cross-entropy; `lr` is (L * C,)."""
        n_rows = len(labels)
        gradient = self.logits(features).softmax(dim=2)
        gradient[torch.arange(n_rows, device=labels.device), :, labels] -= 1
        flat = gradient.reshape(n_rows, -1).div_(n_rows)
        self.weight_momentum.mul_(_MOMENTUM).addmm_(flat.T, features)
        self.bias_momentum.mul_(_MOMENTUM).add_(flat.sum(dim=0))
        self.weight.addcmul_(self.weight_momentum, lr.unsqueeze(1), value=-share)
        self.bias.addcmul_(self.bias_momentum, lr, value=-share)


class HeadGrid:
    """The 52 heads of one model, in the order of `HEADS`.

    Source: DINOv2 eval/linear.py. Weights start as N(0, 0.01), biases at 0; SGD with momentum 0.9, no weight decay.
    """

    def __init__(
        self, width: int, n_blocks: int, n_classes: int, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        """
        Args:
            width: D of the model.
            n_blocks: last blocks in a feature row, which is (n_blocks + 1) * D wide: `last_block_features`.
            n_classes: classes that labels can name.
            batch_size: images in a step, which scales the rates.
            seed: of the initial weights, which are drawn on the CPU.
            device: where the heads are.
        """
        generator = torch.Generator().manual_seed(seed)
        n_heads = len(BASE_LRS)
        self._groups = []
        for n_last_blocks, avgpool in KINDS:
            columns = slice((n_blocks - min(n_last_blocks, n_blocks)) * width, (n_blocks + avgpool) * width)
            shape = (n_heads * n_classes, columns.stop - columns.start)
            weight = torch.empty(shape).normal_(0, _INITIAL_STD, generator=generator).to(device)
            bias = torch.zeros(shape[0], device=device)
            self._groups.append(_Group(columns, weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))
        lr = torch.tensor(BASE_LRS, device=device) * (batch_size / _LR_BATCH)
        self._lr = lr.repeat_interleave(n_classes)

    def step(self, features: Tensor, labels: Tensor, share: float) -> None:
        """One step of every head.

        Args:
            features: (B, (n_blocks + 1) D) float32 on the heads' device, B at least 1.
            labels: (B,) int64, there too.
            share: of the rates, 0 to 1: `cosine`.
        """
        for group in self._groups:
            group.step(features[:, group.columns], labels, self._lr, share)

    def logits(self, features: Tensor) -> Tensor:
        """What every head says: (B, (n_blocks + 1) D) -> (B, 52, C)."""
        return torch.cat([group.logits(features[:, group.columns]) for group in self._groups], dim=1)


class Tally:
    """How often each head was right; nothing is kept of an image but counts."""

    def __init__(self) -> None:
        self.n = 0
        """Images counted."""
        self._top1 = torch.zeros(N_HEADS, dtype=torch.int64)
        self._top5 = torch.zeros(N_HEADS, dtype=torch.int64)
        self._loss = torch.zeros(N_HEADS, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: (B, 52, C) logits and (B,) int64 labels, on one device.

        Of classes with equal logits the one with the lower number wins; a logit that is not finite is never right.
        """
        index = labels.reshape(-1, 1, 1)
        own = logits.gather(2, index.expand(-1, logits.shape[1], 1))
        is_lower = torch.arange(logits.shape[2], device=logits.device) < index
        ahead = (~(logits <= own) | ((logits == own) & is_lower)).sum(dim=2)
        ahead = torch.where(own.squeeze(2).isfinite(), ahead, logits.shape[2] + _TOP)
        self.n += len(labels)
        self._top1 += (ahead < 1).sum(dim=0).cpu()
        self._top5 += (ahead < _TOP).sum(dim=0).cpu()
        losses = cross_entropy(logits.transpose(1, 2), labels.unsqueeze(1).expand(logits.shape[:2]), reduction="none")
        self._loss += losses.double().sum(dim=0).cpu()

    def top1(self, head: int) -> float | None:
        """Share of the images that head number `head` was right about; None without images."""
        return int(self._top1[head]) / self.n if self.n else None

    def top5(self, head: int) -> float | None:
        """Share of the images whose class was among the head's first five; None without images."""
        return int(self._top5[head]) / self.n if self.n else None

    def best(self) -> int:
        """Number of the head that was right most often; of equal ones that with the lowest mean cross-entropy."""
        return min(range(N_HEADS), key=lambda head: (-int(self._top1[head]), float(self._loss[head])))
