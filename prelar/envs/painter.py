"""Pictures of MuJoCo scenes: fast ones for training, and faithful ones, as the suites draw themselves.

Fast pictures lack shadows and reflections, which is an order of magnitude faster in software, and are drawn
against jagged edges at twice their size: each pixel is the mean of 2x2 drawn ones in integers, the same on
every machine that draws the same. Faithful ones are drawn at their size with all that the model asks for.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Picture

from prelar.config import View
from prelar.envs.distractions import Distractor
from prelar.envs.simulator import Image

if TYPE_CHECKING:
    import mujoco

SUPERSAMPLING = 2
_MAX_GEOMETRIES = 1000


class Painter:
    """One drawing context for pictures of one size.

    faithful: whether to draw all that the model asks for; otherwise shadows, reflections and multisampling
    are left out, of `model` as well. mujoco.Renderer is not used, because closing one frees buffers of
    whichever other one drew last.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int, *, faithful: bool) -> None:
        import mujoco

        if not faithful:
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = width
        model.vis.global_.offheight = height
        self._gl = mujoco.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMETRIES)
        if not faithful:
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

    def draw(
        self, data: mujoco.MjData, camera: int, distractor: Distractor | None, step: int, turned: bool
    ) -> Image:
        """Picture of the scene through a fixed camera: uint8 (height, width, 3).

        distractor: what distracts in it at simulator step `step`. turned: whether by 180 degrees.
        """
        import mujoco

        every = mujoco.mjtCatBit.mjCAT_ALL.value
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, every, self._scene)
        if distractor is not None:
            distractor.change_scene(self._scene, self._model, camera, step)
        picture = self._render(turned)
        if distractor is None or not distractor.composes:
            return picture
        flags = (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR)
        for flag in flags:
            self._scene.flags[flag] = 1
        segments = self._render(turned).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        for flag in flags:
            self._scene.flags[flag] = 0
        return distractor.compose(picture, segments, self._scene, self._model, step)

    def _render(self, turned: bool) -> Image:
        """What the scene looks like now."""
        import mujoco

        self._gl.make_current()
        mujoco.mjr_render(self._frame, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._frame, self._context)
        return (self._pixels[:, ::-1] if turned else self._pixels[::-1]).copy()


def _free(context: mujoco.GLContext, buffers: mujoco.MjrContext) -> None:
    """Free a painter's buffers in their own context, then the context, once: its `__del__` would again."""
    context.make_current()
    buffers.free()
    context.free()
    context.free = lambda: None


class Studio:
    """The painters of one model, one for each size that pictures are asked in.

    view: how they look. backdrop, fps: as of `Distractor`.
    """

    def __init__(self, model: mujoco.MjModel, view: View, *, backdrop: Iterable[int], fps: float) -> None:
        self.faithful = view.renderer == "faithful"
        self.distractor = Distractor.of(view, backdrop, fps)
        self._model = model
        self._painters: dict[tuple[int, int], Painter] = {}

    def start(self, seed: int, episode: int) -> None:
        """Draw what an episode is distracted by."""
        if self.distractor is not None:
            self.distractor.start(seed, episode)

    def render(self, draw: Callable[[int, int], Image], width: int, height: int) -> Image:
        """A picture of a size, uint8 (height, width, 3), from what draws pictures of given sizes.

        A fast one is drawn at `SUPERSAMPLING` times the size; a pixel is the mean of its square, halves
        rounded up.
        """
        if self.faithful:
            return draw(width, height)
        drawn = draw(SUPERSAMPLING * width, SUPERSAMPLING * height)
        return np.array(Picture.fromarray(drawn).reduce(SUPERSAMPLING))

    def draw(
        self, data: mujoco.MjData, camera: int, width: int, height: int, *, step: int, turned: bool = False
    ) -> Image:
        """The scene as it comes, with jagged edges where the picture is fast: uint8 (height, width, 3)."""
        if (width, height) not in self._painters:
            self._painters[width, height] = Painter(self._model, width, height, faithful=self.faithful)
        return self._painters[width, height].draw(data, camera, self.distractor, step, turned)

    def close(self) -> None:
        """Free the drawing contexts."""
        for painter in self._painters.values():
            painter.close()
        self._painters.clear()
