"""Where actions come from: the video, the robot, or nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from prelar.methods import build_model
from prelar.model.actions import (
    KINDS,
    ActionMLP,
    Deterministic,
    Discrete,
    Gaussian,
    NoAction,
    RawAction,
    VideoAction,
    _another,
    window_frames,
)
from prelar.model.layers import initialise
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.utils.errors import UserError


def video_action(**changes: Any) -> VideoAction:
    settings = {
        "cnn_depth": 2,
        "hidden": 8,
        "action_dim": 8,
        "kind": "gaussian",
        "window": 2,
        "consistency": "order",
    }
    part = VideoAction(**(settings | changes))
    initialise(part)
    return part


def video(batch: int = 3, time: int = 5) -> tuple[Tensor, Tensor]:
    is_first = torch.zeros(batch, time)
    is_first[:, 0] = 1
    return torch.rand(batch, time, 3, 64, 64) - 0.5, is_first


def tiny(**changes: Any) -> WorldModel:
    sizes = {"cnn_depth": 2, "hidden": 8, "deter": 8, "stoch": 4, "discrete": 4, "action_dim": 8}
    return build_model(ModelSpec(**({"method": "prelar"} | sizes | changes)))


def test_gaussian_statistics_by_hand() -> None:
    stats = Gaussian(1).stats(torch.tensor([[3.0, 0.0], [1.0, 2.0]]))
    torch.testing.assert_close(stats["mean"], torch.tensor([[3.0], [1.0]]))
    torch.testing.assert_close(stats["std"], 2 * torch.sigmoid(torch.tensor([[0.0], [1.0]])))


def test_gaussian_sample_is_reparameterised() -> None:
    torch.manual_seed(0)
    kind = Gaussian(2)
    raw = torch.randn(4000, 4, requires_grad=True)
    stats = kind.stats(raw[:1].expand(4000, 4))
    drawn = kind.action(stats, sample=True)
    torch.testing.assert_close(drawn.mean(0), stats["mean"][0], atol=0.08, rtol=0)
    torch.testing.assert_close(drawn.std(0), stats["std"][0], atol=0.08, rtol=0)
    drawn.square().sum().backward()
    assert raw.grad is not None
    assert (raw.grad[0].abs() > 0).all()
    assert torch.equal(kind.action(stats, sample=False), stats["mean"])


def test_gaussian_divergence_stays_finite_at_extremes() -> None:
    kind = Gaussian(1)
    raw = torch.tensor([[0.0, -1e4], [0.0, 1e4]], requires_grad=True)
    stats = kind.stats(raw)
    divergence = kind.kl(stats) + kind.distance(stats, {key: value.flip(0) for key, value in stats.items()})
    assert divergence.isfinite().all()
    divergence.sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_deterministic_action_is_the_point_itself_without_kl() -> None:
    kind = Deterministic(3)
    raw = torch.randn(5, 3)
    stats = kind.stats(raw)
    assert torch.equal(kind.action(stats, sample=True), raw)
    assert torch.equal(kind.kl(stats), torch.zeros(5))
    shifted = {"mean": raw + torch.tensor([1.0, 2.0, 0.0])}
    torch.testing.assert_close(kind.distance(stats, shifted), torch.full((5,), 2.5))


def test_discrete_action_is_one_hot_per_group_and_its_kl_has_a_gradient() -> None:
    kind = Discrete(16)
    raw = torch.randn(5, 16, requires_grad=True)
    stats = kind.stats(raw)
    drawn = kind.action(stats, sample=True)
    assert drawn.shape == (5, 16)
    assert torch.equal(drawn.view(5, 2, 8).sum(-1), torch.ones(5, 2))
    kind.kl(stats).sum().backward()
    assert raw.grad is not None
    assert raw.grad.abs().sum() > 0
    uniform = kind.stats(torch.zeros(1, 16))
    assert kind.kl(uniform).abs().max() < 1e-6
    certain = kind.stats(torch.tensor([[100.0] + 7 * [0.0] + [100.0] + 7 * [0.0]]))
    assert kind.kl(certain).item() == pytest.approx(2 * torch.tensor(8.0).log().item(), rel=1e-5)
    (kind.action(kind.stats(raw), sample=True) * torch.randn(16)).sum().backward()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_distance_of_a_posterior_to_itself_is_zero(kind: str) -> None:
    family = KINDS[kind](8)
    stats = family.stats(torch.randn(4, family.outputs))
    assert family.distance(stats, stats).abs().max() < 1e-6


def test_discrete_needs_whole_groups() -> None:
    with pytest.raises(UserError, match=r"action_dim = 10: .*multiple of 8"):
        tiny(action_kind="discrete", action_dim=10)


def test_raw_action_is_padded_with_zeros() -> None:
    part = RawAction(robot_action_dim=2, slot=5)
    images, is_first = video(1, 2)
    action = torch.ones(1, 2, 2)
    found = part(images, action, is_first, True, True)
    assert torch.equal(found.action, torch.tensor([[[1.0, 1, 0, 0, 0]] * 2]))
    assert found.stats == {}
    with pytest.raises(UserError, match="robot_action_dim = 6"):
        RawAction(robot_action_dim=6, slot=5)


def test_no_action_is_zeros_whatever_is_asked() -> None:
    part = NoAction(slot=5)
    images, is_first = video(2, 3)
    assert torch.equal(part(images, None, is_first, True, True).action, torch.zeros(2, 3, 5))
    assert torch.equal(part.step(torch.ones(2, 9)), torch.zeros(2, 5))
    assert part.infer(images, is_first) is None


def test_action_mlp_is_linear_elu_linear() -> None:
    part = ActionMLP(robot_action_dim=4, hidden=6, action_dim=3)
    action = torch.randn(2, 3, 4)
    expected = part.out(torch.nn.functional.elu(part.hidden(action)))
    torch.testing.assert_close(
        part(torch.zeros(2, 3, 3, 64, 64), action, torch.zeros(2, 3), True, True).action, expected
    )
    torch.testing.assert_close(part.step(action[:, 0]), expected[:, 0])


def test_video_action_is_fed_one_step_later() -> None:
    part = video_action()
    images, is_first = video()
    found = part(images, None, is_first, False, False)
    assert found.action.shape == (3, 5, 8)
    assert torch.equal(found.action[:, 0], torch.zeros(3, 8))
    assert torch.equal(found.action[:, 1:], found.stats["mean"])
    assert torch.equal(part.infer(images, is_first), found.stats["mean"])
    assert torch.equal(part.step(found.action[:, 1]), found.action[:, 1])


@pytest.mark.parametrize("window", [2, 3, 4])
def test_video_action_sees_its_window_only(window: int) -> None:
    part = video_action(window=window)
    images, is_first = video(1, 6)
    before = part.infer(images, is_first)
    images[0, 2] += 0.3
    changed = (part.infer(images, is_first) != before).any(-1)[0].tolist()
    assert changed == [pair + 1 >= 2 and pair - window + 2 <= 2 for pair in range(5)]


def test_window_of_a_new_clip_sees_no_frame_of_the_old_one() -> None:
    part = video_action(window=4)
    images, is_first = video(1, 6)
    is_first[0, 3] = 1
    before = part.infer(images, is_first)
    images[0, :3] += 0.3
    changed = (part.infer(images, is_first) != before).any(-1)[0].tolist()
    assert changed == [True, True, True, False, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=9), st.integers(2, 5))
def test_window_frames_equal_the_definition(starts: list[bool], window: int) -> None:
    expected = []
    for pair in range(len(starts) - 1):
        clip = max([0, *[step for step in range(pair + 1) if starts[step]]])
        expected.append([max(clip, pair - window + 2 + i) for i in range(window - 1)] + [pair + 1])
    assert window_frames(torch.tensor([starts]), window).tolist() == [expected]


def test_oldest_frame_comes_first() -> None:
    assert window_frames(torch.zeros(1, 4), 3).tolist() == [[[0, 0, 1], [0, 1, 2], [1, 2, 3]]]


def test_another_sequence_is_never_the_same() -> None:
    for batch in (2, 3, 8):
        other = _another(batch, torch.device("cpu"))
        assert sorted(other.tolist()) == list(range(batch))
        assert all(int(number) != place for place, number in enumerate(other))
    assert _another(1, torch.device("cpu")).tolist() == [0]


def test_pairs_across_a_clip_start_do_not_count() -> None:
    """Only frame 3 differs in what it shows, and it begins a clip: its pair moves no loss of the action."""
    model = tiny().eval()
    images, is_first = video(2, 5)
    is_first[1, 3] = 1
    seen = model.observe(images, is_first)
    found = model.action(images, None, is_first, False, False)
    torch.manual_seed(0)
    before = model.action.losses(found, seen.post, seen.prior, model.dynamics, is_first)
    stats = {key: value.clone() for key, value in found.stats.items()}
    stats["mean"][1, 2] += 3
    torch.manual_seed(0)
    after = model.action.losses(
        type(found)(found.action, stats), seen.post, seen.prior, model.dynamics, is_first
    )
    assert torch.equal(before["action_kl"], after["action_kl"])
    assert torch.equal(before["consistency"], after["consistency"])


def consistency_gradient(model: WorldModel) -> float:
    """The norm of what the consistency loss alone sends to the action encoder."""
    images, is_first = video(4, 5)
    losses, _ = model.pretrain_losses(images, is_first)
    grads = torch.autograd.grad(losses["consistency"], list(model.action.parameters()), allow_unused=True)
    return sum(float(grad.square().sum()) for grad in grads if grad is not None) ** 0.5


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_order_reaches_the_action_encoder(kind: str) -> None:
    torch.manual_seed(0)
    assert consistency_gradient(tiny(action_kind=kind)) > 1e-4


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sign_reaches_nothing(kind: str) -> None:
    torch.manual_seed(0)
    assert consistency_gradient(tiny(action_kind=kind, consistency="sign")) == 0


def test_consistency_moves_the_action_encoder_only() -> None:
    """d_state carries no gradient, so neither the dynamics nor the image encoder bend to fit the actions."""
    torch.manual_seed(0)
    model = tiny()
    losses, _ = model.pretrain_losses(*video(4, 5))
    losses["consistency"].backward()
    for part in (model.encoder, model.dynamics, model.decoder):
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in part.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.action.parameters())


def test_an_encoder_learns_the_order_of_known_state_distances() -> None:
    """Brightness steps of known size set d_state by hand; the video action encoder learns to agree."""
    torch.manual_seed(0)
    part = video_action()
    batch = 24
    step = torch.linspace(0, 1, batch)
    images = torch.zeros(batch, 2, 3, 64, 64)
    images[:, 1] = step[:, None, None, None] - 0.5
    is_first = torch.tensor([[1.0, 0.0]]).expand(batch, 2)
    other = torch.randperm(batch)
    state = (step - step[other]).abs()

    def distances() -> Tensor:
        stats = part.posterior(images, is_first)
        swapped = {key: value[other] for key, value in stats.items()}
        return part.kind.distance(stats, swapped)[:, 0]

    valid = torch.ones(batch)
    optimiser = torch.optim.Adam(part.parameters(), lr=3e-3)
    with torch.no_grad():
        before, rank_before = part.consistency(state, distances(), valid), spearmanr(state, distances())[0]
    for _ in range(40):
        optimiser.zero_grad()
        part.consistency(state, distances(), valid).backward()
        optimiser.step()
    with torch.no_grad():
        after, rank_after = part.consistency(state, distances(), valid), spearmanr(state, distances())[0]
    assert after < before
    assert rank_after > rank_before
    assert rank_after > 0.9
