"""Meta-World tasks as exactly repeatable episodes, with scripted experts and fast upright images.

An episode is a pure function of (task, seed, episode number, actions): a used simulator gives the same bits
as a fresh one. MuJoCo's state cannot be saved and restored exactly in mid-episode; `Simulator.replay` instead
repeats the actions from the start, without drawing.

Images are drawn without shadows and reflections, which is an order of magnitude faster in software than
gymnasium's `render()`, and against jagged edges at twice their size: each pixel is the mean of 2x2 drawn ones
in integers, the same on every machine that draws the same. Cameras that Meta-World mounts upside down are
turned by 180 degrees.
"""

from __future__ import annotations

import atexit
import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture

from prelar.envs import gl
from prelar.envs.names import VERSION, check_camera, check_task
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE

if TYPE_CHECKING:
    import mujoco

Doubles = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

ACTION_DIM = 4
GRIPPER_DIM = 8
MAX_STEPS = 500
SUPERSAMPLING = 2
_MAX_GEOMETRIES = 1000


class Step(NamedTuple):
    """What the simulator answers to a reset or an action.

    observation: float64 (39,), Meta-World's state, the goal in its last three numbers; not for pixel agents.
    reward: Meta-World's dense reward, 0 to 10 a step, summed over the steps of the action; 0 after a reset.
    success: whether the task is solved in the state of any of these steps.
    done: whether the time limit is reached. Episodes do not end on success.
    """

    observation: Doubles
    reward: float
    success: bool
    done: bool


def _metaworld() -> Any:
    """The metaworld package, imported once OpenGL is settled."""
    gl.ensure()
    import metaworld

    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
    return metaworld


class Simulator:
    """One Meta-World task.

    task: name such as `drawer-open`. camera, width, height: defaults of `render`.
    time_limit: simulator steps per episode, at most 500. action_repeat: of these, how many an action is
    applied for; the last one of an episode has what is left. Raises `UserError` for an unknown task or
    camera, or a number out of range.
    """

    action_dim = ACTION_DIM
    time_limit = MAX_STEPS
    action_repeat = 1

    def __init__(
        self,
        task: str,
        *,
        camera: str = "corner",
        width: int = SIZE,
        height: int = SIZE,
        time_limit: int = time_limit,
        action_repeat: int = action_repeat,
    ) -> None:
        self.task = check_task(task)
        self.camera = check_camera(camera)
        self.width, self.height = width, height
        if not 1 <= time_limit <= MAX_STEPS:
            raise UserError(f"time_limit = {time_limit}: choose 1 to {MAX_STEPS} steps")
        if action_repeat < 1:
            raise UserError(f"action_repeat = {action_repeat}: choose 1 step or more")
        self.time_limit = time_limit
        self.action_repeat = action_repeat
        self.steps = 0
        self._env = _metaworld().ALL_V3_ENVIRONMENTS[self.task + VERSION]()
        self._env._partially_observable = False
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        self._painters: dict[tuple[int, int], _Painter] = {}
        self._policy: Any = None
        self._observation: Doubles = np.zeros(0)

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
        applied = np.clip(taken, -1, 1).astype(np.float64)
        total, success = 0.0, False
        for _ in range(min(self.action_repeat, self.time_limit - self.steps)):
            self._observation, reward, _, _, info = self._env.step(applied)
            total += float(reward)
            success = success or bool(info["success"])
            self.steps += 1
        return Step(self._observation, total, success, self.steps >= self.time_limit)

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
        """Draw the present state: upright RGB uint8 (height, width, 3), antialiased.

        It is drawn at `SUPERSAMPLING` times that size; a pixel is the mean of its square, halves rounded up.
        """
        wide, high = (SUPERSAMPLING * size for size in (width or self.width, height or self.height))
        drawn = self.draw(camera, wide, high)
        return np.array(Picture.fromarray(drawn).reduce(SUPERSAMPLING))

    def draw(self, camera: str | None, width: int, height: int) -> Image:
        """Draw the present state as it comes, with jagged edges: upright RGB uint8 (height, width, 3)."""
        name = self.camera if camera is None else check_camera(camera)
        return self._painter(width, height).draw(self._env.data, name)

    def _painter(self, width: int, height: int) -> _Painter:
        if (width, height) not in self._painters:
            self._painters[width, height] = _Painter(self._env.model, width, height)
        return self._painters[width, height]

    def close(self) -> None:
        """Free the drawing contexts. The simulator is not used afterwards."""
        for painter in self._painters.values():
            painter.close()
        self._painters.clear()
        self._env.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Painter:
    """One drawing context for pictures of one size.

    mujoco.Renderer is not used, because closing one frees buffers of whichever other one drew last.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        import mujoco

        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = width
        model.vis.global_.offheight = height
        self._gl = mujoco.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMETRIES)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._model = model
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._frame = mujoco.MjrRect(0, 0, width, height)
        self._pixels: Image = np.empty((height, width, 3), dtype=np.uint8)
        self.close = weakref.finalize(self, _free, self._gl, self._context)
        # At exit finalizers may run after EGL's own end; what is registered now runs before it.
        self.close.atexit = False
        atexit.register(self.close)

    def draw(self, data: mujoco.MjData, camera: str) -> Image:
        """Upright picture of the scene through a fixed camera: uint8 (height, width, 3)."""
        import mujoco

        every = mujoco.mjtCatBit.mjCAT_ALL.value
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, every, self._scene)
        self._gl.make_current()
        mujoco.mjr_render(self._frame, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._frame, self._context)
        upside_down = data.camera(camera).xmat[7] < -0.1
        return (self._pixels[:, ::-1] if upside_down else self._pixels[::-1]).copy()


def _free(context: mujoco.GLContext, buffers: mujoco.MjrContext) -> None:
    """Free a painter's buffers in their own context, then the context, once: its `__del__` would again."""
    context.make_current()
    buffers.free()
    context.free()
    context.free = lambda: None
