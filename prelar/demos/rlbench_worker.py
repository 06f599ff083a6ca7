"""One RLBench simulator in a process of its own: `python -m prelar.demos.rlbench_worker <pipe> <parent>`.

`prelar.demos.rlbench_pool` starts it and sends it requests. Lines of JSON come in by the standard input:
first the settings, then one request at a time.

    {"task", "variation", "seed", "path"}        one attempt at a demo, to be stored at path

Answers go out by the pipe with the given number, a line of JSON each: `{"ready": true}` once CoppeliaSim
runs, then one a request: `{"steps": n}` when the demo is stored, or `{"reason": words}`, with
`"unexpected": true` where RLBench does not report a failed demo, so that the scene may be damaged, and
`"loading": true` where the task could not be loaded. Instead of the settings, `{"count": tasks}` asks how
many variations tasks have, for which no CoppeliaSim is launched: `{"variations": {task: n}}`.

What CoppeliaSim prints goes to the standard output, the traceback of an unexpected error to the standard
error; both are the simulator's log. The process ends with its parent, whatever the simulator is doing, and at
once where CoppeliaSim crashes.

A demo is an `.npz`: uint8 (T, size, size, 3) per camera, and `actions` and `gripper` of
`prelar.demos.rlbench_folder`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import random
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar.demos.rlbench_folder import MOTIONS, step_arrays
from prelar.utils.parents import end_with_parent

ARRAYS = ("actions", "gripper")
BAD_DEMO = "Bad demo. "
FOLDERS = re.compile(r"(?:/[^\s/'\":]+)+/")
LONGEST = 300
ARM_MODES = {
    "joint_velocity": "JointVelocity",
    "joint_position": "JointPosition",
    "gripper_pose": "EndEffectorPoseViaPlanning",
}


def as_line(reason: str) -> str:
    """A reason as a line that names files without their folders."""
    return FOLDERS.sub("", " ".join(reason.split()))[:LONGEST]


def demo_arrays(demo: Sequence[Any], cameras: Sequence[str], action_mode: str) -> dict[str, npt.NDArray[Any]]:
    """Pictures and vectors of a demo. Raises `ValueError` where a step lacks one."""
    steps = [demo[number] for number in range(len(demo))]
    found = {}
    for camera in cameras:
        pictures = [getattr(step, f"{camera}_rgb") for step in steps]
        for number, picture in enumerate(pictures):
            if getattr(picture, "dtype", None) != np.uint8 or picture.shape != pictures[0].shape:
                raise ValueError(f"camera {camera}: no picture at step {number}")
        found[camera] = np.stack(pictures)
    motion, pose = (
        np.stack([getattr(step, name) for step in steps]) for name in (MOTIONS[action_mode], "gripper_pose")
    )
    opening = np.array([step.gripper_open for step in steps], dtype=np.float64)
    return {**found, **step_arrays(motion, pose, opening)}


def store_arrays(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write an `.npz`, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


class _LastBadDemo(logging.Handler):
    """Keeps the reason that RLBench logs when an attempt fails; what it raises then does not say it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.reason: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the words of one failure."""
        words = record.getMessage()
        if words.startswith(BAD_DEMO):
            self.reason = words.removeprefix(BAD_DEMO)


class Session:
    """A launched RLBench environment and the task that it holds."""

    def __init__(self, *, cameras: Sequence[str], size: int, renderer: str, action_mode: str) -> None:
        """Launch CoppeliaSim with RGB of `cameras` at `size` pixels and nothing else that costs time."""
        from pyrep.const import RenderMode
        from rlbench.action_modes import arm_action_modes
        from rlbench.action_modes.action_mode import MoveArmThenGripper
        from rlbench.action_modes.gripper_action_modes import Discrete
        from rlbench.environment import Environment
        from rlbench.observation_config import ObservationConfig

        config = ObservationConfig()
        config.set_all(False)
        config.gripper_open = config.gripper_pose = True
        setattr(config, MOTIONS[action_mode], True)
        for camera in cameras:
            shown = getattr(config, f"{camera}_camera")
            shown.rgb = True
            shown.image_size = [size, size]
            shown.render_mode = RenderMode[renderer.upper()]
        self._cameras = tuple(cameras)
        self._action_mode = action_mode
        self._log = _LastBadDemo()
        logging.getLogger().addHandler(self._log)
        logging.getLogger().setLevel(logging.INFO)
        mode = MoveArmThenGripper(getattr(arm_action_modes, ARM_MODES[action_mode])(), Discrete())
        self._environment = Environment(mode, obs_config=config, headless=True)
        self._environment.launch()
        self._name: str | None = None
        self._task: Any = None

    def task(self, name: str) -> Any:
        """The task environment of a task's file name; what is loaded already stays."""
        from rlbench.backend.utils import task_file_to_task_class

        if name != self._name:
            self._name = None
            self._task = self._environment.get_task(task_file_to_task_class(name))
            self._name = name
        return self._task

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What came of a request. Raises `OSError` where a demo cannot be stored.

        RLBench logs why a demo that was planned or acted failed; after any other failure the state of the
        scene is unknown.
        """
        self._log.reason = None
        loading = True
        random.seed(request["seed"])
        np.random.seed(request["seed"] % 2**32)
        try:
            task = self.task(request["task"])
            loading = False
            task.set_variation(request["variation"])
            demo = task.get_demos(1, live_demos=True, max_attempts=1)[0]
            arrays = demo_arrays(demo, self._cameras, self._action_mode)
        except Exception as error:
            if self._log.reason is not None:
                return {"reason": as_line(self._log.reason)}
            print(f"attempt {json.dumps(request)}:", file=sys.stderr)
            traceback.print_exc()
            reason = as_line(str(error) or type(error).__name__)
            return {"reason": reason, "unexpected": True, "loading": loading}
        store_arrays(Path(request["path"]), arrays)
        return {"steps": len(arrays["actions"])}

    def close(self) -> None:
        """Shut CoppeliaSim down."""
        self._environment.shutdown()


def count_variations(tasks: Sequence[str]) -> dict[str, int]:
    """How many variations tasks have; 1 where a task does not say it without a scene."""
    from rlbench.backend.utils import task_file_to_task_class

    counts = dict.fromkeys(tasks, 1)
    for task in tasks:
        with contextlib.suppress(Exception):
            counts[task] = int(task_file_to_task_class(task)(None, None).variation_count())
    return counts


def _crash_at_once() -> None:
    """Replace CoppeliaSim's own handler of a crash, which may never end."""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    faulthandler.enable()


def main() -> None:
    """Serve requests until the standard input ends."""
    pipe, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(pipe, False)
    end_with_parent(parent, signal.SIGKILL)
    with os.fdopen(pipe, "w", encoding="utf-8") as out:

        def send(**answer: Any) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        settings = json.loads(sys.stdin.readline())
        if "count" in settings:
            send(variations=count_variations(settings["count"]))
            return
        try:
            session = Session(**settings)
        except Exception as error:
            traceback.print_exc()
            send(reason=as_line(f"{type(error).__name__}: {error}"))
            return
        _crash_at_once()
        send(ready=True)
        for line in sys.stdin:
            try:
                send(**session.answer(json.loads(line)))
            except OSError as error:
                send(errno=error.errno, strerror=error.strerror)
        with contextlib.suppress(Exception):
            session.close()


if __name__ == "__main__":
    main()
