"""Each loss alone: against values worked out by hand, and with a gradient where something must learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from prelar.model.losses import (
    action_kl,
    categorical_entropy,
    categorical_kl,
    gaussian_kl,
    gumbel,
    image_loss,
    kl_loss,
    lambda_return,
    masked_mean,
    order,
    sign,
    squared_error,
    straight_through,
)


def logits(*probabilities: float) -> Tensor:
    """Logits (1, K) of one group."""
    return torch.tensor([probabilities]).log()


def test_masked_mean_counts_valid_entries_only() -> None:
    value = torch.tensor([[1.0, 2.0], [30.0, 4.0]])
    assert masked_mean(value, torch.tensor([[1, 0], [0, 1]])) == 2.5
    assert masked_mean(value, torch.zeros(2, 2)) == 0


def test_squared_error_is_half_the_mean_square() -> None:
    assert squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])) == 0.5 * (1 + 9) / 2


def test_image_loss_sums_pixels_and_averages_frames() -> None:
    prediction = torch.zeros(1, 2, 3, 2, 2)
    prediction[0, 1] = 2.0
    assert image_loss(prediction, torch.zeros_like(prediction)) == 0.5 * (0 + 12 * 4) / 2
    prediction.requires_grad_()
    image_loss(prediction, torch.zeros_like(prediction)).backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad[0, 1], torch.ones(3, 2, 2))


def test_straight_through_is_an_exact_one_hot_of_the_mode() -> None:
    logit = torch.randn(50, 4, 7)
    mode = straight_through(logit, None)
    assert torch.equal(mode, torch.nn.functional.one_hot(logit.argmax(-1), 7).float())


def test_straight_through_has_the_gradient_of_the_probabilities() -> None:
    logit, weight = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    (straight_through(logit, gumbel((3, 5), logit.device)) * weight).sum().backward()
    expected = torch.autograd.grad((logit.softmax(-1) * weight).sum(), logit)[0]
    assert logit.grad is not None
    torch.testing.assert_close(logit.grad, expected)
    assert logit.grad.abs().sum() > 0


def test_samples_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    logit = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    frequency = straight_through(logit, gumbel((20000, 3), logit.device)).mean(0)
    torch.testing.assert_close(frequency, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


def test_categorical_kl_and_entropy_by_hand() -> None:
    p, q = logits(0.5, 0.5), logits(0.25, 0.75)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert categorical_kl(p, q).item() == pytest.approx(expected, abs=1e-6)
    two_groups = torch.stack([p[0], q[0]])
    assert categorical_kl(two_groups, two_groups.flip(0)).item() == pytest.approx(
        expected + 0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6
    )
    assert categorical_entropy(p).item() == pytest.approx(math.log(2), abs=1e-6)


def test_gaussian_kl_by_hand() -> None:
    mean_p, std_p = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    mean_q, std_q = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0])
    first = math.log(1 / 2) + (4 + 1) / 2 - 0.5
    second = math.log(3) + 1 / 18 - 0.5
    assert gaussian_kl(mean_p, std_p, mean_q, std_q).item() == pytest.approx(first + second, abs=1e-6)


def test_action_kl_is_against_a_standard_normal() -> None:
    assert action_kl(torch.zeros(3, 4), torch.ones(3, 4)).abs().max() == 0
    assert action_kl(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(2.0)
    mean, std = torch.tensor([0.5], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    action_kl(mean, std).backward()
    assert mean.grad is not None
    assert std.grad is not None
    assert mean.grad.item() == pytest.approx(0.5)
    assert std.grad.item() == pytest.approx(0.5 - 1 / 0.5)


def test_kl_loss_is_balanced() -> None:
    """The prior gets 0.8 of its gradient, the posterior 0.2 of its own; the value is the plain KL."""
    post, prior = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    loss, value = kl_loss(post, prior)
    plain = categorical_kl(post, prior)
    torch.testing.assert_close(value, plain.detach())
    assert loss.item() == pytest.approx(plain.mean().item(), rel=1e-5)
    to_post, to_prior = torch.autograd.grad(plain.mean(), (post, prior))
    loss.backward()
    torch.testing.assert_close(post.grad, 0.2 * to_post)
    torch.testing.assert_close(prior.grad, 0.8 * to_prior)
    assert to_post.abs().sum() > 0
    assert not value.requires_grad


def test_free_nats_stop_the_gradient_below_them() -> None:
    post, prior = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    loss, value = kl_loss(post, prior, free=1e3)
    assert value.max() < 1e3
    assert loss.item() == pytest.approx(1e3)
    loss.backward()
    assert post.grad is not None
    assert post.grad.abs().max() == 0


def test_order_by_hand() -> None:
    """Two entries in the right order, one nat apart; the scale is 1 + mean|gap|, with the diagonal."""
    state, action, valid = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0]), torch.ones(2)
    margin = 1 / (1 + 0.5)
    assert order(state, action, valid).item() == pytest.approx(math.log1p(math.exp(-margin)))
    assert order(state.flip(0), action, valid).item() == pytest.approx(math.log1p(math.exp(margin)))


def test_order_ignores_ties_and_invalid_entries() -> None:
    state, action = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 0.0])
    valid = torch.tensor([1, 1, 0])
    assert order(state, action, valid) == order(state[:2], action[:2], torch.ones(2))
    assert order(torch.ones(4), torch.randn(4), torch.ones(4)) == 0
    rounded = torch.tensor([0.0, 1e-7, -1e-7, 3.0])
    assert order(rounded, action := torch.randn(4), torch.ones(4)) == order(
        rounded.round(), action, torch.ones(4)
    )


def test_order_takes_no_gradient_from_the_states_and_keeps_it_bounded() -> None:
    state = torch.randn(6, requires_grad=True)
    action = (1e-4 * torch.rand(6)).requires_grad_()
    order(state, action, torch.ones(6)).backward()
    assert state.grad is None
    assert action.grad is not None
    assert 0 < action.grad.abs().max() < 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_falls_and_rank_correlation_rises_under_gradient_descent(seed: int) -> None:
    """Free action posteriors learn the order of given state distances, the right order being known."""
    generator = torch.Generator().manual_seed(seed)
    number, width = 40, 6
    state = torch.rand(number, generator=generator)
    mean = torch.randn(number, width, generator=generator).requires_grad_()
    raw = torch.zeros(number, width, requires_grad=True)
    other = torch.arange(number).roll(1)

    def distances() -> Tensor:
        std = torch.nn.functional.softplus(raw) + 0.1
        return gaussian_kl(mean, std, mean[other], std[other])

    optimiser = torch.optim.Adam([mean, raw], lr=0.03)
    before, rank_before = (
        order(state, distances(), torch.ones(number)),
        spearmanr(state, distances().detach())[0],
    )
    for _ in range(200):
        optimiser.zero_grad()
        order(state, distances(), torch.ones(number)).backward()
        optimiser.step()
    after, rank_after = (
        order(state, distances(), torch.ones(number)),
        spearmanr(state, distances().detach())[0],
    )
    assert after < before - 0.1
    assert rank_after > 0.9 > rank_before


def test_sign_by_hand() -> None:
    state, valid = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert sign(state, torch.tensor([1.0, 5.0, 9.0]), valid) == 0
    assert sign(state, torch.tensor([9.0, 5.0, 1.0]), valid).item() == pytest.approx(4 * 6 / 9)


def test_sign_has_no_gradient_at_all() -> None:
    """The published loss disagrees on most pairs here, yet its gradient is exactly zero."""
    state, action = torch.arange(8.0), torch.arange(8.0).flip(0).requires_grad_()
    loss = sign(state, action, torch.ones(8))
    assert loss > 1
    loss.backward()
    assert action.grad is not None
    assert torch.equal(action.grad, torch.zeros(8))


def test_lambda_return_by_hand() -> None:
    reward, value = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    found = lambda_return(reward, value, torch.tensor(40.0), discount=0.5, lam=0.25)
    last = 3 + 0.5 * 40
    middle = 2 + 0.5 * (0.75 * 30 + 0.25 * last)
    first = 1 + 0.5 * (0.75 * 20 + 0.25 * middle)
    torch.testing.assert_close(found, torch.tensor([first, middle, last]))


def test_lambda_return_of_one_is_the_discounted_sum_and_of_zero_the_next_value() -> None:
    reward, value, end = torch.rand(4, 3), torch.rand(4, 3), torch.rand(3)
    discount = 0.7
    whole = lambda_return(reward, value, end, discount=discount, lam=1.0)
    expected = end
    for step in (3, 2, 1, 0):
        expected = reward[step] + discount * expected
    torch.testing.assert_close(whole[0], expected)
    single = lambda_return(reward, value, end, discount=discount, lam=0.0)
    torch.testing.assert_close(single, reward + discount * torch.cat([value[1:], end[None]]))


def test_lambda_return_passes_gradients_to_rewards_and_values() -> None:
    reward, value, end = (torch.rand(3, requires_grad=True) for _ in range(3))
    lambda_return(reward, value, end.sum(), discount=0.9, lam=0.8).sum().backward()
    for tensor in (reward, end):
        assert tensor.grad is not None
        assert (tensor.grad > 0).all()
    assert value.grad is not None
    assert value.grad[0] == 0
    assert (value.grad[1:] > 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 4), min_size=1, max_size=5))
def test_divergences_are_never_negative(values: list[tuple[float, ...]]) -> None:
    a, b, c, d = torch.from_numpy(np.array(values, dtype=np.float32)).T
    assert gaussian_kl(a, b.exp(), c, d.exp()) >= -1e-3
    assert categorical_kl(torch.stack([a, b]), torch.stack([c, d])) >= -1e-5
