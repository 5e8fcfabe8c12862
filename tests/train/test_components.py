"""Targets as components: losses and gradients are those of whole tokens, along the directions that a codec kept."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from proteus_cache.codecs import CodecRecord, fit_codec
from proteus_cache.codecs.codec import Basis, Codec
from proteus_cache.losses import Components
from proteus_cache.train.compiling import cxx_compilers
from proteus_cache.train.masking import n_masked_images
from proteus_cache.train.state import make_state
from proteus_cache.train.targets import CodedTarget, ComponentTarget, Target, TargetDecoder
from tests.codecs.fields import smooth_tokens
from tests.train.small_models import (
    BLOCKS,
    N_PATCHES,
    TEACHER_WIDTH,
    check_gradients,
    gradients,
    made_up_batch,
    model_config,
    small_model,
)

ALL, SOME = TEACHER_WIDTH, TEACHER_WIDTH // 3
N_IMAGES = 7


def _basis(n_kept: int, *, n_lead: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Basis:
    """Random orthonormal directions about a mean that is far away."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(TEACHER_WIDTH, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square).Q[:, :n_kept]
    mean = 3 * torch.randn(TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    return Basis(mean.to(dtype), vectors.to(dtype), n_lead)


def _bases(n_kept: int, dtype: torch.dtype = torch.float64) -> dict[str, Basis]:
    """Of all targets but CLS, another one for each."""
    names = ("patch", *BLOCKS)
    return {
        name: _basis(n_kept, n_lead=int(name != "patch"), seed=seed, dtype=dtype) for seed, name in enumerate(names)
    }


def _in_basis(tokens: Tensor, basis: Basis) -> ComponentTarget:
    lead, rest = tokens[:, : basis.n_lead], tokens[:, basis.n_lead :]
    return ComponentTarget(Components(lead, (rest - basis.mean) @ basis.vectors), basis.mean, basis.vectors)


def _in_bases(targets: Mapping[str, Tensor], bases: Mapping[str, Basis]) -> dict[str, Target]:
    return {name: _in_basis(tokens, bases[name]) if name in bases else tokens for name, tokens in targets.items()}


class _Projector(nn.Module):
    """Puts the mean in place of what tokens are along directions that are not kept."""

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.basis = basis

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 2:  # CLS by itself
            return tokens
        basis = self.basis
        rest = basis.mean + (tokens[:, basis.n_lead :] - basis.mean) @ basis.vectors @ basis.vectors.T
        return torch.cat((tokens[:, : basis.n_lead], rest), dim=1)


def _projected(bare: Any, bases: Mapping[str, Basis]) -> Any:  # Distillations; see small_model
    """A copy whose heads are followed by projectors: with whole tokens it must compute what components give."""
    dense = copy.deepcopy(bare)
    of_heads = {name.replace(".", "_"): basis for name, basis in bases.items()} | {"feature": bases["patch"]}
    for name, head in dense.heads.items():
        if name in of_heads:
            head.append(_Projector(of_heads[name]))
    return dense


def _step(bare: Any, views: Tensor, targets: Mapping[str, Target], masks: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of one batch."""
    losses = bare(views, targets, torch.from_numpy(masks), 1, (len(views), n_masked_images(len(views))))
    losses[0].backward()
    return losses.detach(), gradients(bare)


# Against whole tokens.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feature_cls_head", ["token", "feature"])
def test_with_every_component_losses_and_gradients_are_those_of_whole_tokens(
    dtype: torch.dtype, feature_cls_head: str
) -> None:
    bare = small_model(dtype, BLOCKS, weight_block=0.5, feature_cls_head=feature_cls_head)
    views, targets, masks = made_up_batch(N_IMAGES, dtype)

    losses, found = _step(bare, views, _in_bases(targets, _bases(ALL, dtype)), masks)

    expected_losses, expected = _step(bare, views, targets, masks)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(losses, expected_losses, atol=tolerance, rtol=tolerance)
    check_gradients(found, expected, dtype)


@pytest.mark.parametrize("feature_cls_head", ["token", "feature"])
def test_components_that_were_left_out_count_as_exact(feature_cls_head: str) -> None:
    """Against projectors behind the heads and whole tokens: the mean still runs over all channels."""
    bare, bases = small_model(torch.float64, BLOCKS, weight_block=0.5, feature_cls_head=feature_cls_head), _bases(SOME)
    views, targets, masks = made_up_batch(N_IMAGES, torch.float64)
    dense = _projected(bare, bases)
    projected = {name: _Projector(bases[name])(tokens) if name in bases else tokens for name, tokens in targets.items()}

    losses, found = _step(bare, views, _in_bases(targets, bases), masks)

    expected_losses, expected = _step(dense, views, projected, masks)
    torch.testing.assert_close(losses, expected_losses, atol=1e-12, rtol=1e-12)
    check_gradients(found, expected, torch.float64)
    whole, _ = _step(bare, views, targets, masks)
    assert (losses[2:5] < 0.9 * whole[2:5]).all()
    assert losses[1] == whole[1]


@pytest.mark.parametrize("borders", [(4,), (1, 2, 5)])
def test_slices_of_ranks_average_to_the_step_of_the_whole_batch(borders: tuple[int, ...]) -> None:
    """Odd slices, and slices without a masked view."""
    bare, bases = small_model(torch.float64, BLOCKS, weight_block=0.5), _bases(SOME)
    views, targets, masks = made_up_batch(N_IMAGES, torch.float64)
    expected_losses, expected = _step(bare, views, _in_bases(targets, bases), masks)

    edges = (0, *borders, N_IMAGES)
    n_ranks = len(edges) - 1
    counts = (N_IMAGES / n_ranks, n_masked_images(N_IMAGES) / n_ranks)
    losses = torch.zeros(5, dtype=torch.float64)
    for begin, end in itertools.pairwise(edges):
        rows = [row for row, position in enumerate(range(1, N_IMAGES, 2)) if begin <= position < end]
        of_rank = _in_bases({name: tokens[begin:end] for name, tokens in targets.items()}, bases)
        part = bare(views[begin:end], of_rank, torch.from_numpy(masks[rows]), (begin + 1) % 2, counts)
        (part[0] / n_ranks).backward()
        losses += part.detach() / n_ranks

    torch.testing.assert_close(losses, expected_losses, atol=1e-12, rtol=1e-12)
    check_gradients(gradients(bare), expected, torch.float64)


def test_a_head_learns_nothing_along_directions_that_were_left_out() -> None:
    """Exactly nothing where the directions are channels; up to rounding where they are not."""
    bare = small_model(torch.float64)
    views, targets, masks = made_up_batch(N_IMAGES, torch.float64)
    kept = torch.randperm(TEACHER_WIDTH, generator=torch.Generator().manual_seed(0))[:SOME]
    left = torch.ones(TEACHER_WIDTH, dtype=torch.bool).index_fill(0, kept, False)
    channels = Basis(torch.ones(TEACHER_WIDTH), torch.eye(TEACHER_WIDTH, dtype=torch.float64)[:, kept], 0)
    turned, every = _basis(SOME), _basis(ALL)

    _, found = _step(bare, views, _in_bases(targets, {"patch": channels}), masks)
    _, of_turned = _step(bare, views, _in_bases(targets, {"patch": turned}), masks)

    assert torch.equal(turned.vectors, every.vectors[:, :SOME])
    for head, kind in itertools.product(("feature", "patch"), ("weight", "bias")):
        gradient = found[f"heads.{head}.1.{kind}"]
        assert not gradient[left].any()
        assert gradient[~left].reshape(SOME, -1).any(dim=1).all()
        along = every.vectors.T @ of_turned[f"heads.{head}.1.{kind}"]
        assert along[SOME:].abs().max() < 1e-14 < 1e-6 < along[:SOME].abs().max()
    assert found["heads.token.1.weight"][left].any()  # CLS is whole


def test_a_perfect_head_has_no_loss_whatever_it_says_along_the_other_directions() -> None:
    bare, basis = small_model(torch.float64, weight_token=0, weight_patch=0), _basis(SOME)
    views, targets, _ = made_up_batch(N_IMAGES, torch.float64)
    linear = bare.heads["feature"][1]
    linear.weight.data.zero_()
    linear.bias.data = basis.mean + 100 * _basis(ALL).vectors[:, -1]
    said = basis.mean.expand(N_IMAGES, N_PATCHES, -1)

    losses = bare(
        views,
        _in_bases({"cls": targets["cls"], "patch": said}, {"patch": basis}),
        torch.empty(0, 0, dtype=torch.int64),
        1,
        (N_IMAGES, 3),
    )

    cls = bare.heads["token"](bare.student.forward_features(_pixels(bare, views))[:, 0])
    expected = (cls - targets["cls"]).square().mean() / (1 + N_PATCHES)
    torch.testing.assert_close(losses[2], expected)


def _pixels(bare: Any, views: Tensor) -> Tensor:
    pixels: Tensor = (views.permute(0, 3, 1, 2).double() / 255 - bare.pixel_mean) / bare.pixel_std
    return pixels


# How it is computed.


def test_under_autocast_the_directions_are_folded_in_float32() -> None:
    """With a mean of 3,000 in one channel, as raw blocks have: in bfloat16 it would be off by up to 8."""
    bare, every = small_model(torch.float32), _basis(ALL, dtype=torch.float32)
    views, targets, masks = made_up_batch(N_IMAGES, torch.float32)
    offset = 3003.0 * torch.eye(TEACHER_WIDTH)[5]
    basis = Basis(every.mean + offset, every.vectors[:, :SOME], 0)
    seen = _in_bases(targets | {"patch": targets["patch"] + offset}, {"patch": basis})
    for name in ("feature", "patch"):
        bare.heads[name][1].bias.data += offset
    losses, found = _step(bare, views, seen, masks)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = bare(views, seen, torch.from_numpy(masks), 1, (N_IMAGES, n_masked_images(N_IMAGES)))
    rounded[0].backward()

    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded[:4].detach(), losses[:4], rtol=2e-2, atol=0)
    of_rounded = gradients(bare)
    for name in ("heads.feature.1.weight", "heads.patch.1.weight"):
        assert (of_rounded[name] - found[name]).norm() < 0.02 * found[name].norm(), name
        along = every.vectors.T @ of_rounded[name]
        assert along[SOME:].norm() < 1e-5 * along[:SOME].norm(), name


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, cxx_compilers())), reason="torch.compile needs a C++ compiler: none here")
def test_a_compiled_step_on_components_computes_what_a_plain_one_does() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bases = _bases(SOME, torch.float32)
    losses: dict[bool, list[list[float]]] = {}

    for is_compiled in (False, True):
        config = model_config(compile=is_compiled, weight_block=0.5)
        state = make_state(small_model(torch.float32, BLOCKS, weight_block=0.5), config, Accelerator(cpu=True))
        losses[is_compiled] = []
        for step in range(3):
            views, targets, masks = made_up_batch(4, torch.float32, step)
            loss = state.model(views, _in_bases(targets, bases), torch.from_numpy(masks), 1, (4.0, 2.0), None)
            loss[0].backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            losses[is_compiled].append(loss.tolist())

    assert losses[True] == [pytest.approx(one, rel=1e-5) for one in losses[False]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# Where the components come from, and what is left of a head.


class _ExactCodec(Codec):
    """Lead tokens and components as float32: what a codec with a basis is, without an error of its own."""

    mean: Tensor
    vectors: Tensor

    def __init__(self, shape: tuple[int, int], basis: Basis) -> None:
        super().__init__()
        self.name, self.shape = "exact", shape
        self._n_lead, n_kept = basis.n_lead, basis.vectors.shape[1]
        self.code_bytes = 4 * (basis.n_lead * shape[1] + (shape[0] - basis.n_lead) * n_kept)
        self.register_buffer("mean", basis.mean)
        self.register_buffer("vectors", basis.vectors)

    @property
    def basis(self) -> Basis:
        return Basis(self.mean, self.vectors, self._n_lead)

    def encode(self, tokens: Tensor) -> Tensor:
        rest = (tokens[:, self._n_lead :] - self.mean) @ self.vectors
        values = torch.cat((tokens[:, : self._n_lead].flatten(1), rest.flatten(1)), dim=1)
        return values.contiguous().view(torch.uint8)

    def components(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        values = codes.contiguous().view(torch.float32)
        n_lead_values = self._n_lead * self.shape[1]
        lead = values[:, :n_lead_values].reshape(len(codes), self._n_lead, self.shape[1])
        return lead, values[:, n_lead_values:].reshape(len(codes), self.shape[0] - self._n_lead, -1)

    def decode(self, codes: Tensor) -> Tensor:
        raise AssertionError("training computes no way back from components")

    def parameters_blob(self) -> bytes | None:
        return None

    def record(self) -> CodecRecord:
        raise AssertionError("nothing stores it")


def test_a_codec_with_a_basis_is_never_decoded_to_whole_tokens() -> None:
    _, targets, _ = made_up_batch(3, torch.float32)
    bases = _bases(SOME, torch.float32)
    codecs: dict[str, Codec] = {"cls": fit_codec("float16", targets["cls"])}
    codecs |= {name: _ExactCodec((N_PATCHES + basis.n_lead, TEACHER_WIDTH), basis) for name, basis in bases.items()}
    codes = [codecs[name].encode(targets[name]) for name in codecs]
    offsets = itertools.accumulate((codec.code_bytes for codec in codecs.values()), initial=0)
    coded = tuple(CodedTarget(name, offset, codecs[name]) for name, offset in zip(codecs, offsets, strict=False))

    found = TargetDecoder(coded)(torch.cat(codes, dim=1))

    assert torch.equal(found["cls"], targets["cls"].half().float())
    for name, basis in bases.items():
        expected = _in_basis(targets[name], basis)
        assert torch.equal(found[name].tokens.lead_BLD, targets[name][:, : basis.n_lead])
        torch.testing.assert_close(found[name].tokens, expected.tokens)
        assert torch.equal(found[name].vectors_DK, basis.vectors)


@pytest.mark.parametrize("name", ["klt:20dB", "int4"])
def test_targets_are_float32_under_autocast(name: str) -> None:
    codec = fit_codec(name, smooth_tokens(0, 64))
    assert getattr(codec, "has_dct", True)
    codes = codec.encode(smooth_tokens(1, 4))
    decoder = TargetDecoder((CodedTarget("patch", 0, codec),))
    expected = _values(decoder(codes)["patch"])

    with torch.autocast("cpu", torch.bfloat16):
        found = _values(decoder(codes)["patch"])

    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def _values(target: Target) -> Tensor:
    return target if isinstance(target, Tensor) else target.tokens.rest_BNK


@pytest.mark.parametrize("feature_cls_head", ["token", "feature"])
def test_heads_are_handed_out_with_the_mean_along_directions_that_they_did_not_learn(feature_cls_head: str) -> None:
    """Unless CLS, which is whole, passes through them, too."""
    bare = small_model(torch.float64, BLOCKS, weight_block=0.5, feature_cls_head=feature_cls_head)
    basis = _basis(SOME)
    tokens = torch.randn(2, 3, bare.student.embed_dim, dtype=torch.float64)
    before = {name: head(tokens) for name, head in bare.heads.items()}
    as_trained = bare.head_tensors()

    handed_out = bare.head_tensors({"patch": basis})

    assert handed_out.keys() == as_trained.keys()
    bare.heads.load_state_dict({name: tensor for name, tensor in handed_out.items() if name != "mask_token"})
    changed = {"patch"} if feature_cls_head == "feature" else {"feature", "patch"}
    for name, head in bare.heads.items():
        expected = _Projector(basis)(before[name]) if name in changed else before[name]
        torch.testing.assert_close(head(tokens), expected, atol=1e-12, rtol=0)
    assert not torch.allclose(before["patch"], bare.heads["patch"](tokens))
