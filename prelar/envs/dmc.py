"""Tasks of the DeepMind Control Suite: the twenty of the vision benchmark, each as its authors see it.

Tassa et al., DeepMind Control Suite, 2018; the twenty, with their cameras and an action repeat of 2, as in
Hafner et al., Mastering Atari with Discrete World Models, ICLR 2021. Its tasks tell no success and have no
scripted expert.
"""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import numpy as np

from prelar.config import PLAIN, View
from prelar.envs import gl
from prelar.envs.names import DMC, suite_of
from prelar.envs.painter import Studio
from prelar.envs.simulator import Doubles, Image, episode_entropy, stretch
from prelar.envs.simulator import Simulator as Base
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE

DOMAINS = {"cup": "ball_in_cup"}
"""Domains that the benchmark calls otherwise than the suite does."""
CAMERAS = {"quadruped": 2}
"""Cameras of domains that are not seen from camera 0."""
PLANE = 0
"""MuJoCo's number of the kind of geometry that floors and walls are of."""


def _suite() -> Any:
    """`dm_control.suite`, imported once OpenGL is settled. Raises `UserError` where it is not installed."""
    gl.ensure()
    handlers = list(logging.root.handlers)
    try:
        from absl import logging as absl_logging
        from dm_control import suite
        from dm_control.suite import quadruped
    except ModuleNotFoundError as error:
        raise UserError(
            f"task = dmc/…: DeepMind Control is not installed ({error}); run `pip install 'prelar[dmc]'`, "
            "with Python 3.11 or 3.12: labmaze, which dm-control asks for, has no wheels beyond"
        ) from None
    logging.root.handlers[:] = handlers  # absl would take over all messages, and close what stderr is now
    absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
    if not hasattr(np, "in1d"):  # gone from numpy 2.4, and quadruped calls it
        quadruped.np = types.SimpleNamespace(**{**vars(np), "in1d": np.isin})
    return suite


class Simulator(Base):
    """One task of DeepMind Control; other arguments as of every `prelar.envs.simulator.Simulator`.

    Observations are float64 (D,), the suite's own in a row. Rewards are the suite's, 0 to 1 a step. Actions
    in [-1, 1] are stretched to its bounds.

    task: name such as `dmc/walker-walk`. view: how pictures look.
    Raises `UserError` for an unknown task, a number out of range, or where dm-control is not installed.
    """

    def __init__(
        self,
        task: str,
        *,
        width: int = SIZE,
        height: int = SIZE,
        time_limit: int | None = None,
        action_repeat: int | None = None,
        view: View = PLAIN,
    ) -> None:
        if suite_of(task) is not DMC:
            raise ValueError(f"{task}: no task of {DMC.title}")
        self.task = task
        domain, _, name = self.task.removeprefix(DMC.prefix).partition("-")
        super().__init__(
            DMC.spec(self.task),
            width=width,
            height=height,
            time_limit=time_limit,
            action_repeat=action_repeat,
        )
        self.camera = CAMERAS.get(domain, 0)
        self._env = _suite().load(
            DOMAINS.get(domain, domain), name.replace("-", "_"), task_kwargs={"random": 0}
        )
        bounds = self._env.action_spec()
        self._low, self._high = bounds.minimum, bounds.maximum
        model = self._env.physics.model.ptr
        planes = np.flatnonzero(model.geom_type == PLANE)
        self._studio = Studio(model, view, backdrop=planes.tolist(), fps=self.fps)

    def _start(self, seed: int, episode: int) -> Doubles:
        self._env.task._random = np.random.RandomState(episode_entropy(seed, episode))
        self._studio.start(seed, episode)
        return _row(self._env.reset())

    def _advance(self, action: Doubles) -> tuple[Doubles, float, bool]:
        answer = self._env.step(stretch(action, self._low, self._high))
        return _row(answer), float(answer.reward), False

    @property
    def fps(self) -> float:
        """Steps in a second of simulated time."""
        return 1 / float(self._env.control_timestep())

    def render(self, *, width: int | None = None, height: int | None = None) -> Image:
        """Draw the present state as the benchmark sees it: RGB uint8 (height, width, 3), antialiased."""
        data = self._env.physics.data.ptr
        return self._studio.render(
            lambda wide, high: self._studio.draw(data, self.camera, wide, high, step=self.steps),
            width or self.width,
            height or self.height,
        )

    def close(self) -> None:
        """Free the drawing contexts and the physics."""
        self._studio.close()
        self._env.close()


def _row(answer: Any) -> Doubles:
    """The observations of a time step in a row."""
    return np.concatenate([np.ravel(part) for part in answer.observation.values()]).astype(np.float64)
