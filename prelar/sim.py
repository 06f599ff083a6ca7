"""Meta-World tasks as exactly repeatable episodes, with scripted experts and fast upright images.

An episode is a pure function of (task, seed, episode number, actions): a used simulator gives the same bits
as a fresh one. MuJoCo's state cannot be saved and restored exactly in mid-episode; `Simulator.replay` instead
repeats the actions from the start, without drawing.

Images come from MuJoCo's own renderer without multisampling, shadows and reflections, which is an order of
magnitude faster in software than gymnasium's `render()`. Cameras that Meta-World mounts upside down are
turned by 180 degrees.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prelar import gl
from prelar.errors import UserError

if TYPE_CHECKING:
    import mujoco

Floats = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

VERSION = "-v3"
ACTION_DIM = 4
GRIPPER_DIM = 8
MAX_STEPS = 500
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
_MAX_GEOMETRIES = 1000


class Step(NamedTuple):
    """What the simulator answers to a reset or an action.

    observation: float64 (39,), Meta-World's state, the goal in its last three numbers; not for pixel agents.
    reward: Meta-World's dense reward, 0 to 10; 0 after a reset.
    success: whether the task is solved in this very state.
    done: whether the time limit is reached. Episodes do not end on success.
    """

    observation: Floats
    reward: float
    success: bool
    done: bool


def task_names() -> list[str]:
    """Names of all tasks, without Meta-World's version suffix, sorted."""
    return sorted(name.removesuffix(VERSION) for name in _metaworld().ALL_V3_ENVIRONMENTS)


def check_task(task: str) -> str:
    """The task's name without version suffix. Raises `UserError` with the nearest names if unknown."""
    return _known("task", task.removesuffix(VERSION), task_names())


def check_camera(camera: str) -> str:
    """The camera's name. Raises `UserError` with the nearest names if unknown."""
    return _known("camera", camera, list(CAMERAS))


def _known(kind: str, name: str, names: list[str]) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise UserError(f"{kind} = {name!r}: Meta-World has none of this name; did you mean {', '.join(close)}?")


def _metaworld() -> Any:
    """The metaworld package, imported once OpenGL is settled."""
    gl.ensure()
    import metaworld

    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
    return metaworld


class Simulator:
    """One Meta-World task.

    task: name such as `drawer-open`. camera, width, height: defaults of `render`.
    time_limit: steps per episode, at most 500. Raises `UserError` for an unknown task or camera.
    """

    def __init__(
        self,
        task: str,
        *,
        camera: str = "corner",
        width: int = 64,
        height: int = 64,
        time_limit: int = MAX_STEPS,
    ) -> None:
        self.task = check_task(task)
        self.camera = check_camera(camera)
        self.width, self.height = width, height
        if not 1 <= time_limit <= MAX_STEPS:
            raise UserError(f"time_limit = {time_limit}: choose 1 to {MAX_STEPS} steps")
        self.time_limit = time_limit
        self.steps = 0
        self._env = _metaworld().ALL_V3_ENVIRONMENTS[self.task + VERSION]()
        self._env._partially_observable = False
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._policy: Any = None
        self._observation: Floats = np.zeros(0)
        _plain_drawing(self._env.model)

    def reset(self, seed: int, episode: int) -> Step:
        """Start episode `episode` of `seed`: the same two numbers give the same goal and the same states."""
        from metaworld.policies import ENV_POLICY_MAP

        # The observation space depends on the goal space, which some tasks settle only now.
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env.seed(int(np.random.SeedSequence([seed, episode]).generate_state(1)[0]))
        self._observation, _ = self._env.reset()
        policy: Any = ENV_POLICY_MAP[self.task + VERSION]
        self._policy = policy()
        self.steps = 0
        return Step(self._observation, 0.0, False, False)

    def step(self, action: npt.ArrayLike) -> Step:
        """Take one action: (4,) hand displacement in x, y, z (units of 1 cm) and gripper force.

        It is rounded to float32 and clipped to [-1, 1], so that stored actions replay exactly. Raises
        `ValueError` for another shape or a number that is not finite, `RuntimeError` past the time limit.
        """
        if self._policy is None or self.steps >= self.time_limit:
            raise RuntimeError("the episode is over or was never started; call reset")
        taken = np.asarray(action, dtype=np.float32)
        if taken.shape != (ACTION_DIM,) or not np.isfinite(taken).all():
            raise ValueError(f"action {action!r}: need {ACTION_DIM} finite numbers")
        self._observation, reward, _, _, info = self._env.step(np.clip(taken, -1, 1).astype(np.float64))
        self.steps += 1
        return Step(self._observation, float(reward), bool(info["success"]), self.steps >= self.time_limit)

    def replay(self, seed: int, episode: int, actions: Iterable[npt.ArrayLike]) -> Step:
        """Restore the exact state after `actions` of an episode, without drawing."""
        answer = self.reset(seed, episode)
        for action in actions:
            answer = self.step(action)
        return answer

    def expert(self) -> npt.NDArray[np.float32]:
        """The scripted expert's action in the present state: float32 (4,) in [-1, 1]."""
        action = self._policy.get_action(self._observation)
        return np.clip(np.asarray(action, dtype=np.float32), -1, 1)

    @property
    def gripper(self) -> npt.NDArray[np.float32]:
        """The hand: float32 (8,) position x, y, z (m), quaternion x, y, z, w, opening 0 to 1."""
        hand = self._env.data.body("hand")
        w, x, y, z = hand.xquat
        return np.array([*hand.xpos, x, y, z, w, self._observation[3]], dtype=np.float32)

    def render(self, camera: str | None = None, width: int | None = None, height: int | None = None) -> Image:
        """Draw the present state: upright RGB uint8 (height, width, 3)."""
        name = self.camera if camera is None else check_camera(camera)
        renderer = self._renderer(width or self.width, height or self.height)
        renderer.update_scene(self._env.data, name)
        image = renderer.render()
        upside_down = self._env.data.camera(name).xmat[7] < -0.1
        return np.ascontiguousarray(image[::-1, ::-1]) if upside_down else image

    def _renderer(self, width: int, height: int) -> mujoco.Renderer:
        import mujoco

        if (width, height) not in self._renderers:
            screen = self._env.model.vis.global_
            screen.offwidth, screen.offheight = max(screen.offwidth, width), max(screen.offheight, height)
            renderer = mujoco.Renderer(self._env.model, height, width, max_geom=_MAX_GEOMETRIES)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
            self._renderers[width, height] = renderer
        return self._renderers[width, height]

    def close(self) -> None:
        """Free the drawing contexts. The simulator is not used afterwards."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._env.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _plain_drawing(model: mujoco.MjModel) -> None:
    """Turn off what makes software drawing slow: multisampling and shadow maps."""
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
