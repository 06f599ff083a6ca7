"""The actor-critic that learns in the world model's imagination (DreamerV2, section 2.3)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from prelar.model.layers import MLP, initialise
from prelar.model.losses import lambda_return

State = dict[str, Tensor]

MIN_STD = 0.1
_EDGE = 1e-6


class Imaginable(Protocol):
    """What the actor-critic asks of a world model; `prelar.model.world_model.WorldModel` is one."""

    def feature(self, state: State) -> Tensor:
        """State (N, …) -> what policy and critic see (N, F)."""

    def imagine_step(self, state: State, action: Tensor) -> State:
        """The next state (N, …) under actions (N, A), with gradients."""

    def predict_reward(self, feature: Tensor) -> Tensor:
        """Features (…, F) -> the reward to maximise (…)."""


@dataclass(frozen=True)
class TruncatedNormal:
    """Independent normals restricted to [-1, 1]; loc and scale (…, A) are mean and deviation before that.

    Pure tensor arithmetic in float32, without the host synchronisation of torchrl's class of the same name.
    """

    loc: Tensor
    scale: Tensor

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return (-1 - self.loc) / self.scale, (1 - self.loc) / self.scale

    def sample(self) -> Tensor:
        """Draw (…, A) through the inverse distribution function, so that gradients reach mean and std."""
        low, high = (torch.special.ndtr(bound) for bound in self._bounds())
        quantile = torch.lerp(low, high, torch.rand_like(self.loc)).clamp(_EDGE, 1 - _EDGE)
        drawn = self.loc + self.scale * torch.special.ndtri(quantile)
        return drawn + (drawn.clamp(_EDGE - 1, 1 - _EDGE) - drawn).detach()

    def mode(self) -> Tensor:
        """The most likely value (…, A)."""
        return self.loc.clamp(-1, 1)

    def mean(self) -> Tensor:
        """The expected value (…, A): far from the mode where a wide normal is cut at one end."""
        low, high = self._bounds()
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        return (self.loc + self.scale * (_density(low) - _density(high)) / mass).clamp(-1, 1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over the action's dimensions: (…)."""
        low, high = self._bounds()
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        slope = (low * _density(low) - high * _density(high)) / (2 * mass)
        return (0.5 * math.log(2 * math.pi * math.e) + (self.scale * mass).log() + slope).sum(-1)


def _density(x: Tensor) -> Tensor:
    """Density of the standard normal."""
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


class Actor(nn.Module):
    """Policy: features (…, F) to a truncated normal over actions (…, A).

    loc = tanh(x), scale = 2 · sigmoid(y / 2) + 0.1, of the two halves x and y of an MLP's output.
    """

    def __init__(self, features: int, actions: int, *, units: int, layers: int) -> None:
        super().__init__()
        self.actions = actions
        self.mlp = MLP(features, 2 * actions, units=units, layers=layers)
        initialise(self)

    def forward(self, feature: Tensor) -> TruncatedNormal:
        """(…, F) -> distribution over actions (…, A)."""
        loc, scale = self.mlp(feature).float().chunk(2, -1)
        return TruncatedNormal(torch.tanh(loc), 2 * torch.sigmoid(scale / 2) + MIN_STD)


@dataclass(frozen=True)
class ImaginedRollout:
    """An imagined rollout over H steps from N states.

    feature (H + 1, N, F), policy: the distributions (H, N, A) that the actions were drawn from.
    """

    feature: Tensor
    policy: TruncatedNormal


class ActorCritic(nn.Module):
    """Actor, critic, and the slow copy of the critic that bootstraps the returns.

    features, actions: sizes F and A. units, layers: of both MLPs. discount, lam: of the λ-returns. entropy:
    weight of the policy's entropy. slow_every: updates between two copies of the critic.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        units: int,
        layers: int,
        horizon: int,
        discount: float,
        lam: float,
        entropy: float,
        slow_every: int,
    ) -> None:
        super().__init__()
        self.actor = Actor(features, actions, units=units, layers=layers)
        self.critic = MLP(features, 1, units=units, layers=layers)
        initialise(self.critic)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.horizon, self.discount, self.lam = horizon, discount, lam
        self.entropy, self.slow_every = entropy, slow_every

    def imagine(self, model: Imaginable, start: State) -> ImaginedRollout:
        """Follow the policy for `horizon` steps from start states (N, …).

        The gradient of a later feature reaches the policy through the actions, but not through the features
        on which the policy acts.
        """
        state = start
        features, policies = [model.feature(state)], []
        for _ in range(self.horizon):
            policies.append(self.actor(features[-1].detach()))
            state = model.imagine_step(state, policies[-1].sample())
            features.append(model.feature(state))
        loc, scale = (torch.stack([getattr(one, name) for one in policies]) for name in ("loc", "scale"))
        return ImaginedRollout(torch.stack(features), TruncatedNormal(loc, scale))

    def losses(self, model: Imaginable, start: State) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss of the actor, loss of the critic, and metrics (detached scalars), from start states (N, …)."""
        dream = self.imagine(model, start)
        reward = model.predict_reward(dream.feature).float()
        value = self.slow_critic(dream.feature).squeeze(-1).float()
        target = lambda_return(reward[:-1], value[:-1], value[-1], discount=self.discount, lam=self.lam)
        entropy = dream.policy.entropy()[:-1]
        estimate = self.critic(dream.feature[:-1].detach()).squeeze(-1).float()
        metrics = {
            "imagined_reward": reward.mean(),
            "imagined_return": target.mean(),
            "entropy": entropy.mean(),
            "value": estimate.mean(),
        }
        return (
            actor_loss(target, entropy, discount=self.discount, weight=self.entropy),
            critic_loss(estimate, target, discount=self.discount),
            {name: value.detach() for name, value in metrics.items()},
        )

    @torch.no_grad()
    def refresh(self, update: int) -> None:
        """Copy the critic into its slow copy where update number `update`, just done, is due for it."""
        if update % self.slow_every == 0:
            self.slow_critic.load_state_dict(self.critic.state_dict())


def discounts(returns: Tensor, discount: float) -> Tensor:
    """Weights 1, γ, γ², … of the imagined steps, for tensors that are time first: (H, 1)."""
    steps = torch.arange(len(returns), device=returns.device, dtype=returns.dtype)
    return (discount**steps)[:, None]


def actor_loss(target: Tensor, entropy: Tensor, *, discount: float, weight: float) -> Tensor:
    """Negative return and entropy of the policy (DreamerV2, equation 6, gradient through the dynamics only).

    target (H, N): λ-returns of the imagined states. entropy (H - 1, N): of the policy in all of them but the
    last. The action of step t earns its first reward at t + 1, so that its entropy goes with that return.
    """
    objective = target[1:] + weight * entropy
    return -(discounts(objective, discount) * objective).mean()


def critic_loss(estimate: Tensor, target: Tensor, *, discount: float) -> Tensor:
    """Half the squared error of estimates (H, N) to λ-returns (H, N) without gradient (equation 5)."""
    error = 0.5 * (estimate - target.detach()).square()
    return (discounts(error, discount) * error).mean()
