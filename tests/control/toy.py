"""A world simple enough to be learnt in minutes on a CPU: a dot to be pushed to the right of the picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from prelar.envs.simulator import Step

ACTIONS = 2
SPEED = 0.1


class DotWorld:
    """A white dot in the unit square, moved by up to 0.1 per step; the reward is its horizontal position.

    It starts at a random place in the left half, drawn from (seed, episode). Success: to the right of 0.8. An
    action is applied for `action_repeat` steps, or to the time limit.
    """

    action_dim, succeeds = ACTIONS, True

    def __init__(self, time_limit: int = 20, action_repeat: int = 1) -> None:
        self.time_limit, self.action_repeat = time_limit, action_repeat
        self.steps = 0
        self.drawn = 0
        self.closed = False
        self._place = np.zeros(2)

    def reset(self, seed: int, episode: int) -> Step:
        self._place = np.random.default_rng([seed, episode]).uniform([0, 0], [0.5, 1])
        self.steps = 0
        return Step(self._place.copy(), 0.0, False, False)

    def step(self, action: npt.ArrayLike) -> Step:
        if self.steps >= self.time_limit:
            raise RuntimeError("the episode is over")
        taken = np.asarray(action, np.float32)
        reward, success = 0.0, False
        for _ in range(min(self.action_repeat, self.time_limit - self.steps)):
            self._place = np.clip(self._place + SPEED * taken.astype(np.float64), 0, 1)
            reward += float(self._place[0])
            success = success or bool(self._place[0] > 0.8)
            self.steps += 1
        return Step(self._place.copy(), reward, success, self.steps >= self.time_limit)

    def replay(self, seed: int, episode: int, actions: Iterable[npt.ArrayLike]) -> Step:
        answer = self.reset(seed, episode)
        for action in actions:
            answer = self.step(action)
        return answer

    def render(self) -> npt.NDArray[np.uint8]:
        self.drawn += 1
        image = np.zeros((64, 64, 3), np.uint8)
        column, row = (round(4 + 52 * x) for x in self._place)
        image[row : row + 8, column : column + 8] = 255
        return image

    def close(self) -> None:
        self.closed = True


class DotEnv(gymnasium.Env[npt.NDArray[np.uint8], npt.NDArray[np.float32]]):
    """The same world as a task of one's own, for stages, which take the name of one: `TASK`."""

    action_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    time_limit = 100

    def __init__(self) -> None:
        self._world = DotWorld(self.time_limit)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        self._world.reset(seed or 0, 0)
        return self._world.render(), {"success": False}

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        found = self._world.step(action)
        return self._world.render(), found.reward, False, found.done, {"success": found.success}


TASK = f"{__name__}:{DotEnv.__name__}"
