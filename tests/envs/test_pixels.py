"""Environments: repeatable by (seed, episode), restored by their actions."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from gymnasium.utils.env_checker import check_env

from prelar.envs import make_env
from prelar.envs.pixels import Answer, Envs, PixelEnv, Simulator
from prelar.utils.errors import UserError
from tests.control.toy import ACTIONS, DotWorld


def toy(seed: int = 3, **settings: int) -> PixelEnv:
    return PixelEnv(DotWorld(time_limit=6), seed=seed, **settings)


def dot() -> Simulator:
    return DotWorld(time_limit=6)


def held() -> Simulator:
    return make_env("drawer-open", time_limit=16, action_repeat=3)


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


def test_actions_are_clipped_before_they_are_kept() -> None:
    env = toy()
    env.reset()
    env.step(np.array([2.0, -3.0], np.float32))
    np.testing.assert_array_equal(env.state().actions, [[1, -1]])


def vector(make: Callable[[], Simulator] = dot, *, processes: bool = False) -> Envs:
    return Envs(make, count=2, seed=5, processes=processes)


def answered(envs: Envs, actions: npt.NDArray[np.float32]) -> Answer:
    envs.send(actions)
    return envs.receive()


@pytest.mark.parametrize(
    ("make", "size", "processes"),
    [
        (dot, ACTIONS, False),
        (dot, ACTIONS, True),
        pytest.param(held, 4, False, marks=pytest.mark.long),
        pytest.param(held, 4, True, marks=pytest.mark.long),
    ],
)
def test_restored_environments_go_on_bit_for_bit(
    make: Callable[[], Simulator], size: int, processes: bool
) -> None:
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (10, 2, size)).astype(np.float32)
    envs = vector(make)
    envs.reset()
    for action in actions[:8]:
        answered(envs, action)
    states = envs.states()
    assert [state.episode for state in states] == [2, 3]
    assert [len(state.actions) for state in states] == [2, 2]
    again = vector(make, processes=processes)
    again.reset()
    again.restore(states)
    for action in actions[8:]:
        for ours, theirs in zip(answered(again, action), answered(envs, action), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    envs.close()
    again.close()


def test_a_process_that_dies_is_told_in_one_line() -> None:
    envs = vector(processes=True)
    envs.reset()
    victim = multiprocessing.active_children()[0]
    victim.kill()
    victim.join()
    with pytest.raises(UserError, match="the process of an environment died"):
        answered(envs, np.zeros((2, ACTIONS), np.float32))
    envs.close()
    assert not multiprocessing.active_children()


def test_processes_leave_signals_to_the_parent() -> None:
    envs = vector(processes=True)
    envs.reset()
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(int(process.pid or 0), number)
    assert len(answered(envs, np.zeros((2, ACTIONS), np.float32)).images) == 2
    envs.close()


def test_restoring_draws_nothing() -> None:
    env = toy()
    env.reset()
    env.step(np.ones(ACTIONS, np.float32))
    world = DotWorld(time_limit=6)
    PixelEnv(world, seed=3).restore(env.state())
    assert world.drawn == 0


def test_the_image_that_ends_an_episode_is_kept() -> None:
    envs = Envs(lambda: DotWorld(time_limit=2), count=1, seed=0, processes=False)
    first = envs.reset()
    stay = np.zeros((1, ACTIONS), np.float32)
    answered(envs, stay)
    answer = answered(envs, stay)
    assert answer.ended.all()
    np.testing.assert_array_equal(answer.results[0], first[0])
    assert not np.array_equal(answer.images[0], first[0])
