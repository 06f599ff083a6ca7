"""Losses and returns: pure functions of tensors. Everything is computed in float32, whatever the inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_mean(value: Tensor, valid: Tensor) -> Tensor:
    """Mean of `value` where `valid` (same shape, 0 or 1) is 1; 0 where nothing is valid."""
    valid = valid.to(value.dtype)
    return (value * valid).sum() / valid.sum().clamp_min(1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, mean over all entries: -ln N(target; prediction, 1) without its constant."""
    return 0.5 * (prediction.float() - target.float()).square().mean()


def image_loss(prediction: Tensor, image: Tensor) -> Tensor:
    """Half the squared error, summed over channels and pixels, mean over the rest. Shapes (…, 3, H, W)."""
    return 0.5 * (prediction.float() - image.float()).square().sum((-3, -2, -1)).mean()


def straight_through(logit: Tensor, noise: Tensor | None) -> Tensor:
    """One-hot of a categorical with the gradient of its probabilities (DreamerV2, algorithm 1).

    `logit` (…, K). With Gumbel `noise` of the same shape the one-hot is a sample, without it the mode.
    """
    logit = logit.float()
    chosen = (logit if noise is None else logit + noise).argmax(-1, keepdim=True)
    probability = logit.softmax(-1)
    hard = torch.zeros_like(probability).scatter_(-1, chosen, 1.0)
    return hard + (probability - probability.detach())


def gumbel(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard Gumbel noise from torch's global generator: the argmax of logit + noise is a sample."""
    return -torch.empty(shape, device=device).exponential_().log()


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of groups of categoricals given by logits (…, S, K), summed over groups -> (…)."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def categorical_entropy(logit: Tensor) -> Tensor:
    """Entropy in nats of groups of categoricals given by logits (…, S, K), summed over the groups -> (…)."""
    log_p = logit.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum((-2, -1))


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of diagonal Gaussians (…, D), summed over D -> (…)."""
    mean_p, std_p, mean_q, std_q = (x.float() for x in (mean_p, std_p, mean_q, std_q))
    ratio = std_p / std_q
    return 0.5 * (ratio.square() + ((mean_p - mean_q) / std_q).square() - 1 - 2 * ratio.log()).sum(-1)


def action_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(0, I)) in nats, summed over the action's dimensions (…, D) -> (…)."""
    return gaussian_kl(mean, std, torch.zeros_like(mean), torch.ones_like(std))


def kl_loss(post: Tensor, prior: Tensor, *, balance: float = 0.8, free: float = 0.0) -> tuple[Tensor, Tensor]:
    """Balanced KL of posterior and prior logits (…, S, K) (DreamerV2, algorithm 2).

    The share `balance` of the gradient goes to the prior, the rest to the posterior; each mean is at least
    `free` nats. Returns the scalar loss and the KL per step (…), without gradient.
    """
    to_prior = categorical_kl(post.detach(), prior)
    to_posterior = categorical_kl(post, prior.detach())
    loss = balance * to_prior.mean().clamp_min(free) + (1 - balance) * to_posterior.mean().clamp_min(free)
    return loss, to_prior.detach()


def _pairs(state: Tensor, action: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairwise differences of two vectors (N,), and which pairs are of two valid entries: (N, N) each."""
    state, action, valid = state.detach().float().flatten(), action.float().flatten(), valid.bool().flatten()
    return state[:, None] - state, action[:, None] - action, valid[:, None] & valid


TIE = 1e-6
"""Distances of states that differ by fewer nats are equal; the same action twice leaves some rounding."""


def order(state: Tensor, action: Tensor, valid: Tensor) -> Tensor:
    """Action-state consistency as a smooth pairwise order loss: a scalar with a gradient for `action`.

    `state`, `action`, `valid` have one shape: the distances d_state (taken without gradient) and d_action,
    and 1 where an entry counts. For every pair whose d_state differ by more than rounding does, the loss is
    softplus(-m), the margin m being the difference of d_action, positive where the two orders agree, in units
    of 1 nat plus the mean absolute difference. So the gradient stays bounded for small distances, and the
    loss does not reward large ones.
    """
    state_gap, action_gap, valid = _pairs(state, action, valid)
    scale = 1 + masked_mean(action_gap.abs(), valid)
    return masked_mean(F.softplus(-state_gap.sign() * action_gap / scale), valid & (state_gap.abs() > TIE))


def sign(state: Tensor, action: Tensor, valid: Tensor) -> Tensor:
    """Action-state consistency as published: mean squared difference of the signs of pairwise differences.

    Its gradient is zero wherever it exists, so it measures disagreement but teaches nothing.
    """
    state_gap, action_gap, valid = _pairs(state, action, valid)
    return masked_mean((state_gap.sign() - action_gap.sign()).square(), valid)


CONSISTENCY = {"order": order, "sign": sign}


def lambda_return(reward: Tensor, value: Tensor, bootstrap: Tensor, *, discount: float, lam: float) -> Tensor:
    """λ-returns (DreamerV2, equation 4), time first.

    `reward` (H, …) is earned at step t, `value` (H, …) estimates the return from step t on, `bootstrap` (…)
    the return from step H on, and `discount` γ applies between t and t + 1: R_t = r_t + γ ((1 - λ) v_{t+1} +
    λ R_{t+1}), with v_H = R_H = bootstrap. Returns (H, …).
    """
    following = torch.cat([value[1:], bootstrap[None]])
    discounts = torch.full_like(reward, discount)
    flow = reward + discounts * (1 - lam) * following
    returns = []
    last = bootstrap
    for step in range(len(reward) - 1, -1, -1):
        last = flow[step] + discounts[step] * lam * last
        returns.append(last)
    return torch.stack(returns[::-1])
