"""RSSMs: sequences equal steps, clip starts forget, and imagination is the prior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prelar.model.layers import initialise
from prelar.model.rssm import RSSM, StackedRSSM, State, feature

SIZES = {"hidden": 12, "deter": 10, "stoch": 3, "discrete": 4}
EMBED, ACTION, BATCH, TIME = 7, 5, 2, 6


def single() -> RSSM:
    rssm = RSSM(embed_dim=EMBED, action_dim=ACTION, **SIZES)
    initialise(rssm)
    return rssm


def stacked() -> StackedRSSM:
    return StackedRSSM(single(), RSSM(embed_dim=22, action_dim=ACTION, **SIZES))


def sequence() -> tuple[Tensor, Tensor, Tensor]:
    is_first = torch.zeros(BATCH, TIME)
    is_first[:, 0] = 1
    is_first[1, 3] = 1
    return torch.randn(BATCH, TIME, EMBED), torch.randn(BATCH, TIME, ACTION), is_first


def same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])


@pytest.mark.parametrize("make", [single, stacked])
def test_a_sequence_equals_its_steps(make: type) -> None:
    rssm = make()
    embed, action, is_first = sequence()
    post, _ = rssm.observe(embed, action, is_first, sample=False)
    state = rssm.initial(BATCH, embed.device)
    for step in range(TIME):
        state = rssm.obs_step(state, action[:, step], embed[:, step], is_first[:, step], sample=False)
        same(state, {key: value[:, step] for key, value in post.items()})


@pytest.mark.parametrize("make", [single, stacked])
def test_the_state_carries_over_between_pieces(make: type) -> None:
    rssm = make()
    embed, action, is_first = sequence()
    post, prior = rssm.observe(embed, action, is_first, sample=False)
    early, _ = rssm.observe(embed[:, :2], action[:, :2], is_first[:, :2], sample=False)
    last = {key: value[:, -1] for key, value in early.items()}
    late_post, late_prior = rssm.observe(embed[:, 2:], action[:, 2:], is_first[:, 2:], last, sample=False)
    same(late_post, {key: value[:, 2:] for key, value in post.items()})
    same(late_prior, {key: value[:, 2:] for key, value in prior.items()})


@pytest.mark.parametrize("make", [single, stacked])
def test_nothing_passes_a_clip_start(make: type) -> None:
    """From is_first on, neither earlier frames nor the action into it change anything; later ones do."""
    rssm = make()
    embed, action, is_first = sequence()
    post, prior = rssm.observe(embed, action, is_first, sample=False)
    embed[1, :3] += 5
    action[1, :4] += 5
    other_post, other_prior = rssm.observe(embed, action, is_first.bool(), sample=False)
    same({k: v[1, 3:] for k, v in post.items()}, {k: v[1, 3:] for k, v in other_post.items()})
    same({k: v[1, 3:] for k, v in prior.items()}, {k: v[1, 3:] for k, v in other_prior.items()})
    action[1, 4] += 5
    third, _ = rssm.observe(embed, action, is_first, sample=False)
    assert not torch.allclose(third["deter"][1, 4], post["deter"][1, 4])


@pytest.mark.parametrize("make", [single, stacked])
def test_prior_of_a_sequence_is_one_step_of_imagination(make: type) -> None:
    rssm = make()
    embed, action, is_first = sequence()
    post, prior = rssm.observe(embed, action, is_first, sample=False)
    step = rssm.img_step({key: value[:, 0] for key, value in post.items()}, action[:, 1], sample=False)
    torch.testing.assert_close(step["logit"], prior["logit"][:, 1])
    torch.testing.assert_close(step["deter"], prior["deter"][:, 1])


def test_imagine_rolls_steps() -> None:
    rssm = single()
    _, action, _ = sequence()
    state = rssm.initial(BATCH, action.device)
    rolled = rssm.imagine(action, state, sample=False)
    for step in range(TIME):
        state = rssm.img_step(state, action[:, step], sample=False)
        same(state, {key: value[:, step] for key, value in rolled.items()})


def test_samples_depend_on_the_global_seed_only() -> None:
    rssm = single()
    embed, action, is_first = sequence()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(rssm.observe(embed, action, is_first)[0]["stoch"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradient_reaches_everything_through_time() -> None:
    rssm = single()
    embed, action, is_first = sequence()
    embed.requires_grad_()
    action.requires_grad_()
    post, prior = rssm.observe(embed, action, is_first)
    losses, _ = rssm.kl(post, prior)
    (losses["kl"] + feature(post)[:, -1].square().sum()).backward()
    for name, parameter in rssm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert embed.grad is not None
    assert (embed.grad[0].abs().sum(-1) > 0).all()
    assert action.grad is not None
    assert (action.grad[0, 1:].abs().sum(-1) > 0).all()
    assert action.grad[0, 0].abs().max() == 0


def test_stack_feeds_the_lower_no_action_and_the_upper_its_feature() -> None:
    rssm = stacked()
    embed, action, is_first = sequence()
    post, prior = rssm.observe(embed, action, is_first, sample=False)
    lower, _ = rssm.lower.observe(embed, torch.zeros_like(action), is_first, sample=False)
    torch.testing.assert_close(rssm.lower_feature(post), feature(lower))
    upper, _ = rssm.upper.observe(feature(lower), action, is_first, sample=False)
    torch.testing.assert_close(feature(post), feature(upper))
    losses, value = rssm.kl(post, prior)
    torch.testing.assert_close(losses["kl"], rssm.upper.kl(post, prior)[0]["kl"])
    torch.testing.assert_close(
        losses["lower_kl"], rssm.lower.kl(lower, {"logit": prior["lower_logit"]})[0]["kl"]
    )
    assert value.shape == (BATCH, TIME)


def test_lower_rssm_learns_through_the_upper_loss() -> None:
    rssm = stacked()
    losses, _ = rssm.kl(*rssm.observe(*sequence()))
    losses["kl"].backward()
    grads = [p.grad for p in rssm.lower.posterior.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_single_rssm_answers_for_its_lower_feature() -> None:
    rssm = single()
    post, _ = rssm.observe(*sequence())
    assert torch.equal(rssm.lower_feature(post), feature(post))


def test_imagined_states_of_a_stack_are_the_upper_ones() -> None:
    rssm = stacked()
    post, _ = rssm.observe(*sequence())
    start = {key: post[key][:, 0] for key in ("logit", "stoch", "deter")}
    assert set(rssm.imagine(torch.randn(BATCH, 3, ACTION), start)) == {"logit", "stoch", "deter"}
