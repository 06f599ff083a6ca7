"""What the simulators of all suites share: episodes that repeat exactly, steps of a held action, replay.

An episode is a pure function of (task, seed, episode number, actions): a used simulator gives the same bits
as a fresh one. States cannot be saved and restored exactly in mid-episode everywhere; `Simulator.replay`
instead repeats the actions from the start, without drawing.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from prelar.envs.names import EnvSpec
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE

Doubles = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]


class Step(NamedTuple):
    """What the simulator answers to a reset or an action.

    observation: float64 (D,), the suite's own state as one row; not for pixel agents.
    reward: the suite's own reward, summed over the steps of the action; 0 after a reset.
    success: whether the task is solved in the state of any of these steps; False where a suite tells none.
    done: whether the time limit is reached. Episodes do not end on success.
    """

    observation: Doubles
    reward: float
    success: bool
    done: bool


class Simulator(abc.ABC):
    """One task of a suite.

    spec: what the task is. width, height: defaults of `render`. time_limit: simulator steps per episode, at
    most the spec's, which None means. action_repeat: of these, how many an action is applied for, None: the
    spec's; the last one of an episode has what is left. Raises `UserError` for a number out of range.

    succeeds: whether the task tells success. scripted: whether there is an expert, and a gripper to follow.
    """

    scripted = False

    def __init__(
        self,
        spec: EnvSpec,
        *,
        width: int = SIZE,
        height: int = SIZE,
        time_limit: int | None = None,
        action_repeat: int | None = None,
    ) -> None:
        self.action_dim, self.succeeds = spec.action_dim, spec.succeeds
        self.time_limit = spec.time_limit if time_limit is None else time_limit
        self.action_repeat = spec.action_repeat if action_repeat is None else action_repeat
        if not 1 <= self.time_limit <= spec.time_limit:
            raise UserError(f"time_limit = {time_limit}: choose 1 to {spec.time_limit} steps")
        if self.action_repeat < 1:
            raise UserError(f"action_repeat = {action_repeat}: choose 1 step or more")
        self.width, self.height = width, height
        self.steps = 0
        self._started = False

    @abc.abstractmethod
    def _start(self, seed: int, episode: int) -> Doubles:
        """Start an episode; returns its first observation."""

    @abc.abstractmethod
    def _advance(self, action: Doubles) -> tuple[Doubles, float, bool]:
        """One simulator step under an action (A,) in [-1, 1]: observation, reward and success."""

    @abc.abstractmethod
    def render(self, *, width: int | None = None, height: int | None = None) -> Image:
        """Draw the present state: upright RGB uint8 (height, width, 3)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free what the simulator holds. It is not used afterwards."""

    @property
    @abc.abstractmethod
    def fps(self) -> float:
        """Simulator steps in a second of simulated time."""

    def expert(self) -> npt.NDArray[np.float32]:
        """The scripted expert's action in the present state: float32 (A,) in [-1, 1]."""
        raise NotImplementedError

    @property
    def gripper(self) -> npt.NDArray[np.float32]:
        """The hand: float32 (8,) position x, y, z (m), quaternion x, y, z, w, opening 0 to 1."""
        raise NotImplementedError

    def reset(self, seed: int, episode: int) -> Step:
        """Start episode `episode` of `seed`: the same two numbers give the same goal and the same states."""
        observation = self._start(seed, episode)
        self.steps, self._started = 0, True
        return Step(observation, 0.0, False, False)

    def step(self, action: npt.ArrayLike) -> Step:
        """Take one action (A,), for `action_repeat` simulator steps.

        It is rounded to float32 and clipped to [-1, 1], so that stored actions replay exactly. Raises
        `ValueError` for another shape or a number that is not finite, `RuntimeError` past the time limit.
        """
        if not self._started or self.steps >= self.time_limit:
            raise RuntimeError("the episode is over or was never started; call reset")
        taken = np.asarray(action, dtype=np.float32)
        if taken.shape != (self.action_dim,) or not np.isfinite(taken).all():
            raise ValueError(f"action {action!r}: need {self.action_dim} finite numbers")
        applied = np.clip(taken, -1, 1).astype(np.float64)
        total, success = 0.0, False
        for _ in range(min(self.action_repeat, self.time_limit - self.steps)):
            observation, reward, solved = self._advance(applied)
            total += reward
            success = success or solved
            self.steps += 1
        return Step(observation, total, success, self.steps >= self.time_limit)

    def replay(self, seed: int, episode: int, actions: Iterable[npt.ArrayLike]) -> Step:
        """Restore the exact state after `actions` of an episode, without drawing."""
        answer = self.reset(seed, episode)
        for action in actions:
            answer = self.step(action)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stretch(action: Doubles, low: Doubles, high: Doubles) -> Doubles:
    """An action in [-1, 1] brought to bounds of its own, which rounding does not let it pass."""
    return np.clip(low + (action + 1) / 2 * (high - low), low, high)


def episode_entropy(seed: int, episode: int) -> int:
    """The 32 bits that a suite's own generator is seeded with for an episode."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
