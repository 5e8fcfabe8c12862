"""`Pack.batches`: what a loop of one's own gets is what our trainer and the pack's samples say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proteus_cache.errors import UsageError
from proteus_cache.pack.batches import DecodedBatch
from proteus_cache.pack.loader import open_loader
from proteus_cache.pack.reader import Pack


def test_batches_are_the_decoded_samples_of_the_training_order(whole_pack: Pack) -> None:
    order = whole_pack.training_order(seed=5, batch_size=4)
    mean, std = np.array(whole_pack.teacher.mean), np.array(whole_pack.teacher.std)

    batches = list(whole_pack.batches(batch_size=4, n_steps=6, seed=5, workers=0))

    assert [batch.step for batch in batches] == list(range(6))
    for batch in batches:
        plan = order.batch(batch.step)
        assert plan.view_indices is not None
        assert batch.epoch == plan.epoch
        for place, (view, record) in enumerate(zip(plan.view_indices.tolist(), plan.records.tolist(), strict=True)):
            sample = whole_pack.sample(f"v{view:03d}", record)
            pixels = ((sample.view / 255 - mean) / std).transpose(2, 0, 1)
            np.testing.assert_allclose(batch.pixels[place], pixels, rtol=0, atol=1e-5)
            assert list(batch.targets) == list(sample.targets)
            for name, tokens in sample.targets.items():
                assert np.array_equal(batch.targets[name][place], tokens)


def test_batches_go_on_where_a_loop_ended_and_are_shared_by_ranks(whole_pack: Pack) -> None:
    whole = list(whole_pack.batches(batch_size=4, n_steps=6, workers=0))
    rest = list(whole_pack.batches(batch_size=4, n_steps=6, first_step=4, workers=1))
    second = list(whole_pack.batches(batch_size=4, n_steps=6, rank=1, world_size=2, workers=0))

    assert [_content(batch) for batch in rest] == [_content(batch) for batch in whole[4:]]
    assert [batch.pixels.shape[0] for batch in second] == [2] * 6
    assert all(torch.equal(part.pixels, batch.pixels[2:]) for part, batch in zip(second, whole, strict=True))


def _content(batch: DecodedBatch) -> tuple[int, bytes, dict[str, bytes]]:
    targets = {name: tokens.numpy().tobytes() for name, tokens in batch.targets.items()}
    return batch.step, batch.pixels.numpy().tobytes(), targets


def test_no_gradient_reaches_the_pack(whole_pack: Pack) -> None:
    batch = next(whole_pack.batches(batch_size=4, n_steps=1, workers=0))

    assert not any(tensor.requires_grad for tensor in (batch.pixels, *batch.targets.values()))


def test_a_loop_that_ends_early_ends_its_readers(whole_pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def remember(*args: object, **kwargs: object) -> object:
        opened.append(open_loader(*args, **kwargs))  # type: ignore[arg-type]  # passed on as they are
        return opened[-1]

    monkeypatch.setattr("proteus_cache.pack.batches.open_loader", remember)

    for _ in whole_pack.batches(batch_size=4, n_steps=100, workers=1):
        break

    assert next(opened[0], None) is None


def test_a_batch_larger_than_the_pack_is_refused_before_anything_is_read(whole_pack: Pack) -> None:
    with pytest.raises(UsageError, match="a batch of 400 is larger"):
        whole_pack.batches(batch_size=400, n_steps=1)


@pytest.mark.gpu
def test_batches_are_decoded_on_the_device_that_is_asked_for(whole_pack: Pack) -> None:
    here = list(whole_pack.batches(batch_size=4, n_steps=3, workers=0))
    there = list(whole_pack.batches(batch_size=4, n_steps=3, workers=0, device="cuda"))

    for batch, other in zip(here, there, strict=True):
        assert other.pixels.device.type == "cuda"
        torch.testing.assert_close(other.pixels.cpu(), batch.pixels, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(other.targets[name].cpu(), batch.targets[name]) for name in batch.targets)
    assert whole_pack[0].targets["cls"].shape == batch.targets["cls"].shape[1:]


def test_decoding_follows_the_device_of_what_it_is_given(whole_pack: Pack) -> None:
    codes = torch.zeros(2, whole_pack.code_bytes, dtype=torch.uint8)
    views = torch.zeros(2, whole_pack.side_px, whole_pack.side_px, 3, dtype=torch.uint8)

    there = [*whole_pack.decode(codes.to("meta")).values(), whole_pack.normalise(views.to("meta"))]
    here = [*whole_pack.decode(codes).values(), whole_pack.normalise(views)]

    assert {tensor.device.type for tensor in there} == {"meta"}
    assert [tensor.shape for tensor in there] == [tensor.shape for tensor in here]
    assert {tensor.device.type for tensor in here} == {"cpu"}
