"""Meta-World tasks, with scripted experts and upright pictures.

Cameras that Meta-World mounts upside down are turned by 180 degrees.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar.config import PLAIN, View
from prelar.envs import gl
from prelar.envs.names import METAWORLD_SPEC, VERSION, check_camera, check_task
from prelar.envs.painter import Studio
from prelar.envs.simulator import Doubles, Image, episode_entropy
from prelar.envs.simulator import Simulator as Base
from prelar.utils.frames import SIZE

ACTION_DIM = METAWORLD_SPEC.action_dim
GRIPPER_DIM = 8
MAX_STEPS = METAWORLD_SPEC.time_limit
SCENERY = ("world", "tablelink", "RetainingWall")
"""Bodies whose geometries are behind what happens."""


def _metaworld() -> Any:
    """The metaworld package, imported once OpenGL is settled."""
    gl.ensure()
    import metaworld

    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
    return metaworld


class Simulator(Base):
    """One Meta-World task; other arguments as of every `prelar.envs.simulator.Simulator`.

    Observations are float64 (39,), Meta-World's state, the goal in its last three numbers. Rewards are its
    dense ones, 0 to 10 a step. An action is a hand displacement in x, y, z (units of 1 cm) and a gripper
    force.

    task: name such as `drawer-open`. camera: default of `render`. view: how pictures look.
    Raises `UserError` for an unknown task or camera, or a number out of range.
    """

    scripted = True

    def __init__(
        self,
        task: str,
        *,
        camera: str = "corner",
        width: int = SIZE,
        height: int = SIZE,
        time_limit: int | None = None,
        action_repeat: int | None = None,
        view: View = PLAIN,
    ) -> None:
        self.task = check_task(task)
        self.camera = check_camera(camera)
        super().__init__(
            METAWORLD_SPEC, width=width, height=height, time_limit=time_limit, action_repeat=action_repeat
        )
        self._env = _metaworld().ALL_V3_ENVIRONMENTS[self.task + VERSION]()
        self._env._partially_observable = False
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        self._policy: Any = None
        self._observation: Doubles = np.zeros(0)
        model = self._env.model
        owners = [model.body(body).name for body in model.geom_bodyid]
        scenery = np.flatnonzero(np.isin(owners, SCENERY))
        self._studio = Studio(model, view, backdrop=scenery.tolist(), fps=self.fps)

    def _start(self, seed: int, episode: int) -> Doubles:
        from metaworld.policies import ENV_POLICY_MAP

        # The observation space depends on the goal space, which some tasks settle only now.
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env.seed(episode_entropy(seed, episode))
        self._observation, _ = self._env.reset()
        policy: Any = ENV_POLICY_MAP[self.task + VERSION]
        self._policy = policy()
        self._studio.start(seed, episode)
        return self._observation

    def _advance(self, action: Doubles) -> tuple[Doubles, float, bool]:
        self._observation, reward, _, _, info = self._env.step(action)
        return self._observation, float(reward), bool(info["success"])

    def expert(self) -> npt.NDArray[np.float32]:
        """The scripted expert's action in the present state: float32 (4,) in [-1, 1]."""
        action = self._policy.get_action(self._observation)
        return np.clip(np.asarray(action, dtype=np.float32), -1, 1)

    @property
    def fps(self) -> float:
        """Steps in a second of simulated time."""
        return 1 / float(self._env.dt)

    @property
    def gripper(self) -> npt.NDArray[np.float32]:
        """The hand: float32 (8,) position x, y, z (m), quaternion x, y, z, w, opening 0 to 1."""
        hand = self._env.data.body("hand")
        w, x, y, z = hand.xquat
        return np.array([*hand.xpos, x, y, z, w, self._observation[3]], dtype=np.float32)

    def render(self, camera: str | None = None, width: int | None = None, height: int | None = None) -> Image:
        """Draw the present state: upright RGB uint8 (height, width, 3), antialiased."""
        return self._studio.render(
            lambda wide, high: self.draw(camera, wide, high), width or self.width, height or self.height
        )

    def draw(self, camera: str | None, width: int, height: int) -> Image:
        """Draw the present state as it comes, with jagged edges: upright RGB uint8 (height, width, 3)."""
        name = self.camera if camera is None else check_camera(camera)
        mounted = self._env.data.camera(name)
        upside_down = bool(mounted.xmat[7] < -0.1)
        return self._studio.draw(
            self._env.data, mounted.id, width, height, step=self.steps, turned=upside_down
        )

    def close(self) -> None:
        """Free the drawing contexts. The simulator is not used afterwards."""
        self._studio.close()
        self._env.close()
