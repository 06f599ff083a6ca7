"""Demonstrations of the scripted experts of Meta-World."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar.config import PLAIN, View
from prelar.demos.episodes import ALIGNMENT, Array, Episode, Job
from prelar.envs import distractions, gl, metaworld, painter, simulator
from prelar.envs.metaworld import ACTION_DIM, GRIPPER_DIM, MAX_STEPS, Simulator
from prelar.envs.names import check_camera, check_task
from prelar.envs.painter import SUPERSAMPLING
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME, SIZE

FIRST_EPISODE = 1_000_000
"""The environment's episode that the first demonstration is: fine-tuning and evaluation come before it."""
TAIL = 10
"""Steps after its success until an episode ends."""


@dataclasses.dataclass(frozen=True)
class Metaworld:
    """Scripted experts of Meta-World.

    noise: standard deviation of the normal noise on each of the expert's actions, which are clipped to
    [-1, 1] after it; what is stored is the action that was taken. An episode ends some steps after its
    success. Goals differ from those of fine-tuning and evaluation under the same seed. view: how pictures
    look.
    """

    tasks: tuple[str, ...]
    episodes: int
    cameras: tuple[str, ...]
    noise: float
    keep_failures: bool
    seed: int
    view: View = PLAIN
    code = tuple(module.__name__ for module in (gl, simulator, painter, distractions, metaworld))
    packages = ("mujoco", "metaworld")

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(check_task(task) for task in self.tasks))
        for camera in self.cameras:
            check_camera(camera)
        for key, names in (("tasks", self.tasks), ("cameras", self.cameras)):
            if len(set(names)) < len(names):
                raise UserError(f"demos.{key} = {list(names)}: name each one once")

    @property
    def arrays(self) -> dict[str, int]:
        """Actions: hand displacement x, y, z (cm) and gripper force; gripper: as `Simulator.gripper`."""
        return {"actions": ACTION_DIM, "gripper": GRIPPER_DIM}

    @property
    def action_limit(self) -> float:
        """Actions are clipped."""
        return 1.0

    @property
    def solved_only(self) -> bool:
        """Unless failures are asked for."""
        return not self.keep_failures

    def jobs(self) -> list[Job]:
        """Every episode of every task, task after task."""
        return [Job(task, 0, episode) for task in self.tasks for episode in range(self.episodes)]

    def collect(self, job: Job) -> Episode:
        """Let the expert act; draw only an episode that is kept."""
        simulator = _simulator(job.task, self.view)
        actions, success = self._act(simulator, job)
        if not success and not self.keep_failures:
            reason = f"the expert did not solve the task in {len(actions)} steps"
            return Episode(job, success=False, fps=simulator.fps, reason=reason)
        frames = {camera: np.empty((len(actions) + 1, *FRAME), dtype=np.uint8) for camera in self.cameras}
        gripper = np.empty((len(actions) + 1, GRIPPER_DIM), dtype=np.float32)
        simulator.reset(self.seed, FIRST_EPISODE + job.episode)
        for moment in range(len(actions) + 1):
            if moment:
                simulator.step(actions[moment - 1])
            gripper[moment] = simulator.gripper
            for camera in self.cameras:
                frames[camera][moment] = simulator.render(camera, SIZE, SIZE)
        taken = np.concatenate([actions, np.zeros((1, ACTION_DIM), dtype=np.float32)])
        return Episode(
            job, frames, {"actions": taken, "gripper": gripper}, success=success, fps=simulator.fps
        )

    def _act(self, simulator: Simulator, job: Job) -> tuple[Array, bool]:
        """Actions of an episode, float32 (T - 1, 4), and whether they solve the task."""
        random = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(job.task.encode()), job.episode]))
        noise = random.normal(scale=self.noise, size=(MAX_STEPS, ACTION_DIM))
        simulator.reset(self.seed, FIRST_EPISODE + job.episode)
        actions: list[npt.NDArray[Any]] = []
        solved = None
        while len(actions) < MAX_STEPS and (solved is None or len(actions) < solved + TAIL):
            actions.append(np.clip(simulator.expert() + noise[len(actions)], -1, 1).astype(np.float32))
            if simulator.step(actions[-1]).success and solved is None:
                solved = len(actions)
        return np.stack(actions), solved is not None

    def files(self, job: Job) -> list[Path]:
        """None."""
        return []

    def attributes(self) -> dict[str, Any]:
        """The source and how it was asked."""
        source: dict[str, Any] = {"name": "metaworld", "noise": self.noise, "seed": self.seed}
        if self.view != PLAIN:
            source["view"] = self.view._asdict()
        side = SUPERSAMPLING * SIZE
        resize = f"drawn at {side}x{side}, means of {SUPERSAMPLING}x{SUPERSAMPLING} pixels"
        return {"source": source, "resize": resize, "alignment": ALIGNMENT}


@functools.lru_cache(maxsize=1)
def _simulator(task: str, view: View) -> Simulator:
    """The worker's simulator; a used one equals a fresh one."""
    return Simulator(task, view=view)
