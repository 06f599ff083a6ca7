"""Environments: repeatable by (seed, episode), restored by their actions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from prelar.control.envs import PixelEnv, Purpose, World, episode_seed, make_envs
from prelar.sim import Simulator
from tests.control.toy import ACTIONS, DotWorld


def toy(seed: int = 3, **settings: int) -> PixelEnv:
    return PixelEnv(DotWorld(time_limit=6), seed=seed, action_dim=ACTIONS, **settings)


def drawer() -> World:
    return Simulator("drawer-open", time_limit=6)


@pytest.mark.filterwarnings("ignore")
def test_gymnasium_finds_no_fault() -> None:
    check_env(toy(), skip_render_check=True)


def test_an_episode_ends_by_the_time_limit_as_truncation() -> None:
    env = toy()
    env.reset()
    ends = [env.step(np.zeros(ACTIONS, np.float32))[2:4] for _ in range(6)]
    assert ends == [(False, False)] * 5 + [(False, True)]


def test_environments_share_no_episode() -> None:
    envs = [toy(first=i, stride=2) for i in range(2)]
    starts = [[env.reset()[0].tobytes() for _ in range(3)] for env in envs]
    one = toy()
    assert [one.reset()[0].tobytes() for _ in range(6)] == [
        x for pair in zip(*starts, strict=True) for x in pair
    ]


def test_purposes_draw_from_streams_of_their_own() -> None:
    assert len({episode_seed(seed, purpose) for seed in range(3) for purpose in Purpose}) == 3 * len(Purpose)


def test_actions_are_clipped_before_they_are_kept() -> None:
    env = toy()
    env.reset()
    env.step(np.array([2.0, -3.0], np.float32))
    np.testing.assert_array_equal(env.state().actions, [[1, -1]])


@pytest.mark.parametrize(("make", "size"), [(lambda: DotWorld(time_limit=6), ACTIONS), (drawer, 4)])
def test_restored_environments_go_on_bit_for_bit(make: Callable[[], World], size: int) -> None:
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (10, 2, size)).astype(np.float32)
    envs = make_envs(make, count=2, seed=5, action_dim=size)
    envs.reset()
    for action in actions[:8]:
        envs.step(action)
    states = envs.call("state")
    assert [state.episode for state in states] == [2, 3] and [len(state.actions) for state in states] == [
        2,
        2,
    ]
    again = make_envs(make, count=2, seed=5, action_dim=size)
    again.reset()
    again.call("restore_own", states)
    for action in actions[8:]:
        for ours, theirs in zip(again.step(action)[:4], envs.step(action)[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    envs.close()
    again.close()


def test_restoring_draws_nothing() -> None:
    env = toy()
    env.reset()
    env.step(np.ones(ACTIONS, np.float32))
    world = DotWorld(time_limit=6)
    PixelEnv(world, seed=3, action_dim=ACTIONS).restore(env.state())
    assert world.drawn == 0


def test_the_image_that_ends_an_episode_is_kept() -> None:
    envs = make_envs(lambda: DotWorld(time_limit=2), count=1, seed=0, action_dim=ACTIONS)
    first, _ = envs.reset()
    stay = np.zeros((1, ACTIONS), np.float32)
    envs.step(stay)
    image, _, _, truncated, info = envs.step(stay)
    assert truncated.all()
    np.testing.assert_array_equal(info["final_obs"][0], first[0])
    assert not np.array_equal(image, first)
