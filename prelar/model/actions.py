"""Where the action of the dynamics comes from: the video, the robot, or nowhere.

Every action part answers the same calls: `forward(images, robot_action, is_first, …)` gives the action to
feed at each step of a sequence and what its posterior is made of, `losses` the losses of that posterior,
`step` the action of one step of imagination or acting, and `infer` the latent actions of a video, or None.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prelar.model.layers import ResNet
from prelar.model.losses import (
    CONSISTENCY,
    action_kl,
    categorical_kl,
    gaussian_kl,
    gumbel,
    masked_mean,
    straight_through,
)
from prelar.model.rssm import RSSM, StackedRSSM, State
from prelar.model.spec import ModelSpec
from prelar.utils.distributed import all_gather_rows, local_rows, sample_global
from prelar.utils.errors import UserError

Stats = dict[str, Tensor]
"""What describes an action posterior, each (B, T-1, …); empty for actions without one."""

CLASSES = 8


class Kind(Protocol):
    """The family of the latent action's posterior."""

    outputs: int

    def stats(self, raw: Tensor) -> Stats:
        """The network's `outputs` (…, outputs) -> the posterior's statistics."""

    def action(self, stats: Stats, sample: bool) -> Tensor:
        """A sample, or the mean or mode (…, A)."""

    def kl(self, stats: Stats) -> Tensor:
        """KL from the posterior to the prior in nats (…)."""

    def distance(self, p: Stats, q: Stats) -> Tensor:
        """How far two posteriors lie apart, in nats (…)."""


class Gaussian:
    """N(mean, std²) with std = 2·sigmoid(x/2), prior N(0, I) (the paper)."""

    def __init__(self, action_dim: int) -> None:
        self.outputs = 2 * action_dim

    def stats(self, raw: Tensor) -> Stats:
        """(…, 2A) -> mean and std (…, A); std is at least 1e-6."""
        mean, std = raw.float().chunk(2, -1)
        return {"mean": mean, "std": 2 * torch.sigmoid(std / 2) + 1e-6}

    def action(self, stats: Stats, sample: bool) -> Tensor:
        """A reparameterised sample, or the mean (…, A)."""
        mean, std = stats["mean"], stats["std"]
        if not sample:
            return mean
        return mean + std * sample_global(
            lambda shape: torch.randn(shape, device=std.device), tuple(std.shape)
        )

    def kl(self, stats: Stats) -> Tensor:
        """KL against N(0, I) (…)."""
        return action_kl(stats["mean"], stats["std"])

    def distance(self, p: Stats, q: Stats) -> Tensor:
        """KL(p ‖ q) (…)."""
        return gaussian_kl(p["mean"], p["std"], q["mean"], q["std"])


class Deterministic:
    """A point: no prior, so no KL."""

    def __init__(self, action_dim: int) -> None:
        self.outputs = action_dim

    def stats(self, raw: Tensor) -> Stats:
        """(…, A) -> mean (…, A)."""
        return {"mean": raw.float()}

    def action(self, stats: Stats, sample: bool) -> Tensor:
        """The point (…, A)."""
        return stats["mean"]

    def kl(self, stats: Stats) -> Tensor:
        """Zeros (…)."""
        return torch.zeros_like(stats["mean"][..., 0])

    def distance(self, p: Stats, q: Stats) -> Tensor:
        """Half the squared distance, which is the KL of two Gaussians of unit variance (…)."""
        return 0.5 * (p["mean"] - q["mean"]).square().sum(-1)


class Discrete:
    """Groups of categoricals of 8 classes with straight-through one-hots, prior uniform."""

    def __init__(self, action_dim: int) -> None:
        if action_dim % CLASSES:
            raise UserError(
                f"action_dim = {action_dim}: discrete latent actions are groups of {CLASSES} classes; "
                f"set a multiple of {CLASSES}"
            )
        self.outputs = action_dim

    def stats(self, raw: Tensor) -> Stats:
        """(…, A) -> logit (…, A/8, 8)."""
        return {"logit": raw.float().unflatten(-1, (-1, CLASSES))}

    def action(self, stats: Stats, sample: bool) -> Tensor:
        """The groups' one-hots, drawn or of the mode, flattened (…, A)."""
        logit = stats["logit"]
        noise = (
            sample_global(lambda shape: gumbel(shape, logit.device), tuple(logit.shape)) if sample else None
        )
        return straight_through(logit, noise).flatten(-2)

    def kl(self, stats: Stats) -> Tensor:
        """KL against the uniform distribution (…)."""
        return categorical_kl(stats["logit"], torch.zeros_like(stats["logit"]))

    def distance(self, p: Stats, q: Stats) -> Tensor:
        """KL(p ‖ q) (…)."""
        return categorical_kl(p["logit"], q["logit"])


KINDS: dict[str, type[Gaussian] | type[Deterministic] | type[Discrete]] = {
    "gaussian": Gaussian,
    "deterministic": Deterministic,
    "discrete": Discrete,
}


@dataclass(frozen=True)
class Actions:
    """The actions of a sequence (B, T, A), the first leading to frame 0, and their posterior's statistics."""

    action: Tensor
    stats: Stats


class ActionPart(nn.Module):
    """An action part without losses and without latent actions."""

    action_dim: int

    def loss_weights(self, spec: ModelSpec) -> dict[str, float]:
        """The weight of each of the `losses` by name."""
        return {}

    def losses(
        self, found: Actions, post: State, prior: State, dynamics: RSSM | StackedRSSM, is_first: Tensor
    ) -> dict[str, Tensor]:
        """The losses of the actions' posterior by name."""
        return {}

    def infer(self, images: Tensor, is_first: Tensor) -> Tensor | None:
        """The latent actions of a video (B, T-1, A), means or modes; None where there are none."""
        return None


class RobotAction(ActionPart, abc.ABC):
    """Actions that follow from the robot's, whatever the frames show."""

    @abc.abstractmethod
    def step(self, action: Tensor) -> Tensor:
        """The robot's action (…, robot_action_dim) -> the action to feed (…, A)."""

    def forward(
        self, images: Tensor, robot_action: Tensor | None, is_first: Tensor, training: bool, sample: bool
    ) -> Actions:
        """The robot's actions (B, T, robot_action_dim) -> the actions to feed (B, T, A)."""
        assert robot_action is not None, "this model needs the robot's actions"
        return Actions(self.step(robot_action), {})


class RawAction(RobotAction):
    """The robot's action as it is, padded with zeros to the slot of the dynamics."""

    def __init__(self, *, robot_action_dim: int, slot: int) -> None:
        super().__init__()
        if robot_action_dim > slot:
            raise UserError(
                f"robot_action_dim = {robot_action_dim}: the action slot holds {slot}; use prelar"
            )
        self.action_dim = slot

    def step(self, action: Tensor) -> Tensor:
        """(…, robot_action_dim) -> (…, slot)."""
        return F.pad(action, (0, self.action_dim - action.shape[-1]))


class NoAction(ActionPart):
    """A slot of zeros: the dynamics learn without actions (APV)."""

    def __init__(self, *, slot: int) -> None:
        super().__init__()
        self.action_dim = slot

    def step(self, action: Tensor) -> Tensor:
        """(…, any) -> zeros (…, slot)."""
        return action.new_zeros(*action.shape[:-1], self.action_dim)

    def forward(
        self, images: Tensor, robot_action: Tensor | None, is_first: Tensor, training: bool, sample: bool
    ) -> Actions:
        """Zeros (B, T, slot)."""
        return Actions(images.new_zeros(*images.shape[:2], self.action_dim), {})


class ActionMLP(RobotAction):
    """The robot's action in the space of the latent ones: linear, ELU, linear (PreLAR, fine-tuning)."""

    def __init__(self, *, robot_action_dim: int, hidden: int, action_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(robot_action_dim, hidden)
        self.out = nn.Linear(hidden, action_dim)
        self.action_dim = action_dim

    def step(self, action: Tensor) -> Tensor:
        """(…, robot_action_dim) -> (…, A)."""
        out: Tensor = self.out(F.elu(self.hidden(action)))
        return out.float()


def window_frames(is_first: Tensor, window: int) -> Tensor:
    """Which frames infer the action of each pair (t, t+1): numbers (B, T-1, window), ending with t, t+1.

    Frames before the pair's clip began (the last `is_first` up to t, or the start of the sequence) are
    replaced by the clip's first frame.
    """
    time = is_first.shape[1]
    steps = torch.arange(time, device=is_first.device)
    start = torch.where(is_first.bool(), steps, 0).cummax(1).values[:, :-1, None]
    past = steps[: time - 1, None] - torch.arange(window - 2, -1, -1, device=is_first.device)
    past = torch.maximum(past[None], start)
    return torch.cat([past, steps[1:, None].expand(len(is_first), -1, 1)], -1)


class VideoAction(ActionPart):
    """Latent actions inferred from the frames o_{t-k+2..t+1} of a window of k (PreLAR; k = 2 is the paper).

    The frames are stacked as channels, oldest first, through an own ResNet, linear, ELU, linear.
    """

    def __init__(
        self, *, cnn_depth: int, hidden: int, action_dim: int, kind: str, window: int, consistency: str
    ) -> None:
        super().__init__()
        self.kind: Kind = KINDS[kind](action_dim)
        self.window, self.action_dim = window, action_dim
        self.consistency = CONSISTENCY[consistency]
        self.trunk = ResNet(3 * window, cnn_depth)
        self.hidden = nn.Linear(self.trunk.outputs, hidden)
        self.out = nn.Linear(hidden, self.kind.outputs)

    def posterior(self, images: Tensor, is_first: Tensor, training: bool = False) -> Stats:
        """images (B, T, 3, 64, 64), is_first (B, T) -> q(ã_t | frames) for each pair (B, T-1, …)."""
        batch, time = images.shape[:2]
        index = window_frames(is_first, self.window)
        frames = images[torch.arange(batch, device=images.device)[:, None, None], index]
        top = self.trunk(frames.flatten(0, 1).flatten(1, 2), training)[-1]
        raw = self.out(F.elu(self.hidden(top.flatten(1))))
        return self.kind.stats(raw.unflatten(0, (batch, time - 1)))

    def forward(
        self, images: Tensor, robot_action: Tensor | None, is_first: Tensor, training: bool, sample: bool
    ) -> Actions:
        """The action of the pair (t, t+1) is fed at step t+1, zeros at step 0: (B, T, A)."""
        stats = self.posterior(images, is_first, training)
        return Actions(F.pad(self.kind.action(stats, sample), (0, 0, 1, 0)), stats)

    def step(self, action: Tensor) -> Tensor:
        """A latent action as it is (…, A)."""
        return action

    def infer(self, images: Tensor, is_first: Tensor) -> Tensor:
        """Means or modes (B, T-1, A)."""
        return self.kind.action(self.posterior(images, is_first), sample=False)

    def loss_weights(self, spec: ModelSpec) -> dict[str, float]:
        """The weight of each of the `losses` by name."""
        return {"action_kl": spec.beta_a, "consistency": spec.beta_c}

    def losses(
        self, found: Actions, post: State, prior: State, dynamics: RSSM | StackedRSSM, is_first: Tensor
    ) -> dict[str, Tensor]:
        """`action_kl`, mean over pairs of one clip, and `consistency` of action and state.

        Consistency (PreLAR): from the same s_{t-1} the prior is rolled with the own action and
        with that of another sequence; d_state is the KL of the two priors, d_action the KL of the two
        action posteriors. Pairs across a clip's start count for neither. Both are of the whole batch, where
        several processes share it.
        """
        valid = 1 - is_first[:, 1:].float()
        all_valid = all_gather_rows(valid)
        other = _another(len(all_valid), valid.device)
        rows = local_rows(other)
        swapped = {key: all_gather_rows(value)[rows] for key, value in found.stats.items()}
        with torch.no_grad():
            before = {key: value[:, :-1].flatten(0, 1).detach() for key, value in post.items()}
            swapped_action = all_gather_rows(found.action.detach())[rows, 1:]
            rolled = dynamics.img_step(before, swapped_action.flatten(0, 1), sample=False)
            state = categorical_kl(prior["logit"][:, 1:].flatten(0, 1), rolled["logit"]).unflatten(
                0, valid.shape
            )
        action = self.kind.distance(found.stats, swapped)
        return {
            "action_kl": masked_mean(all_gather_rows(self.kind.kl(found.stats)), all_valid),
            "consistency": self.consistency(
                all_gather_rows(state), all_gather_rows(action), all_valid * all_valid[other]
            ),
        }


def _another(batch: int, device: torch.device) -> Tensor:
    """For each sequence the number of another one, by a random cycle through the batch (B,)."""
    cycle = torch.randperm(batch, device=device)
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return other
