"""Vision: shapes, the context frame and its augmentation, and which statistics are used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from prelar.methods import build_model
from prelar.model.layers import BatchNorm, initialise
from prelar.model.spec import ModelSpec
from prelar.model.vision import (
    ContextDecoder,
    ContextEncoder,
    PlainDecoder,
    PlainEncoder,
    ResNetDecoder,
    ResNetEncoder,
    erase,
    unchanged,
)

FEATURE = 6


def clip(batch: int = 2, time: int = 4) -> Tensor:
    return torch.rand(batch, time, 3, 64, 64) - 0.5


@pytest.mark.parametrize(
    ("encoder", "decoder", "width"),
    [
        (ResNetEncoder, ResNetDecoder, 128),
        (ContextEncoder, ContextDecoder, 128),
        (PlainEncoder, PlainDecoder, 64),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_vision_speaks_one_language(encoder: type, decoder: type, width: int, training: bool) -> None:
    images = clip()
    embed, context = encoder(cnn_depth=2)(images, training)
    assert embed.shape == (2, 4, width)
    decoded = decoder(cnn_depth=2, feature_dim=FEATURE)(torch.randn(2, 4, FEATURE), context, training)
    assert decoded.shape == images.shape
    assert embed.dtype == decoded.dtype == torch.float32


@pytest.mark.parametrize("encoder", [ResNetEncoder, ContextEncoder, PlainEncoder])
def test_a_single_image_embeds_as_in_a_sequence(encoder: type) -> None:
    net = encoder(cnn_depth=2)
    images = clip()
    embed, _ = net(images)
    torch.testing.assert_close(net.embed(images[:, 1]), embed[:, 1])


def test_acting_in_training_mode_leaves_running_statistics_alone() -> None:
    net = ResNetEncoder(cnn_depth=2).train()
    norms = [module for module in net.modules() if isinstance(module, BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    net.embed(clip())
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    net(clip(), True)
    assert not any(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))


def picked_frames(frame: str, training: bool, batch: int = 200) -> list[int]:
    """Which of four frames of known brightness the context encoder looked at."""
    net = ContextEncoder(cnn_depth=2, frame=frame)
    return net._pick(torch.zeros(batch, 4, 1, 1, 1), training).tolist()


def test_context_frame() -> None:
    assert picked_frames("first", True) == picked_frames("first", False) == [0] * 200
    assert picked_frames("last", True) == picked_frames("last", False) == [3] * 200
    torch.manual_seed(0)
    counts = torch.tensor(picked_frames("random", True, 4000)).bincount()
    assert counts.shape == (4,)
    assert (counts - 1000).abs().max() < 120
    assert picked_frames("random", False) == [3] * 200


def test_context_comes_from_the_picked_frame_alone() -> None:
    net = ContextEncoder(cnn_depth=2, frame="first")
    images = clip()
    before = net.context(images)
    assert [tuple(m.shape) for m in before] == [(2, 8, 8, 8), (2, 4, 16, 16)]
    images[:, 1:] += 0.2
    assert all(torch.equal(a, b) for a, b in zip(before, net.context(images), strict=True))
    images[:, 0] += 0.2
    assert not torch.equal(before[0], net.context(images)[0])


def test_decoder_uses_the_context() -> None:
    decoder = ContextDecoder(cnn_depth=2, feature_dim=FEATURE)
    encoder = ContextEncoder(cnn_depth=2)
    initialise(decoder)
    initialise(encoder)
    features, images = torch.randn(2, 4, FEATURE), clip()
    mine, other = encoder.context(images), encoder.context(clip())
    assert not torch.allclose(decoder(features, mine), decoder(features, other))
    swapped = tuple(m.flip(0) for m in mine)
    torch.testing.assert_close(decoder(features, mine).flip(0), decoder(features.flip(0), swapped))


def test_position_embeddings_exist_before_the_first_pass_and_learn() -> None:
    decoder = ContextDecoder(cnn_depth=2, feature_dim=FEATURE)
    initialise(decoder)
    positions = {name: p for name, p in decoder.named_parameters() if "position" in name}
    assert sorted(tuple(p.shape) for p in positions.values()) == [(64, 8)] * 2 + [(256, 4)] * 2
    context = ContextEncoder(cnn_depth=2).context(clip())
    decoder(torch.randn(2, 4, FEATURE), context, True).square().sum().backward()
    for name, parameter in positions.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_augmentation_touches_the_context_in_training_only() -> None:
    images = clip(batch=16, time=1)
    plain = ContextEncoder(cnn_depth=2, frame="first")
    erased = ContextEncoder(cnn_depth=2, frame="first", augment="erase")
    erased.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    changed = (plain.context(images, True)[0] - erased.context(images, True)[0]).abs().flatten(1).sum(1)
    assert (changed > 0).any()
    erased.load_state_dict(plain.state_dict())
    assert torch.equal(plain.context(images)[0], erased.context(images)[0])
    assert torch.equal(plain.embed(images, True), erased.embed(images, True))


def test_erase_greys_one_rectangle_of_about_half_the_images() -> None:
    torch.manual_seed(0)
    images = torch.full((2000, 3, 32, 32), 0.4)
    hole = erase(images) == 0
    assert torch.equal(hole[:, 0], hole[:, 1])
    share = hole[:, 0].float().mean((1, 2))
    hit = share > 0
    assert 0.45 < hit.float().mean() < 0.55
    assert 0.15 < share[hit].mean() < 0.2
    assert share.max() < 0.36
    rows, columns = hole[:, 0].any(2).sum(1), hole[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, hole[:, 0].sum((1, 2)))
    assert (images == 0.4).all()


def test_unchanged_is_the_identity() -> None:
    images = clip()
    assert unchanged(images) is images


@pytest.mark.parametrize(
    ("depth", "least", "widths"),
    [(8, 0, [32, 16, 8, 4]), (8, 16, [32, 16, 16, 16]), (48, 16, [192, 96, 48, 24])],
)
@pytest.mark.parametrize("kind", [ResNetDecoder, ContextDecoder])
def test_the_last_maps_have_channels_to_draw_with(
    kind: type[ResNetDecoder], depth: int, least: int, widths: list[int]
) -> None:
    with torch.device("meta"):
        net = kind(cnn_depth=depth, feature_dim=FEATURE, least_channels=least)
    found = [net.stem.out_features // 16, *(stage[1].norm2.weight.shape[0] for stage in net.stages)]
    assert found == widths and net.out.in_channels == widths[-1]


def test_the_first_pictures_of_a_small_decoder_are_nearly_grey() -> None:
    spec = ModelSpec(
        method="prelar", cnn_depth=8, hidden=16, deter=16, stoch=4, discrete=4, decoder_channels=16
    )
    torch.manual_seed(0)
    grey = build_model(spec)
    torch.manual_seed(0)
    wide = build_model(dataclasses.replace(spec, decoder_channels=0))
    state = torch.randn(2, 3, spec.feature_dim)
    assert grey.decode(state, ()).std() < 0.2 * wide.decode(state, ()).std()
