"""DeepMind Control: its own rewards and pictures, repeatable to the bit, restored by replay."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from prelar.config import View
from prelar.envs import make_env
from prelar.envs.dmc import DOMAINS, Simulator
from prelar.envs.names import DMC
from prelar.envs.simulator import episode_entropy
from prelar.utils.errors import UserError

TASKS = [DMC.prefix + name for name in DMC.tasks]
FEW = ["dmc/cup-catch", "dmc/quadruped-walk"]
SOME = [pytest.param(task, marks=[] if task in FEW else pytest.mark.long) for task in TASKS]


def actions(simulator: Any, count: int, seed: int = 0) -> np.ndarray:
    """Random actions (count, A)."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, simulator.action_dim)).astype(np.float32)


def rollout(simulator: Any, seed: int, episode: int, taken: np.ndarray) -> list[bytes]:
    """Every observation and reward of an episode."""
    answers = [simulator.reset(seed, episode), *(simulator.step(action) for action in taken)]
    return [answer.observation.tobytes() + np.float64(answer.reward).tobytes() for answer in answers]


@pytest.mark.parametrize("task", SOME)
def test_a_used_simulator_equals_a_fresh_one_and_the_suites_own_environment(task: str) -> None:
    """Rewards are the suite's, summed over an action repeat of 2, within its bounds, for 1,000 steps."""
    with make_env(task) as used, make_env(task) as fresh:
        taken = actions(used, 30)
        rollout(used, 0, 1, taken[:25])
        told = rollout(used, 0, 7, taken)
        assert told == rollout(fresh, 0, 7, taken) != rollout(fresh, 0, 8, taken)
        assert (used.time_limit, used.action_repeat, used.succeeds) == (1000, 2, False)
        peer: Any = fresh._env  # type: ignore[attr-defined]
        assert peer._step_limit == 1000
        bounds = peer.action_spec()
        assert bounds.shape == (used.action_dim,)
        middle, half = (bounds.maximum + bounds.minimum) / 2, (bounds.maximum - bounds.minimum) / 2
        peer.task._random = np.random.RandomState(episode_entropy(0, 7))
        peer.reset()
        for action, answer in zip(taken, told[1:], strict=True):
            rewards = [peer.step(middle + half * action).reward for _ in range(2)]
            assert np.frombuffer(answer[-8:], np.float64)[0] == pytest.approx(sum(rewards), abs=1e-9)


def test_replay_restores_the_exact_state_and_picture() -> None:
    with make_env("dmc/quadruped-walk") as first, make_env("dmc/quadruped-walk") as other:
        taken = actions(first, 20)
        rollout(first, 5, 0, taken)
        answer = other.replay(5, 0, taken)
        assert np.array_equal(first.render(), other.render())
        assert other.steps == 40 and not answer.done
        assert first.step(taken[0]).observation.tobytes() == other.step(taken[0]).observation.tobytes()


@pytest.mark.parametrize("task", SOME)
def test_faithful_pictures_are_those_of_the_suite(task: str) -> None:
    """Through camera 0, of quadrupeds camera 2, what dm_control renders; fast ones resemble it."""
    with make_env(task, view=View(renderer="faithful")) as simulator, make_env(task) as fast:
        taken = actions(simulator, 12)
        rollout(simulator, 0, 3, taken)
        rollout(fast, 0, 3, taken)
        camera = 2 if "quadruped" in task else 0
        assert simulator.camera == camera  # type: ignore[attr-defined]
        picture = simulator.render()
        peer = simulator._env.physics.render(64, 64, camera_id=camera)  # type: ignore[attr-defined]
        assert picture.dtype == np.uint8 and np.array_equal(picture, peer)
        assert np.abs(picture.astype(int) - fast.render()).mean() < 60


def test_the_table_of_tasks_is_the_benchmark() -> None:
    assert len(TASKS) == 20 and set(FEW) <= set(TASKS)
    from dm_control import suite

    assert {
        (DOMAINS.get(domain, domain), task.replace("-", "_"))
        for domain, _, task in (name.partition("-") for name in DMC.tasks)
    } <= set(suite.ALL_TASKS)


def test_episodes_end_after_a_thousand_steps_at_most() -> None:
    with make_env("dmc/pendulum-swingup", time_limit=5) as simulator:
        simulator.reset(0, 0)
        assert [simulator.step([0.5]).done for _ in range(3)] == [False, False, True]
        with pytest.raises(RuntimeError, match="call reset"):
            simulator.step([0.5])
        with pytest.raises(UserError, match="time_limit = 1001: choose 1 to 1000"):
            Simulator("dmc/pendulum-swingup", time_limit=1001)


def test_what_is_wrong_with_a_task_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for task, told in {
        "dmc/walker-wlk": r"DeepMind Control has none .* did you mean dmc/walker-walk",
        "walker-walk": r"Meta-World has none .* dmc/walker-walk",
        "gym/walker-walk": r"no suite 'gym'; there is dmc/walker-walk",
    }.items():
        with pytest.raises(UserError, match=told) as failure:
            make_env(task)
        assert "\n" not in str(failure.value)
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(UserError, match=r"not installed .*; run `pip install 'prelar\[dmc\]'`"):
        make_env("dmc/walker-walk")
