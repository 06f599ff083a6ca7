"""Collecting experience: what the replay gets, and going on from a state in mid-episode."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar.control.collector import Collector
from prelar.control.replay import Replay
from prelar.control.rollout import RandomPolicy
from prelar.envs.pixels import Envs
from prelar.train.loop import seed_step
from tests.control.test_replay import sample
from tests.control.toy import ACTIONS, DotWorld


class Steps(RandomPolicy):
    """Random actions; keeps which steps it was told start an episode."""

    def __init__(self) -> None:
        super().__init__(ACTIONS)
        self.starts: list[list[bool]] = []

    def act(self, memory: Any, images: Any, is_first: Any) -> Any:
        self.starts.append(is_first.tolist())
        return super().act(memory, images, is_first)


def make(
    path: Path, count: int = 2, time_limit: int = 4, processes: bool = False, repeat: int = 1
) -> Collector:
    replay = Replay(path / "replay.bin", capacity=100, margin=50, action_dim=ACTIONS)
    envs = Envs(functools.partial(DotWorld, time_limit, repeat), count=count, seed=3, processes=processes)
    return Collector(envs, replay)


def test_episodes_reach_the_replay_whole(tmp_path: Path) -> None:
    collector, policy = make(tmp_path), Steps()
    metrics = [collector.step(policy) for _ in range(9)]
    assert [n for n, found in enumerate(metrics) if found] == [4, 8], "when the next action is chosen"
    assert policy.starts == [[n % 4 == 0] * 2 for n in range(9)]
    assert collector.replay.episodes == 4 and len(collector.replay) == 20
    got = sample(collector.replay, batch=30, length=5, seed=0, update=0)
    assert (got["reward"][:, 0] == 0).all() and (got["action"][:, 0] == 0).all()
    returns = {round(float(total), 4) for total in got["reward"].sum(1)}
    assert len(returns) == 4
    assert abs(np.mean([found["train/return"] for found in metrics if found]) - np.mean(list(returns))) < 1e-4


def test_images_and_rewards_belong_to_the_action_that_led_there(tmp_path: Path) -> None:
    collector = make(tmp_path, count=1)
    for _ in range(4):
        collector.step(Steps())
    assert len(collector.replay) == 0, "the answer to the last action is still to come"
    assert set(collector.settle()) == {"train/success", "train/return"} and collector.settle() == {}
    got = sample(collector.replay, batch=1, length=5, seed=0, update=0)
    column = got["image"][0, :, :, :, 0].max(1).argmax(1)
    np.testing.assert_allclose(column[1:], 4 + 52 * got["reward"][0, 1:], atol=0.51)
    moved = np.diff(got["reward"][0, 1:])
    np.testing.assert_allclose(moved[moved > 0], 0.1 * got["action"][0, 2:, 0][moved > 0], atol=1e-5)


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("before", [3, 4, 6])
def test_a_restored_collector_goes_on_bit_for_bit(tmp_path: Path, before: int, repeat: int) -> None:
    """Kept in mid-episode, and where the answer that ends an episode is still to be taken in."""
    settings = {"time_limit": 4 * repeat - (repeat > 1), "repeat": repeat}
    straight, first = make(tmp_path / "a", **settings), make(tmp_path / "b", **settings)
    policy = RandomPolicy(ACTIONS)
    for number in range(before):
        for one in (straight, first):
            seed_step(0, number)
            one.step(policy)
    torch.save({"collector": first.state_dict(), "replay": first.replay.state_dict()}, tmp_path / "state.pt")
    first.step(policy)
    first.replay.close()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = make(tmp_path / "b", **settings)
    second.replay.load_state_dict(state["replay"])
    second.load_state_dict(state["collector"])
    for number in range(before, 12):
        metrics = []
        for one in (straight, second):
            seed_step(0, number)
            metrics.append(one.step(policy))
        assert metrics[0] == metrics[1]
    draws = [sample(one.replay, batch=9, length=5, seed=0, update=1) for one in (straight, second)]
    for name, value in draws[0].items():
        np.testing.assert_array_equal(value, draws[1][name])


def test_a_state_before_the_first_step_is_nothing(tmp_path: Path) -> None:
    collector = make(tmp_path)
    collector.load_state_dict(make(tmp_path).state_dict())
    assert collector.step(Steps()) == {}


@pytest.mark.parametrize("repeat", [1, 3])
def test_processes_of_their_own_change_nothing(tmp_path: Path, repeat: int) -> None:
    found = []
    for processes in (False, True):
        collector = make(
            tmp_path / str(processes),
            time_limit=5 * repeat - (repeat > 1),
            processes=processes,
            repeat=repeat,
        )
        metrics = []
        for number in range(11):
            seed_step(0, number)
            metrics.append(collector.step(RandomPolicy(ACTIONS)))
        state = collector.state_dict()
        drawn = sample(collector.replay, batch=5, length=5, seed=0, update=0)
        found.append((metrics, state, drawn))
        assert set(collector.envs.seconds()) == {"simulation", "rendering"}
        collector.envs.close()
    (metrics, state, drawn), (other_metrics, other_state, other_drawn) = found
    assert metrics == other_metrics and any(metrics)
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)
    for name, value in drawn.items():
        np.testing.assert_array_equal(value, other_drawn[name])
