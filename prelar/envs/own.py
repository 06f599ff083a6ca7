"""Environments of the user's own: any of gymnasium's that gives pixels, or can render, and takes numbers.

Named in params.yaml as `module:Class`, a class or a function that makes one, or by an entry point of the
group `prelar.envs`. It is called with `render_mode="rgb_array"` where it takes that.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import gymnasium
import numpy as np
from PIL import Image as Picture

from prelar.config import PLAIN, View
from prelar.envs.names import OWN_ENVS, EnvSpec
from prelar.envs.simulator import Doubles, Image, episode_entropy, stretch
from prelar.envs.simulator import Simulator as Base
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.own import load_own

TIME_LIMIT, FPS = 1000, 20.0
"""Of environments that do not tell theirs."""


class Simulator(Base):
    """An environment of gymnasium as every `prelar.envs.simulator.Simulator`.

    Its pictures are its observations, where these are uint8 (H, W, 3), or else what it renders, brought to
    the size that is asked. Its states are its observations in a row, of a `Dict` or `Tuple` one part after
    another. Actions in [-1, 1] are stretched to its own bounds, and rounded where it takes integers.
    Attributes of the environment tell what travels with it, as far as it has them: `action_repeat`, else 1;
    `time_limit`, else its spec's `max_episode_steps`, else 1,000; and what is rendered,
    `metadata["render_fps"]`. It tells success where `info` has "success" from the reset on. After it
    terminates its last state stays, without reward, to the time limit.

    The same seed and actions have to give the same episode. Raises `UserError` where it cannot be imported,
    has no pixels or no bounded actions in a row, or where a view is asked for, of which it knows nothing; and
    where it truncates an episode before the time limit, or a reward is not finite.
    """

    def __init__(
        self,
        task: str,
        *,
        time_limit: int | None = None,
        action_repeat: int | None = None,
        view: View = PLAIN,
    ) -> None:
        if view != PLAIN:
            raise UserError(
                f"task = {task}: an environment of your own; set renderer to fast, distract to none"
            )
        self.task = task
        self._env = _make(task)
        space = self._env.action_space
        if not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and space.is_bounded()):
            raise UserError(f"task = {task}: its actions are {space}; give it a bounded Box in one dimension")
        self._low, self._high = space.low.astype(np.float64), space.high.astype(np.float64)
        observed = self._env.observation_space
        self._sees = observed.dtype == np.uint8 and len(observed.shape or ()) == 3 and observed.shape[-1] == 3  # type: ignore[index]
        if not self._sees and self._env.render_mode != "rgb_array":
            raise UserError(
                f"task = {task}: no pixels; give it observations uint8 (H, W, 3) or render_mode rgb_array"
            )
        self._observation, info = self._env.reset(seed=0)
        spec = self._env.spec
        limit = getattr(self._env.unwrapped, "time_limit", spec and spec.max_episode_steps) or TIME_LIMIT
        repeat = getattr(self._env.unwrapped, "action_repeat", 1)
        own = EnvSpec(len(self._low), int(limit), int(repeat), "success" in info)
        super().__init__(own, time_limit=time_limit, action_repeat=action_repeat)
        self._ended = False

    def _start(self, seed: int, episode: int) -> Doubles:
        self._observation, _ = self._env.reset(seed=episode_entropy(seed, episode))
        self._ended = False
        return self._row()

    def _advance(self, action: Doubles) -> tuple[Doubles, float, bool]:
        reward: Any = 0.0
        if not self._ended:
            wide, kind = stretch(action, self._low, self._high), self._env.action_space.dtype
            taken = (np.rint(wide) if np.issubdtype(kind, np.integer) else wide).astype(kind)
            self._observation, reward, self._ended, truncated, self._info = self._env.step(taken)
            done = self.steps + 1
            if not math.isfinite(reward):
                raise UserError(
                    f"task = {self.task}: reward {reward} at step {done}; make it a finite number"
                )
            if truncated and not self._ended and done < self.time_limit:
                raise UserError(
                    f"task = {self.task}: truncates an episode after {done} steps of {self.time_limit}; "
                    f"set time_limit to {done} at most, or let it terminate"
                )
        return self._row(), float(reward), bool(self._info.get("success"))

    def _row(self) -> Doubles:
        """The present observation as one row."""
        space, flat = self._env.observation_space, self._observation
        if isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
            flat = gymnasium.spaces.flatten(space, flat)
        return np.ravel(flat).astype(np.float64)

    @property
    def fps(self) -> float:
        """Steps in a second, as the environment's metadata tell; 20 where they do not."""
        return float(self._env.metadata.get("render_fps") or FPS)

    def render(self, *, width: int | None = None, height: int | None = None) -> Image:
        """The present picture, brought to a size without aliasing: RGB uint8 (height, width, 3)."""
        drawn = self._observation if self._sees else self._env.render()
        found = np.asarray(drawn)
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[-1] != 3:
            raise UserError(
                f"task = {self.task}: renders {found.dtype} {found.shape}; make it uint8 (H, W, 3)"
            )
        size = (width or self.width, height or self.height)
        return np.array(Picture.fromarray(found).resize(size, Picture.Resampling.BOX))

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def code_digests(task: str) -> dict[str, str]:
    """sha256 of the source of the module that a task comes from, by its name."""
    return files.code_digests(load_own("task", task, OWN_ENVS).__module__)


def _make(task: str) -> gymnasium.Env[Any, Any]:
    """The environment that a task names."""
    factory = load_own("task", task, OWN_ENVS)
    takes = inspect.signature(factory).parameters
    settings = {"render_mode": "rgb_array"} if "render_mode" in takes else {}
    env = factory(**settings)
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"task = {task}: makes a {type(env).__name__}; make it a gymnasium.Env")
    return env
