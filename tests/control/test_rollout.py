"""Whole episodes: what is counted, what is kept, and that they can be repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prelar.control.rollout import Episode, RandomPolicy, play, play_episodes, summarise
from prelar.envs.pixels import PixelEnv
from tests.control.toy import ACTIONS, DotWorld


class Right:
    """Pushes to the right, and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, bool]] = []

    def act(self, memory: Any, images: Any, is_first: Any) -> tuple[Any, int]:
        assert images.shape == (1, 64, 64, 3) and images.dtype == np.uint8
        self.calls.append((memory, bool(is_first[0])))
        return np.array([[1, 0]], np.float32), len(self.calls)


def make(time_limit: int = 12) -> PixelEnv:
    return PixelEnv(DotWorld(time_limit), seed=1)


def test_an_episode_holds_every_step() -> None:
    policy = Right()
    played = play(make(), policy, episode=0, seed=0, keep_frames=True)
    assert played.success and played.frames is not None
    assert played.frames.shape == (13, 64, 64, 3) and played.actions.shape == (12, ACTIONS)
    assert played.total == pytest.approx(played.rewards.sum(), rel=1e-6)
    assert np.diff(played.rewards).min() >= 0 and played.rewards[-1] == 1
    assert policy.calls == [(None, True)] + [(n, False) for n in range(1, 12)]


def test_who_does_not_look_needs_no_drawing() -> None:
    world = DotWorld(12)
    policy = RandomPolicy(ACTIONS)
    unseen = play(PixelEnv(world, seed=1, draws=False), policy, episode=4, seed=0)
    drawn = play(make(), policy, episode=4, seed=0)
    assert world.drawn == 0
    assert np.array_equal(unseen.rewards, drawn.rewards) and np.array_equal(unseen.actions, drawn.actions)


def test_success_at_any_step_counts() -> None:
    class Back(Right):
        def act(self, memory: Any, images: Any, is_first: Any) -> tuple[Any, int]:
            _, count = super().act(memory, images, is_first)
            return np.array([[1 if count <= 10 else -1, 0]], np.float32), count

    assert play(make(20), Back(), episode=0, seed=0).success


def test_episodes_are_a_function_of_their_seeds() -> None:
    policy = RandomPolicy(ACTIONS)
    first = play_episodes(make(), policy, episodes=3, seed=0, keep_frames=2)
    again = play_episodes(make(), policy, episodes=3, seed=0, keep_frames=2)
    assert [episode.total for episode in first] == [episode.total for episode in again]
    assert len({episode.total for episode in first}) == 3
    assert len({episode.actions.tobytes() for episode in first}) == 3, "no episode repeats another's actions"
    other = play_episodes(make(), policy, episodes=1, seed=1)
    assert other[0].actions.tobytes() != first[0].actions.tobytes()
    assert [episode.frames is not None for episode in first] == [True, True, False]


def test_torchs_generator_is_left_alone() -> None:
    class Noisy(Right):
        def act(self, memory: Any, images: Any, is_first: Any) -> tuple[Any, int]:
            return torch.rand(1, ACTIONS).numpy(), 0

    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    one, two = (play(make(), Noisy(), episode=0, seed=s).total for s in (0, 0))
    assert torch.equal(torch.rand(1), wanted)
    assert one == two != play(make(), Noisy(), episode=0, seed=1).total


def test_random_actions_fill_the_range() -> None:
    policy = RandomPolicy(ACTIONS)
    torch.manual_seed(0)
    images, starts = np.zeros((3, 64, 64, 3), np.uint8), np.zeros(3, np.bool_)
    drawn = [policy.act(None, images, starts)[0] for _ in range(200)]
    values = np.concatenate(drawn)
    assert values.shape == (600, ACTIONS) and values.dtype == np.float32
    assert abs(values.mean()) < 0.1 and values.min() < -0.98 and values.max() > 0.98


def test_summary() -> None:
    episodes = [
        Episode(np.array([1, 2], np.float32), np.zeros((2, 2), np.float32), True, None),
        Episode(np.array([3, 5], np.float32), np.zeros((2, 2), np.float32), False, None),
    ]
    assert summarise(episodes) == {"success": 0.5, "return": 5.5}
