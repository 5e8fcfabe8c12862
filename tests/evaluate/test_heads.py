"""The 52 heads: equal to 52 plain layers with torch's own SGD and schedule; what each reads; counting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from proteus_cache.evaluate.heads import BASE_LRS, HEADS, Head, HeadGrid, Tally, cosine

WIDTH, N_CLASSES, BATCH = 6, 5, 32
CPU = torch.device("cpu")


def _grid(n_blocks: int = 4, batch_size: int = BATCH, seed: int = 3) -> HeadGrid:
    return HeadGrid(WIDTH, n_blocks, N_CLASSES, batch_size=batch_size, seed=seed, device=CPU)


def _weights(grid: HeadGrid, n_blocks: int = 4) -> tuple[Tensor, Tensor]:
    """Weights (52, C, 5 D) over a whole feature row, zero where a head does not read, and biases (52, C)."""
    n_columns = (n_blocks + 1) * WIDTH
    bias = grid.logits(torch.zeros(1, n_columns))[0]
    return (grid.logits(torch.eye(n_columns)) - bias).permute(1, 2, 0), bias


def _columns(head: Head, n_blocks: int = 4) -> list[int]:
    """What a head reads of a row of n_blocks CLS tokens, the last block's last, and the mean patch token."""
    n = min(head.n_last_blocks, n_blocks)
    cls = [WIDTH * block + column for block in range(n_blocks - n, n_blocks) for column in range(WIDTH)]
    return cls + ([WIDTH * n_blocks + column for column in range(WIDTH)] if head.avgpool else [])


def test_there_are_52_of_the_published_settings() -> None:
    published = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]

    assert len(HEADS) == len(set(HEADS)) == 52
    assert [head.base_lr for head in HEADS if (head.n_last_blocks, head.avgpool) == (4, True)] == published
    assert str(HEADS[0]) == "1 block, lr 1e-05"
    assert str(HEADS[-1]) == "4 blocks + mean patch, lr 0.1"


@pytest.mark.parametrize("n_blocks", [4, 2, 1])
def test_a_head_reads_the_last_blocks_and_the_mean_patch_and_nothing_else(n_blocks: int) -> None:
    weights, _ = _weights(_grid(n_blocks), n_blocks)

    for head, weight in zip(HEADS, weights, strict=True):
        read = weight.abs().amax(dim=0).nonzero().flatten().tolist()
        assert read == _columns(head, n_blocks)


def test_weights_start_small_and_normal_and_biases_at_zero() -> None:
    grid = HeadGrid(64, 4, 20, batch_size=BATCH, seed=3, device=CPU)

    bias = grid.logits(torch.zeros(1, 5 * 64))[0]
    values = (grid.logits(torch.eye(5 * 64)) - bias).flatten()
    values = values[values != 0]

    assert not bias.any()
    # 12 widths of 64, 13 rates, 20 classes: the standard error of both is below 3e-5.
    assert len(values) == 12 * 64 * 13 * 20
    assert abs(float(values.mean())) < 1e-4
    assert float(values.std()) == pytest.approx(0.01, abs=1e-4)


def test_a_seed_fixes_the_start() -> None:
    rows = torch.eye(5 * WIDTH)

    assert torch.equal(_grid(seed=3).logits(rows), _grid(seed=3).logits(rows))
    assert not torch.equal(_grid(seed=3).logits(rows), _grid(seed=4).logits(rows))


@pytest.mark.parametrize("batch_size", [BATCH, 512])
def test_training_at_once_equals_52_plain_layers_with_torchs_optimizer(batch_size: int) -> None:
    """Rates scale with the stated batch; at 512 they are the published ones, up to 0.2."""
    n_steps, generator = 40, torch.Generator().manual_seed(1)
    features = torch.randn(n_steps, BATCH, 5 * WIDTH, generator=generator)
    labels = torch.randint(0, N_CLASSES, (n_steps, BATCH), generator=generator)
    fresh = torch.randn(64, 5 * WIDTH, generator=generator)
    grid = _grid(batch_size=batch_size)
    layers = _plain_layers(grid)
    optimizer = torch.optim.SGD(
        [
            {"params": layer.parameters(), "lr": head.base_lr * batch_size / 256}
            for layer, head in zip(layers, HEADS, strict=True)
        ],
        momentum=0.9,
        weight_decay=0,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps, eta_min=0)

    for step in range(n_steps):
        loss = torch.stack(
            [
                cross_entropy(layer(features[step][:, _columns(head)]), labels[step])
                for layer, head in zip(layers, HEADS, strict=True)
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        grid.step(features[step], labels[step], cosine(step, n_steps))

    said = grid.logits(fresh)
    with torch.no_grad():
        plain = torch.stack([layer(fresh[:, _columns(head)]) for layer, head in zip(layers, HEADS, strict=True)], dim=1)
    torch.testing.assert_close(said, plain, atol=1e-5, rtol=0)
    assert float((plain[:, 12] - plain[:, 0]).abs().max()) > 0.1  # the rates made a difference


def _plain_layers(grid: HeadGrid) -> nn.ModuleList:
    """One layer for each head, with the grid's start weights."""
    weights, biases = _weights(grid)
    layers = nn.ModuleList()
    for head, weight, bias in zip(HEADS, weights, biases, strict=True):
        layer = nn.Linear(len(_columns(head)), N_CLASSES)
        with torch.no_grad():
            layer.weight.copy_(weight[:, _columns(head)])
            layer.bias.copy_(bias)
        layers.append(layer)
    return layers


@pytest.mark.gpu
def test_a_gpu_trains_the_same_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, BATCH, 5 * WIDTH, generator=generator)
    labels = torch.randint(0, N_CLASSES, (20, BATCH), generator=generator)
    said = []
    for device in (CPU, torch.device("cuda")):
        grid = HeadGrid(WIDTH, 4, N_CLASSES, batch_size=BATCH, seed=3, device=device)
        for step in range(20):
            grid.step(features[step].to(device), labels[step].to(device), cosine(step, 20))
        said.append(grid.logits(features[0].to(device)).cpu())

    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=0)


def test_the_rate_falls_from_all_to_nearly_nothing_without_warm_up() -> None:
    shares = [cosine(step, 100) for step in range(100)]

    assert shares[0] == 1
    assert shares[50] == pytest.approx(0.5)
    assert 0 < shares[-1] < 0.001
    assert shares == sorted(shares, reverse=True)


def _logits(rows: list[list[float]]) -> Tensor:
    """The same (B, C) logits for every head."""
    return torch.tensor(rows).unsqueeze(1).repeat(1, len(HEADS), 1)


def test_hits_are_counted_as_by_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, len(HEADS), 9, generator=generator)
    labels = torch.randint(0, 9, (50,), generator=generator)
    tally = Tally()

    tally.add(logits[:20], labels[:20])
    tally.add(logits[20:], labels[20:])

    order = logits.argsort(dim=2, descending=True)
    for head in range(len(HEADS)):
        hits = order[:, head] == labels.unsqueeze(1)
        assert tally.top1(head) == pytest.approx(float(hits[:, :1].any(dim=1).double().mean()))
        assert tally.top5(head) == pytest.approx(float(hits[:, :5].any(dim=1).double().mean()))


def test_of_equal_logits_the_lower_class_wins_and_nan_is_never_right() -> None:
    logits = _logits([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [math.nan, 0.0, 0.0], [0.0, math.nan, 0.0]])
    tally = Tally()

    tally.add(logits, torch.tensor([0, 1, 0, 0]))

    assert tally.top1(0) == 0.25


def test_without_images_there_is_no_share() -> None:
    tally = Tally()

    assert (tally.n, tally.top1(0), tally.top5(0)) == (0, None, None)


def test_the_best_head_is_right_most_often_and_of_equal_ones_has_the_lowest_loss() -> None:
    tally, labels = Tally(), torch.tensor([0, 1])
    logits = torch.zeros(2, len(HEADS), 2)
    logits[:, 7] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits[:, 9] = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    logits[:, 11] = torch.tensor([[9.0, 0.0], [9.0, 0.0]])

    tally.add(logits, labels)

    assert tally.best() == 9


def test_rates_are_in_order() -> None:
    assert list(BASE_LRS) == sorted(BASE_LRS)
