"""An environment without a simulator: it draws one moving square, and does what it is ordered to."""

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlbench.action_modes.action_mode import MoveArmThenGripper
from rlbench.backend.task import Task
from rlbench.demo import Demo
from rlbench.observation_config import CAMERAS, ObservationConfig


class Environment:
    """The environment, with the signature of RLBench's."""

    def __init__(
        self,
        action_mode: MoveArmThenGripper,
        dataset_root: str = "",
        obs_config: ObservationConfig | None = None,
        headless: bool = False,
        static_positions: bool = False,
        robot_setup: str = "panda",
    ) -> None:
        assert isinstance(action_mode, MoveArmThenGripper) and headless and obs_config is not None
        self._config = obs_config
        self._launched = False

    def launch(self) -> None:
        """Needs what CoppeliaSim needs."""
        root = os.environ["COPPELIASIM_ROOT"]
        if not os.environ.get("DISPLAY") or root not in os.environ["LD_LIBRARY_PATH"].split(":"):
            os.kill(os.getpid(), signal.SIGABRT)
        if order("launch") == "fail":
            raise RuntimeError("no licence")
        self._launched = True

    def get_task(self, task_class: type[Task]) -> "TaskEnvironment":
        """Load a task."""
        assert self._launched
        return TaskEnvironment(task_class(self, self), self._config)

    def shutdown(self) -> None:
        """End it."""
        assert self._launched
        self._launched = False


class TaskEnvironment:
    """A loaded task, with the signatures of RLBench's."""

    def __init__(self, task: Task, config: ObservationConfig) -> None:
        self._task = task
        self._config = config
        self._variation = 0

    def get_name(self) -> str:
        """The task's name."""
        return self._task.get_name()

    def variation_count(self) -> int:
        """How many variations there are."""
        return self._task.variation_count()

    def set_variation(self, v: int) -> None:
        """Choose one."""
        if v >= self.variation_count():
            raise ValueError(f"variation {v} of {self.variation_count()}")
        self._variation = v

    def get_demos(
        self,
        amount: int,
        live_demos: bool = False,
        image_paths: bool = False,
        callable_each_step: Callable[[Any], None] | None = None,
        max_attempts: int = 10,
        random_selection: bool = True,
        from_episode_number: int = 0,
    ) -> list[Demo]:
        """Demos, or what was ordered."""
        assert live_demos and amount == 1
        for _ in range(max_attempts):
            what = order(self.get_name())
            if what == "hang":
                time.sleep(600)
            if what == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            if what == "fail" or self.get_name() == "weighing_scales":
                logging.info("Bad demo. Demo was completed, but was not successful.")
                continue
            return [self._demo()]
        raise RuntimeError("Could not collect demos. Maybe a problem with the task?")

    def _demo(self) -> Demo:
        start, velocity = np.random.randint(0, 20, 2), np.random.normal(size=7)
        return Demo([self._observe(step, start, velocity) for step in range(8 + self._variation)])

    def _observe(self, step: int, start: Any, velocity: Any) -> SimpleNamespace:
        seen: dict[str, Any] = {"joint_velocities": None, "gripper_pose": None, "gripper_open": None}
        for number, camera in enumerate(CAMERAS):
            shown = getattr(self._config, f"{camera}_camera")
            seen[f"{camera}_rgb"] = picture(shown.image_size, start + step, number) if shown.rgb else None
        if self._config.joint_velocities:
            seen["joint_velocities"] = velocity * np.cos(step)
        if self._config.gripper_pose:
            seen["gripper_pose"] = np.array([step / 10, 0, 1, 0, 0, 0, 1])
        if self._config.gripper_open:
            seen["gripper_open"] = float(step < 4)
        return SimpleNamespace(**seen)


def picture(size: Any, corner: Any, camera: int) -> Any:
    """A square at `corner` on a ground that tells the camera, uint8 (size, size, 3)."""
    width, height = size
    drawn = np.full((height, width, 3), 20 * camera, np.uint8)
    drawn[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16] = 255
    return drawn


def order(name: str) -> str | None:
    """The next line of the orders for `name`, which is thereby used up."""
    path = Path(os.environ.get("RLBENCH_ORDERS", "/nonexistent")) / name
    if not path.exists():
        return None
    first, _, rest = path.read_text().partition("\n")
    path.write_text(rest)
    return first or None
