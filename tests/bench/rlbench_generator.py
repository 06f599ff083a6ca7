"""The way in which RLBench's own `rlbench-generate-dataset` works, against the stand-ins for its classes.

`python -m tests.bench.rlbench_generator FOLDER PROCESSES EPISODES TASK…`. As read off its source: a process
takes a task and variation and makes all its episodes; it loads the task twice and resets it once more than is
needed; every camera gives RGB, depth, point cloud and mask; all but the point cloud are saved as PNG files,
while no other process saves.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prelar.envs.names import RLBENCH_CAMERAS

SIZE = 64
DEPTH_SCALE = 2**24 - 1


def save(demo: Any, folder: Path) -> None:
    """An episode as PNG files, and the rest of it as a pickle."""
    for number in range(len(demo)):
        step = demo[number]
        for camera in RLBENCH_CAMERAS:
            for kind in ("rgb", "depth", "mask"):
                picture = getattr(step, f"{camera}_{kind}")
                if kind == "depth":
                    whole = np.floor(picture * DEPTH_SCALE + 0.5).astype(np.uint32)
                    picture = np.stack([whole >> 16, whole >> 8 & 255, whole & 255], axis=-1)
                if kind == "mask":
                    picture = picture * 255
                place = folder / f"{camera}_{kind}"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(place / f"{number}.png")
                setattr(step, f"{camera}_{kind}", None)
    with (folder / "low_dim_obs.pkl").open("wb") as handle:
        pickle.dump(demo, handle)


def work(root: Path, episodes: int, tasks: list[str], following: Any, saving: Any) -> None:
    """What each process does."""
    from rlbench.action_modes.action_mode import MoveArmThenGripper
    from rlbench.action_modes.arm_action_modes import JointVelocity
    from rlbench.action_modes.gripper_action_modes import Discrete
    from rlbench.backend.utils import task_file_to_task_class
    from rlbench.environment import Environment
    from rlbench.observation_config import ObservationConfig

    config = ObservationConfig()
    config.set_all(True)
    for camera in RLBENCH_CAMERAS:
        getattr(config, f"{camera}_camera").image_size = [SIZE, SIZE]
    mode = MoveArmThenGripper(JointVelocity(), Discrete())
    environment = Environment(mode, obs_config=config, headless=True)
    environment.launch()
    while True:
        with following.get_lock():
            if following.value == len(tasks):
                break
            name = tasks[following.value]
            following.value += 1
            environment.get_task(task_file_to_task_class(name))
        task = environment.get_task(task_file_to_task_class(name))
        task.set_variation(0)
        task.reset()
        for episode in range(episodes):
            (demo,) = task.get_demos(amount=1, live_demos=True)
            with saving:
                save(demo, root / name / "variation0" / "episodes" / f"episode{episode}")
    environment.shutdown()


def main() -> None:
    """Make a data set of the first variation of some tasks."""
    root, processes, episodes, *tasks = sys.argv[1:]
    following, saving = multiprocessing.Value("i", 0), multiprocessing.Lock()
    given = (Path(root), int(episodes), tasks, following, saving)
    running = [multiprocessing.Process(target=work, args=given) for _ in range(int(processes))]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode for process in running))


if __name__ == "__main__":
    main()
