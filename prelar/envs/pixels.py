"""Tasks from pixels as gymnasium environments whose whole state can be written down in a few bytes.

An episode is a pure function of (seed, episode number, actions), so the state of an environment is just that
triple, and to restore it means to repeat the actions without drawing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from prelar.envs.simulator import Step
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME
from prelar.utils.processes import follow_parent

Image = npt.NDArray[np.uint8]
Actions = npt.NDArray[np.float32]


class Simulator(Protocol):
    """What an environment asks of a simulator; `prelar.envs.make_env` makes one.

    action_dim: numbers of an action. time_limit: simulator steps per episode. action_repeat: simulator steps
    that an action is applied for; the last one of an episode has what is left. succeeds: whether the task
    tells success.
    """

    action_dim: int
    time_limit: int
    action_repeat: int
    succeeds: bool

    def reset(self, seed: int, episode: int) -> Step:
        """Start an episode."""

    def step(self, action: npt.ArrayLike) -> Step:
        """Take one action (A,): the sum of its steps' rewards, success at any of them, the last state."""

    def replay(self, seed: int, episode: int, actions: Iterable[npt.ArrayLike]) -> Step:
        """Restore the exact state after `actions` of an episode, without drawing."""

    def render(self) -> Image:
        """Draw the present state: upright RGB uint8 (64, 64, 3)."""

    def close(self) -> None:
        """Free what the simulator holds."""


class EpisodeState(NamedTuple):
    """The whole state of an environment: its episode's number, and the actions (n, A) taken in it so far."""

    episode: int
    actions: Actions


class PixelEnv(gymnasium.Env[Image, Actions]):
    """One task from pixels: images uint8 (64, 64, 3), actions float32 (A,) in [-1, 1].

    Each `reset` starts the next episode of `seed`: numbers `first`, `first + stride`, …, so that several
    environments never share one; `options={"episode": n}` chooses the number. `reset(seed=…)` changes the
    seed and starts from `first` again. Episodes end by the simulator's time limit only, as truncation.
    Rewards are the simulator's own, summed over the steps that an action is applied for. `info["success"]`
    tells whether the task is solved after any of these steps; it is not there where a task tells no success.
    draws: False for policies that do not look: all images are black.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own form

    def __init__(
        self, simulator: Simulator, *, seed: int, first: int = 0, stride: int = 1, draws: bool = True
    ) -> None:
        self.render_mode = "rgb_array"
        self.observation_space = gymnasium.spaces.Box(0, 255, FRAME, np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (simulator.action_dim,), np.float32)
        self.action_repeat, self.succeeds = simulator.action_repeat, simulator.succeeds
        self._simulator, self._draws = simulator, draws
        self._seed = seed
        self._first, self._stride = first, stride
        self._next = first
        self._episode = first
        self._actions: list[Actions] = []
        self._seconds = {"simulation": 0.0, "rendering": 0.0}

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
        with self._timed("simulation"):
            step = self._simulator.reset(self._seed, self._episode)
        return self.render(), self._info(step)

    def step(self, action: Actions) -> tuple[Image, float, bool, bool, dict[str, Any]]:
        """Take one action, which is clipped to [-1, 1]."""
        taken = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
        with self._timed("simulation"):
            step = self._simulator.step(taken)
        self._actions.append(taken)
        return self.render(), step.reward, False, step.done, self._info(step)

    def _info(self, step: Step) -> dict[str, Any]:
        return {"success": step.success} if self.succeeds else {}

    def render(self) -> Image:
        """Draw the present state."""
        if not self._draws:
            return np.zeros(FRAME, np.uint8)
        with self._timed("rendering"):
            return self._simulator.render()

    def seconds(self) -> dict[str, float]:
        """Time spent so far, by what it was spent on."""
        return dict(self._seconds)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - begin

    def state(self) -> EpisodeState:
        """What `restore` needs to bring a fresh environment of the same seed to this very state."""
        empty = np.zeros((0, *(self.action_space.shape or ())), np.float32)
        return EpisodeState(self._episode, np.stack(self._actions) if self._actions else empty)

    def restore(self, state: EpisodeState) -> None:
        """Bring the environment to a state, bit for bit, without drawing."""
        self._episode, self._next = state.episode, state.episode + self._stride
        self._actions = list(state.actions)
        self._simulator.replay(self._seed, self._episode, self._actions)

    def restore_own(self, states: Sequence[EpisodeState]) -> None:
        """Restore this environment's entry of a whole vector's states."""
        self.restore(states[self._first])

    def close(self) -> None:
        """Free what the simulator holds."""
        self._simulator.close()


class Answer(NamedTuple):
    """What N environments answer to an action each.

    images uint8 (N, 64, 64, 3): what the next action is chosen by, the first image of the next episode where
    one ended. results uint8 (N, 64, 64, 3): what the action led to. rewards float32 (N,). ended, success bool
    (N,): whether the action ended the episode, and whether the task is solved at any of its steps, False
    where it tells no success.
    """

    images: Image
    results: Image
    rewards: npt.NDArray[np.float32]
    ended: npt.NDArray[np.bool_]
    success: npt.NDArray[np.bool_]


class Envs:
    """Environments that act together, each in a process of its own, or all in this one.

    Environment i of N plays the episodes i, i + N, i + 2·N, … of `seed`, and starts the next in the step that
    ends one. Actions are sent, and answered later, so that environments in other processes are simulated and
    drawn meanwhile; what they answer does not depend on where they are or when they are asked.
    """

    def __init__(
        self,
        make_simulator: Callable[[], Simulator],
        *,
        count: int,
        seed: int,
        processes: bool,
    ) -> None:
        home = os.getpid()

        def maker(index: int) -> Callable[[], PixelEnv]:
            def make() -> PixelEnv:
                if os.getpid() != home:
                    follow_parent(signal.SIGTERM, signal.SIGUSR1)
                return PixelEnv(make_simulator(), seed=seed, first=index, stride=count)

            return make

        self.count = count
        self._sent: Actions | None = None
        self._envs = _vector([maker(i) for i in range(count)], processes)
        with _deaths_told():
            self.succeeds: bool = self._envs.get_attr("succeeds")[0]

    def reset(self) -> Image:
        """Start every environment's first episode: images (N, 64, 64, 3)."""
        with _deaths_told():
            images, _ = self._envs.reset()
        return images

    def send(self, actions: Actions) -> None:
        """Give every environment its action, (N, A)."""
        if isinstance(self._envs, AsyncVectorEnv):
            with _deaths_told():
                self._envs.step_async(actions)
        self._sent = actions

    def receive(self) -> Answer:
        """Wait for the answers to what was sent."""
        with _deaths_told():
            if isinstance(self._envs, AsyncVectorEnv):
                found = self._envs.step_wait()
            else:
                assert self._sent is not None
                found = self._envs.step(self._sent)
        images, rewards, terminated, truncated, info = found
        ended = terminated | truncated
        success = ended & False
        if self.succeeds:
            success = np.where(ended, info.get("final_info", info)["success"], info["success"])
        results = images.copy()
        for index in np.flatnonzero(ended):
            results[index] = info["final_obs"][index]
        return Answer(images, results, rewards.astype(np.float32), ended, success.astype(np.bool_))

    def states(self) -> list[EpisodeState]:
        """The state of every environment, while no answer is awaited."""
        return list(self._call("state"))

    def restore(self, states: Sequence[EpisodeState]) -> None:
        """Bring every environment to its state, bit for bit, without drawing."""
        self._call("restore_own", states)

    def seconds(self) -> dict[str, float]:
        """Time spent so far by what it was spent on, mean over the environments."""
        each: Sequence[dict[str, float]] = self._call("seconds")
        return {name: sum(one[name] for one in each) / self.count for name in each[0]}

    def close(self) -> None:
        """Close the environments and end their processes, whatever they are doing."""
        if not isinstance(self._envs, AsyncVectorEnv):
            self._envs.close()
            return
        for process in self._envs.processes:
            process.kill()
            process.join()
        self._envs.closed = True

    def _call(self, name: str, *arguments: Any) -> Any:
        with _deaths_told():
            return self._envs.call(name, *arguments)


def _vector(makers: Sequence[Callable[[], PixelEnv]], processes: bool) -> SyncVectorEnv | AsyncVectorEnv:
    if not processes:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    multiprocessing.set_forkserver_preload([__name__])
    with _deaths_told():
        return AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP, context="forkserver")


@contextlib.contextmanager
def _deaths_told() -> Iterator[None]:
    """Turn what a pipe says whose other end is gone into one line."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError(
            "envs: the process of an environment died; start again to go on from the last snapshot, "
            "with fewer envs where memory is short"
        ) from None
