"""Environments of one's own, as docs/training.md shows them, and the suites in gymnasium's registry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from prelar.config import parse_config, read_yaml
from prelar.envs import describe, make_env, make_env_of, registration
from prelar.envs.pixels import PixelEnv
from prelar.envs.simulator import stretch
from prelar.utils.errors import UserError
from tests.conftest import ROOT

OTHERS = """
from gymnasium.spaces import Box, Dict, Discrete
import gymnasium, numpy as np
class Blind(gymnasium.Env):
    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Box(-1, 1, (3,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}
class Buttons(Blind):
    action_space = Discrete(3)
def number():
    return 3
class Seen(gymnasium.Env):
    action_space = Box(-1, 1, (1,), np.float64)
    observation_space = Box(0, 255, (64, 64, 3), np.uint8)
    time_limit, truncates, reward = 4, 4, 1.0
    def seen(self):
        return np.full((64, 64, 3), 7, np.uint8)
    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.seen(), {}
    def step(self, action):
        self.steps, self.action = self.steps + 1, action
        return self.seen(), self.reward, False, self.steps >= self.truncates, {}
class Short(Seen):
    truncates = 3
class Wrong(Seen):
    reward = float("nan")
class Ternary(Seen):
    action_space = Box(-1, 1, (1,), np.int64)
class Goal(Seen):
    observation_space = Dict(goal=Box(0, 1, (2,), np.float64), place=Box(0, 1, (1,), np.float32))
    render_mode = "rgb_array"
    def seen(self):
        return {"goal": np.array([0.25, 0.5]), "place": np.array([0.75], np.float32)}
    def render(self):
        return np.full((64, 64, 3), 9, np.uint8)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module of the documentation, and others with faults, where commands run."""
    text = (ROOT / "docs/own-environment.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found and text.count("\n") <= 40 + 5
    (tmp_path / "maze.py").write_text(found[1], encoding="utf-8")
    (tmp_path / "faulty_envs.py").write_text(OTHERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield


def test_the_environment_of_the_documentation_plays_like_any_other() -> None:
    spec = describe("maze:Maze")
    assert spec == (2, 60, 2, True)
    check_env(PixelEnv(make_env("maze:Maze"), seed=1), skip_render_check=True)
    env = PixelEnv(make_env("maze:Maze"), seed=1)
    image, info = env.reset(options={"episode": 4})
    assert image.shape == (64, 64, 3) and info == {"success": False} and image.std() > 0
    steps = [env.step(np.array([1.0, 0.0], np.float32)) for _ in range(30)]
    assert steps[-1][3] and not steps[-2][3], "30 actions of 2 steps each"
    assert steps[-1][4]["success"] and steps[-1][1] == 0, "its last state stays, without reward"
    other = PixelEnv(make_env("maze:Maze"), seed=1)
    other.restore(env.state())
    assert np.array_equal(other.render(), env.render())


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("faulty_envs:Blind", "no pixels; give it observations uint8"),
        ("faulty_envs:Buttons", r"its actions are Discrete\(3\); give it a bounded Box"),
        ("faulty_envs:number", "makes a int; make it a gymnasium.Env"),
        ("faulty_envs:Absent", "cannot be imported"),
        ("absent_module:Maze", "cannot be imported"),
    ],
)
def test_what_cannot_be_played_is_told_in_one_line(task: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as failure:
        make_env(task)
    assert "\n" not in str(failure.value)


def test_a_checkpoint_names_no_code_that_params_do_not_name() -> None:
    """Of a stranger's, not even the module is imported."""
    Path("trap.py").write_text("raise SystemExit('the trap was imported')\n", encoding="utf-8")
    values = read_yaml(ROOT / "params.yaml")
    values["scales"]["smoke"]["evaluate"] |= {"time_limit": 40, "length": 10}
    with pytest.raises(UserError, match=r"^task = trap:Trap, says the checkpoint: .* set task: trap:Trap in"):
        make_env_of({"task": "trap:Trap"}, parse_config(values))
    with make_env_of({"task": "maze:Maze"}, parse_config(values | {"task": "maze:Maze"})) as simulator:
        assert simulator.time_limit == 40


def test_its_pictures_can_be_written_to() -> None:
    """As torch takes them without a copy, and without a warning."""
    for task in ("faulty_envs:Seen", "maze:Maze"):
        image, _ = PixelEnv(make_env(task), seed=0).reset()
        assert image.flags.writeable


def test_observations_of_several_parts_are_one_row() -> None:
    simulator = make_env("faulty_envs:Goal")
    assert simulator.reset(0, 0).observation.tolist() == [0.25, 0.5, 0.75]
    assert simulator.step([0.0]).observation.dtype == np.float64 and (simulator.render() == 9).all()


def test_no_action_passes_its_bounds_by_rounding() -> None:
    random = np.random.default_rng(0)
    low, high = random.uniform(-3, 0, 1000).round(2), random.uniform(0, 3, 1000).round(2)
    for action in (-1.0, 1.0, np.nextafter(1, 0)):
        stretched = stretch(np.full(1000, action), low, high)
        assert (low <= stretched).all() and (stretched <= high).all()
    np.testing.assert_allclose(stretch(np.zeros(1000), low, high), (low + high) / 2, atol=1e-12)


def test_actions_in_integers_are_the_nearest() -> None:
    simulator: Any = make_env("faulty_envs:Ternary")
    simulator.reset(0, 0)
    told = []
    for action in (-0.9, -0.4, 0.4, 0.6):
        simulator.step([action])
        told.append(int(simulator._env.action[0]))
    assert told == [-1, 0, 0, 1]


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("faulty_envs:Short", "truncates an episode after 3 steps of 4; set time_limit to 3 at most"),
        ("faulty_envs:Wrong", "reward nan at step 1; make it a finite number"),
    ],
)
def test_what_goes_wrong_in_an_episode_is_told_in_one_line(task: str, told: str) -> None:
    simulator = make_env(task)
    simulator.reset(0, 0)
    with pytest.raises(UserError, match=told):
        for _ in range(4):
            simulator.step([0.0])


def test_an_environment_may_truncate_at_the_time_limit() -> None:
    for task, limit in (("faulty_envs:Seen", 4), ("faulty_envs:Short", 3)):
        simulator = make_env(task, time_limit=limit)
        simulator.reset(0, 0)
        assert [simulator.step([0.0]).done for _ in range(limit)] == [False] * (limit - 1) + [True]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["prelar/metaworld-drawer-open-v0", "prelar/dmc-walker-walk-v0"])
def test_gymnasium_makes_the_suites_tasks(name: str) -> None:
    env = gymnasium.make(name, time_limit=8)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_every_task_is_registered_once() -> None:
    registration.register()
    names = [name for name in gymnasium.registry if name.startswith("prelar/")]
    assert len(names) == len(set(names)) == 70
