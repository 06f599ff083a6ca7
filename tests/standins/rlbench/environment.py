"""An environment without a simulator: launches as CoppeliaSim does, and no better."""

import os
import signal
import subprocess
import sys
import time

from rlbench.action_modes.action_mode import MoveArmThenGripper
from rlbench.backend.task import Task
from rlbench.observation_config import ObservationConfig
from rlbench.task_environment import TaskEnvironment, cost, order

HELPER = "import time; time.sleep(600)"


def crash(number: int, frame: object) -> None:
    """As CoppeliaSim's handler of signal 11: a message, then a way out that does not always end."""
    print(f"Error: signal {number}:", file=sys.stderr, flush=True)
    time.sleep(600)


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
        randomize_every: object = None,
        frequency: int = 1,
        visual_randomization_config: object = None,
        dynamics_randomization_config: object = None,
        attach_grasped_objects: bool = True,
        shaped_rewards: bool = False,
        arm_max_velocity: float = 1.0,
        arm_max_acceleration: float = 4.0,
    ) -> None:
        assert isinstance(action_mode, MoveArmThenGripper) and headless and obs_config is not None
        self._config = obs_config
        self._launched = False

    def launch(self) -> None:
        """Needs what CoppeliaSim needs; may fail, or start a helper process that outlives it."""
        root = os.environ["COPPELIASIM_ROOT"]
        if not os.environ.get("DISPLAY") or root not in os.environ["LD_LIBRARY_PATH"].split(":"):
            os.kill(os.getpid(), signal.SIGABRT)
        cost(launch=1)
        what = order("launch")
        if what == "fail":
            raise RuntimeError("no licence")
        if what == "helper":
            subprocess.Popen([sys.executable, "-c", HELPER], close_fds=False)
        signal.signal(signal.SIGSEGV, crash)
        self._launched = True

    def get_task(self, task_class: type[Task]) -> TaskEnvironment:
        """Load a task."""
        assert self._launched
        return TaskEnvironment(task_class(self, self), self._config)

    def shutdown(self) -> None:
        """End it."""
        assert self._launched
        self._launched = False
