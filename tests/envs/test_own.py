"""Environments of one's own, as docs/training.md shows them, and the suites in gymnasium's registry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from prelar.envs import describe, make_env, registration
from prelar.envs.pixels import PixelEnv
from prelar.utils.errors import UserError
from tests.conftest import ROOT

OTHERS = """
from gymnasium.spaces import Box, Discrete
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


def test_its_pictures_can_be_written_to() -> None:
    """As torch takes them without a copy, and without a warning."""
    for task in ("faulty_envs:Seen", "maze:Maze"):
        image, _ = PixelEnv(make_env(task), seed=0).reset()
        assert image.flags.writeable


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
