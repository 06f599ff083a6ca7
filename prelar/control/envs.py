"""Tasks from pixels as gymnasium environments whose whole state can be written down in a few bytes.

An episode is a pure function of (seed, episode number, actions), so the state of an environment is just that
triple, and to restore it means to repeat the actions without drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from prelar.sim import ACTION_DIM, Step

SIZE = 64

Image = npt.NDArray[np.uint8]
Actions = npt.NDArray[np.float32]


class World(Protocol):
    """What an environment asks of a simulator; `prelar.sim.Simulator` is one."""

    time_limit: int

    def reset(self, seed: int, episode: int) -> Step:
        """Start an episode."""

    def step(self, action: npt.ArrayLike) -> Step:
        """Take one action (A,)."""

    def replay(self, seed: int, episode: int, actions: Iterable[npt.ArrayLike]) -> Step:
        """Restore the exact state after `actions` of an episode, without drawing."""

    def render(self) -> Image:
        """Draw the present state: upright RGB uint8 (64, 64, 3)."""

    def close(self) -> None:
        """Free what the simulator holds."""


class Purpose(IntEnum):
    """What episodes are for. Each purpose draws its goals from a stream of its own."""

    TRAIN = 0
    CURVE = 1
    EVALUATE = 2
    PROBE = 3
    OFFLINE = 4


class EpisodeState(NamedTuple):
    """The whole state of an environment: its episode's number, and the actions (n, A) taken in it so far."""

    episode: int
    actions: Actions


def episode_seed(seed: int, purpose: Purpose) -> int:
    """The simulator's seed for all episodes of one purpose in a run with `seed`."""
    return int(np.random.SeedSequence([seed, int(purpose)]).generate_state(1)[0])


class PixelEnv(gymnasium.Env[Image, Actions]):
    """One task from pixels: images uint8 (64, 64, 3), actions float32 (A,) in [-1, 1].

    Each `reset` starts the next episode of `seed`: numbers `first`, `first + stride`, …, so that several
    environments never share one; `options={"episode": n}` chooses the number. `reset(seed=…)` changes the
    seed and starts from `first` again. Episodes end by the world's time limit only, as truncation. Rewards
    are the world's own. `info["success"]` tells whether the task is solved in this very state.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own form

    def __init__(
        self, world: World, *, seed: int, first: int = 0, stride: int = 1, action_dim: int = ACTION_DIM
    ) -> None:
        self.render_mode = "rgb_array"
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self._world = world
        self._seed = seed
        self._first, self._stride = first, stride
        self._next = first
        self._episode = first
        self._actions: list[Actions] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Image, dict[str, Any]]:
        """Start an episode and draw its first image."""
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._next = seed, self._first
        self._episode = (options or {}).get("episode", self._next)
        self._next = self._episode + self._stride
        self._actions = []
        step = self._world.reset(self._seed, self._episode)
        return self._world.render(), {"success": step.success}

    def step(self, action: Actions) -> tuple[Image, float, bool, bool, dict[str, Any]]:
        """Take one action, which is clipped to [-1, 1]."""
        taken = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
        step = self._world.step(taken)
        self._actions.append(taken)
        return self._world.render(), step.reward, False, step.done, {"success": step.success}

    def render(self) -> Image:
        """Draw the present state."""
        return self._world.render()

    def state(self) -> EpisodeState:
        """What `restore` needs to bring a fresh environment of the same seed to this very state."""
        empty = np.zeros((0, *(self.action_space.shape or ())), np.float32)
        return EpisodeState(self._episode, np.stack(self._actions) if self._actions else empty)

    def restore(self, state: EpisodeState) -> None:
        """Bring the environment to a state, bit for bit, without drawing."""
        self._episode, self._next = state.episode, state.episode + self._stride
        self._actions = list(state.actions)
        self._world.replay(self._seed, self._episode, self._actions)

    def restore_own(self, states: Sequence[EpisodeState]) -> None:
        """Restore this environment's entry of a whole vector's states."""
        self.restore(states[self._first])

    def close(self) -> None:
        """Free what the world holds."""
        self._world.close()


def make_envs(
    make_world: Callable[[], World], *, count: int, seed: int, action_dim: int = ACTION_DIM
) -> SyncVectorEnv:
    """`count` environments as one, each started anew in the step that ends its episode.

    Environment i plays the episodes i, i + count, i + 2 · count, … of `seed`. `call("state")` and
    `call("restore_own", states)` save and restore all of them. The image that ended an episode stands in
    `info["final_obs"]`.
    """

    def maker(index: int) -> Callable[[], PixelEnv]:
        return lambda: PixelEnv(make_world(), seed=seed, first=index, stride=count, action_dim=action_dim)

    return SyncVectorEnv([maker(i) for i in range(count)], autoreset_mode=AutoresetMode.SAME_STEP)
