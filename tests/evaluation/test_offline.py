"""Fits to fixed episodes: what is played, drawn and cut, and that a better start is told from a worse one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from prelar.envs.metaworld import Simulator
from prelar.evaluation import offline
from prelar.evaluation.offline import (
    HELD,
    Experience,
    baselines,
    collect,
    compare,
    draw,
    open_loop_error,
    segments,
)
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from tests.test_evaluate import SIZES, UNITS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(count: int, steps: int) -> Experience:
    """Sequences in which image, action and reward all tell their number and the step."""
    number = np.arange(count)[:, None] * 20 + np.arange(steps)
    image = np.broadcast_to(number[..., None, None, None], (count, steps, 64, 64, 3)).astype(np.uint8)
    action = np.repeat(number[..., None], 4, -1).astype(np.float32)
    return Experience(image, action, number.astype(np.float32))


def build() -> WorldModel:
    return build_model(ModelSpec(stage="finetune", method="prelar", robot_action_dim=4, **SIZES, **UNITS))


def test_episodes_are_random_and_experts_by_turns_and_a_third_of_either_is_held_out() -> None:
    with Simulator("reach") as simulator:
        learnt, held_out = collect(simulator, episodes=6, seed=3, steps=2 * HELD)
        again, _ = collect(simulator, episodes=6, seed=3, steps=2 * HELD)
        simulator.reset(3, 2)
        rewards = [simulator.step(action).reward for action in held_out.action[0, 1:]]
    for mine, other in zip(vars(learnt).values(), vars(again).values(), strict=True):
        assert np.array_equal(mine, other)
    assert learnt.image.shape == (4, 11, 64, 64, 3) and held_out.reward.shape == (2, 11)
    assert held_out.reward[0, 1:] == pytest.approx(rewards) and held_out.reward[0, 0] == 0
    held = (learnt.action[:, 1 : HELD + 1] == learnt.action[:, 1:2]).all((1, 2))
    assert held.tolist() == [True, False, True, False]
    assert (learnt.action[:, 0] == 0).all() and np.abs(learnt.action).max() <= 1


def test_episodes_are_at_the_agents_pace() -> None:
    """Actions of 60 steps in episodes of at most 500, each with the rewards of its steps."""
    with Simulator("reach", action_repeat=60) as simulator, Simulator("reach") as plain:
        learnt, _ = collect(simulator, episodes=2, seed=3)
        plain.reset(3, 0)
        rewards = [[plain.step(action).reward for _ in range(60)] for action in learnt.action[0, 1:3]]
    assert learnt.image.shape == (2, 1 + 9, 64, 64, 3)
    assert learnt.reward[0, 1:3] == pytest.approx(np.sum(rewards, 1), rel=1e-5)


def test_a_batch_is_a_function_of_seed_and_update() -> None:
    learnt = made_up(3, 9)
    first, again = (draw(learnt, batch=5, length=4, seed=1, update=2) for _ in "ab")
    other = draw(learnt, batch=5, length=4, seed=1, update=3)
    assert np.array_equal(first.reward, again.reward) and not np.array_equal(first.reward, other.reward)
    assert first.image.shape == (5, 4, 64, 64, 3)
    assert (np.diff(first.reward, axis=1) == 1).all(), "steps follow one another"
    assert np.array_equal(first.image[..., 0, 0, 0], first.reward)
    assert np.array_equal(first.action[..., 0], first.reward)


def test_held_out_episodes_are_cut_whole() -> None:
    cut = segments(made_up(2, 11), 5)
    assert cut.reward[:, 0].tolist() == [0, 5, 20, 25]
    assert cut.image.shape == (4, 5, 64, 64, 3) and cut.action.shape == (4, 5, 4)


def test_baselines_by_hand() -> None:
    held_out = Experience(
        np.array([0, 51, 102], np.uint8)[None, :, None, None, None] * np.ones((64, 64, 3), np.uint8),
        np.zeros((1, 3, 4), np.float32),
        np.array([[0, 1, 4]], np.float32),
    )
    copied, rewards = baselines(held_out, held_out, observed=1)
    assert copied == pytest.approx((0.2**2 + 0.4**2) / 2)
    assert rewards == pytest.approx(1.5**2)


def test_errors_are_those_of_what_the_model_foresees(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held_out = build().eval(), made_up(3, 6)
    monkeypatch.setattr(model, "decode", lambda feature, context: torch.zeros(*feature.shape[:2], 3, 64, 64))
    monkeypatch.setattr(model, "predict_reward", lambda feature: torch.full(feature.shape[:2], 2.0))
    image_error, reward_error = open_loop_error(model, held_out, observed=4, device=CPU)
    wanted = (held_out.image[:, 4:, 0, 0, 0] / 255 - 0.5) ** 2
    assert image_error == pytest.approx(wanted.mean(), rel=1e-5)
    assert reward_error == pytest.approx(((held_out.reward[:, 4:] - 2) ** 2).mean(), rel=1e-5)


@pytest.mark.long
def test_a_start_that_has_learnt_is_better_and_fitting_makes_both_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learnt, held_out = made_up(4, 8), segments(made_up(2, 8), 4)
    torch.manual_seed(0)
    taught = build()
    fabric = Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(offline, "LEARNING_RATE", 3e-3)
    budget = {"seeds": (1, 2), "batch": 4, "observed": 2}

    def ready() -> WorldModel:
        model = build()
        model.load_state_dict(taught.state_dict())
        return model

    scratch = compare(fabric, build, learnt, held_out, updates=12, **budget)  # type: ignore[arg-type]
    assert len(scratch["step"]) == 11 and scratch["step"][-1] == 12
    assert scratch["error"][-1] < scratch["error"][0]
    assert scratch["reward_error"][-1] < scratch["reward_error"][0]
    compare(fabric, lambda: taught, learnt, held_out, updates=20, **budget)  # type: ignore[arg-type]
    better = compare(fabric, ready, learnt, held_out, updates=2, **budget)  # type: ignore[arg-type]
    assert better["error"][0] < scratch["error"][0] / 2
    assert all(
        low <= mean <= high
        for low, mean, high in zip(better["error_min"], better["error"], better["error_max"], strict=True)
    )


def test_the_same_seeds_give_the_same_curves() -> None:
    learnt, held_out = made_up(4, 12), segments(made_up(2, 12), 6)
    fabric = Fabric(accelerator="cpu", devices=1)
    first, again = (
        compare(fabric, build, learnt, held_out, seeds=(3,), updates=2, batch=2, observed=2) for _ in "ab"
    )
    assert first == again
