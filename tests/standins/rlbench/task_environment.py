"""A loaded task, which draws one moving square and does what it is ordered to, as slowly as it is told."""

import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlbench.backend.exceptions import DemoError, TaskEnvironmentError
from rlbench.backend.observation import CAMERAS, Observation
from rlbench.backend.task import Task
from rlbench.demo import Demo
from rlbench.observation_config import ObservationConfig


class TaskEnvironment:
    """A loaded task, with the signatures of RLBench's."""

    def __init__(self, task: Task, obs_config: ObservationConfig) -> None:
        self._task = task
        self._obs_config = obs_config
        self._variation_number = 0
        self._spoilt = False
        cost(load=1)
        if order(f"load_{task.get_name()}") == "missing":
            model = f"/opt/rlbench/task_ttms/{task.get_name()}.ttm"
            raise FileNotFoundError(f"The following is not a valid task .ttm file: {model}")

    def get_name(self) -> str:
        """The task's name."""
        return self._task.get_name()

    def variation_count(self) -> int:
        """How many variations there are."""
        return self._task.variation_count()

    def set_variation(self, v: int) -> None:
        """Choose one."""
        if v >= self.variation_count():
            raise TaskEnvironmentError(
                f"Requested variation {v}, but there are only {self.variation_count()} variations."
            )
        self._variation_number = v

    def reset(self, demo: Any = None) -> tuple[list[str], Observation]:
        """Place the task anew."""
        return [self.get_name()], self._reset(order(self.get_name()))

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
        """Demos, or what was ordered. As in RLBench, the reason of a bad demo is logged, not raised."""
        assert live_demos and amount == 1
        for _ in range(max_attempts):
            random_seed = np.random.get_state()
            what = order(self.get_name())
            self._reset(what)
            try:
                demo = self._demo(what)
            except DemoError as error:
                logging.info("Bad demo. " + str(error))
                continue
            demo.random_seed = random_seed
            return [demo]
        raise RuntimeError("Could not collect demos. Maybe a problem with the task?")

    def _reset(self, what: str | None) -> Observation:
        """What may fail before a demo begins; a scene that was spoilt once stays so. Then one look at it."""
        cost(reset=1)
        if what == "hang":
            time.sleep(600)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while what == "spin":
            pass
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        self._spoilt |= what == "spoil"
        if self._spoilt:
            raise RuntimeError("Expected to be resetting 8 objects, but there were 7.")
        return self._observe(0, np.zeros(2, np.int64), np.zeros(7))

    def _demo(self, what: str | None) -> Demo:
        if what == "fail" or self.get_name() == "weighing_scales":
            raise DemoError("Demo was completed, but was not successful.", self._task)
        start, velocity = np.random.randint(0, 20, 2), np.random.normal(size=7)
        cost(plan=1)
        steps = range(8 + self._variation_number + int(COSTS.get("steps", 0)))
        observed = [self._observe(step, start, velocity) for step in steps]
        if what == "nan":
            observed[3].joint_velocities[:] = np.nan
        if what == "blind":
            observed[3].front_rgb = None
        return Demo(observed[:1] if what == "short" else observed, num_reset_attempts=1)

    def _observe(self, step: int, start: Any, velocity: Any) -> Observation:
        config, seen = self._obs_config, dict[str, Any]()
        pictures = masks = 0
        for number, camera in enumerate(CAMERAS):
            shown = getattr(config, f"{camera}_camera")
            width, height = shown.image_size
            if shown.rgb:
                seen[f"{camera}_rgb"] = picture(shown.image_size, (start + step) % (height - 16), number)
            if shown.depth:
                seen[f"{camera}_depth"] = np.full((height, width), 0.5)
            if shown.mask:
                seen[f"{camera}_mask"] = seen[f"{camera}_rgb"] / 255
            pictures += shown.rgb or shown.depth
            masks += shown.mask
        cost(step=1, picture=pictures, mask=masks)
        if config.joint_velocities:
            seen["joint_velocities"] = velocity * np.cos(step)
        if config.joint_positions:
            seen["joint_positions"] = np.arange(7) + step / 10
        if config.gripper_pose:
            seen["gripper_pose"] = np.array([step / 10, 0, 1, 0, 0, 0, 1])
        if config.gripper_open:
            seen["gripper_open"] = float(step < 4)
        return Observation(misc={"variation_index": self._variation_number}, **seen)


def picture(size: Any, corner: Any, camera: int) -> Any:
    """A square at `corner` on a ground that tells the camera, uint8 (size, size, 3)."""
    width, height = size
    drawn = np.full((height, width, 3), 20 * camera, np.uint8)
    drawn[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16] = 255
    return drawn


COSTS: dict[str, float] = json.loads(os.environ.get("RLBENCH_COSTS", "{}"))


def cost(**counts: int) -> None:
    """Sleep for as long as pieces of work take, each so many times."""
    if seconds := sum(COSTS.get(name, 0.0) * count for name, count in counts.items()):
        time.sleep(seconds)


def order(name: str) -> str | None:
    """The next line of the orders for `name`, which is thereby used up; `asked` tells who came for one."""
    folder = Path(os.environ.get("RLBENCH_ORDERS", "/nonexistent"))
    if not folder.exists():
        return None
    path = folder / name
    with (folder / "asked").open("a") as asked:
        fcntl.flock(asked, fcntl.LOCK_EX)  # simulators ask at the same time
        first, _, rest = path.read_text().partition("\n") if path.exists() else ("", "", "")
        path.write_text(rest)
        asked.write(f"{name}\n")
    return first or None
