"""The actor-critic: distributions and losses by hand, gradients, and learning where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from prelar.control.actor_critic import Actor, ActorCritic, State, TruncatedNormal, actor_loss, critic_loss

PAIRS = [(0.0, 1.1), (0.9, 0.1), (-0.99, 0.1), (0.5, 2.1), (-0.999, 1.0)]


class Line:
    """A point x in 3 dimensions moves by action; the reward is -|x - goal|²; the feature is x."""

    def __init__(self, goal: float = 0.5) -> None:
        self.goal = goal

    def feature(self, state: State) -> Tensor:
        return state["x"]

    def imagine_step(self, state: State, action: Tensor) -> State:
        return {"x": 0.5 * state["x"] + action}

    def predict_reward(self, feature: Tensor) -> Tensor:
        return -(feature - self.goal).square().sum(-1)


def make(**changes: float) -> ActorCritic:
    settings = {"units": 32, "layers": 2, "horizon": 5, "discount": 0.9, "lam": 0.95, "entropy": 1e-4}
    return ActorCritic(3, 3, slow_every=4, **(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("mean", "std"), PAIRS)
def test_the_truncated_normal_agrees_with_scipy(mean: float, std: float) -> None:
    torch.manual_seed(0)
    theirs = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    ours = TruncatedNormal(torch.full((20_000,), mean), torch.full((20_000,), std))
    drawn = ours.sample()
    assert drawn.abs().max() < 1
    assert stats.kstest(drawn.numpy(), theirs.cdf).pvalue > 1e-3
    entropy = TruncatedNormal(torch.tensor([mean, mean]), torch.tensor([std, std])).entropy()
    assert entropy.item() == pytest.approx(2 * theirs.entropy(), rel=1e-3, abs=1e-3)
    assert ours.mode()[0].item() == pytest.approx(mean)
    assert ours.mean()[0].item() == pytest.approx(theirs.mean(), abs=1e-4)


@pytest.mark.parametrize(("mean", "std"), PAIRS)
def test_gradients_of_samples_follow_the_quantiles(mean: float, std: float) -> None:
    """d sample / d mean and / d std at a fixed quantile, against scipy's quantile function."""

    def quantile(mean: float, std: float, share: float) -> float:
        return float(stats.truncnorm.ppf(share, (-1 - mean) / std, (1 - mean) / std, mean, std))

    m = torch.full((64,), mean, requires_grad=True)
    s = torch.full((64,), std, requires_grad=True)
    torch.manual_seed(1)
    shares = torch.rand(64).double().numpy()
    torch.manual_seed(1)
    TruncatedNormal(m, s).sample().sum().backward()
    step = 1e-5
    for got, (dm, ds) in ((m.grad, (step, 0.0)), (s.grad, (0.0, step))):
        assert got is not None
        wanted = [
            (quantile(mean + dm, std + ds, u) - quantile(mean - dm, std - ds, u)) / (2 * step) for u in shares
        ]
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0.02, atol=0.01)


def test_the_actor_at_birth_is_broad_and_has_the_published_size() -> None:
    actor = Actor(2048, 4, units=400, layers=4)
    assert sum(p.numel() for p in actor.parameters()) == 1_304_008
    policy = actor(torch.zeros(1, 2048))
    torch.testing.assert_close(policy.scale, torch.full((1, 4), 1.1))
    torch.testing.assert_close(policy.loc, torch.zeros(1, 4))


def test_the_least_std_is_a_tenth() -> None:
    actor = Actor(2, 1, units=4, layers=1)
    with torch.no_grad():
        actor.mlp.out.bias[1] = -1e4
    torch.testing.assert_close(actor(torch.zeros(1, 2)).scale, torch.full((1, 1), 0.1))


def test_losses_by_hand() -> None:
    target = torch.tensor([[9.0], [2.0], [3.0]])
    entropy = torch.tensor([[0.5], [0.25]])
    assert actor_loss(target, entropy, discount=0.5, weight=2.0).item() == pytest.approx(-(3 + 0.5 * 3.5) / 2)
    estimate = torch.tensor([[8.0], [4.0], [3.0]])
    assert critic_loss(estimate, target, discount=0.5).item() == pytest.approx((0.5 + 0.5 * 2 + 0) / 3)


def test_targets_of_the_critic_get_no_gradient() -> None:
    target = torch.ones(2, 1, requires_grad=True)
    critic_loss(torch.zeros(2, 1, requires_grad=True), target, discount=0.9).backward()
    assert target.grad is None


def test_each_loss_reaches_its_own_network_only() -> None:
    actor_critic = make()
    actor, critic, _ = actor_critic.losses(Line(), {"x": torch.randn(4, 3)})
    groups = {
        "actor": list(actor_critic.actor.parameters()),
        "critic": list(actor_critic.critic.parameters()),
    }
    for loss, own, other in ((actor, "actor", "critic"), (critic, "critic", "actor")):
        found = torch.autograd.grad(loss, groups[own] + groups[other], allow_unused=True, retain_graph=True)
        own_part, other_part = found[: len(groups[own])], found[len(groups[own]) :]
        assert all(g is not None and g.abs().sum() > 0 for g in own_part[::2])
        assert all(g is None for g in other_part)


def test_the_gradient_flows_through_the_dynamics() -> None:
    """Without entropy and future, the actor's gradient is that of the reward one step later."""
    actor_critic = make(horizon=2, discount=1e-9, entropy=0.0)
    start = {"x": torch.zeros(1, 3)}
    torch.manual_seed(0)
    loss, _, _ = actor_critic.losses(Line(), start)
    got = torch.autograd.grad(loss, list(actor_critic.actor.parameters()))
    torch.manual_seed(0)
    wanted = (actor_critic.actor(start["x"]).sample() - 0.5).square().sum()
    for ours, theirs in zip(
        got, torch.autograd.grad(wanted, list(actor_critic.actor.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_slow_critic_is_copied_when_due() -> None:
    actor_critic = make()
    same = []
    for update in range(9):
        with torch.no_grad():
            actor_critic.critic.out.bias += 1
        actor_critic.refresh(update)
        same.append(torch.equal(actor_critic.critic.out.bias, actor_critic.slow_critic.out.bias))
    assert [n for n, equal in enumerate(same) if equal] == [0, 4, 8]


@pytest.mark.long
def test_it_learns_where_the_best_action_is_known() -> None:
    torch.manual_seed(0)
    actor_critic, world = make(horizon=3), Line(goal=0.2)
    actor_optimizer = torch.optim.Adam(actor_critic.actor.parameters(), lr=3e-3)
    critic_optimizer = torch.optim.Adam(actor_critic.critic.parameters(), lr=3e-3)
    for update in range(400):
        actor, critic, _ = actor_critic.losses(world, {"x": torch.rand(64, 3) * 2 - 1})
        for optimizer, loss in ((actor_optimizer, actor), (critic_optimizer, critic)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        actor_critic.refresh(update)
    with torch.no_grad():
        x = torch.rand(256, 3) * 2 - 1
        policy = actor_critic.actor(x)
        assert (policy.mode() - (0.2 - 0.5 * x)).abs().mean() < 0.1
        assert policy.scale.mean() < 0.2
