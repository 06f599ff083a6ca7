"""What distracts in the pictures of an environment, and changes nothing else: camera, colours, background.

All of it follows from (seed, episode, simulator step), so that an episode looks the same each time it is
played, and after its state was restored.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from prelar.config import View
from prelar.envs.simulator import Doubles, Image, episode_entropy

if TYPE_CHECKING:
    import mujoco

    from prelar.store.store import Store

TURN, RISE, ROLL = np.radians((60.0, 25.0, 20.0))
"""How far a camera goes around the scene, above its own place and about its own axis, at strength 1."""
PERIODS = (150.0, 600.0)
"""Simulator steps in which a camera swings to and fro, least and most."""
DISTRACTION = 1
"""What sets its draws apart from the simulator's own of an episode."""
CLIP_FPS = 12.0
"""Of clips whose rate is unknown."""


class Distractor:
    """Distracts in the pictures of one simulator.

    view: what distracts, and how strongly: 0 not at all, 1 most. backdrop: geometries of the model that a
    background takes the place of, beside the sky. fps: simulator steps in a second.
    Raises `UserError` where the store of a background cannot be read.
    """

    def __init__(self, view: View, backdrop: Iterable[int], fps: float) -> None:
        self.view, self.fps = view, fps
        self.composes = view.distract == "background"
        self._backdrop = frozenset(backdrop)
        self._store = _open(view) if self.composes else None
        self._clip: Image = np.zeros((1, 1, 1, 3), np.uint8)
        self._clip_fps, self._clip_start = CLIP_FPS, 0
        self.start(0, 0)

    @classmethod
    def of(cls, view: View, backdrop: Iterable[int], fps: float) -> Distractor | None:
        """What distracts in a view; None where nothing does."""
        return None if view.distract == "none" else cls(view, backdrop, fps)

    def start(self, seed: int, episode: int) -> None:
        """Draw what an episode is distracted by."""
        random = np.random.default_rng([episode_entropy(seed, episode), DISTRACTION])
        self._phases = random.uniform(0, 2 * np.pi, 3)
        self._periods = random.uniform(*PERIODS, 3)
        self._colour_seed = int(random.integers(2**31))
        if self._store is not None:
            clip = int(random.integers(self._store.num_clips))
            length = int(self._store.clip_length[clip])
            self._clip = self._store.read(int(self._store.clip_start[clip]), length)
            self._clip_fps = self._store.clip_index["fps"][clip].as_py() or CLIP_FPS
            self._clip_start = int(random.integers(length))

    def change_scene(self, scene: mujoco.MjvScene, model: mujoco.MjModel, camera: int, step: int) -> None:
        """Move the scene's camera, or paint its geometries."""
        if self.view.distract == "camera":
            self._move_camera(scene, float(np.linalg.norm(model.cam_poscom0[camera])), step)
        elif self.view.distract == "colour":
            self._paint(scene, model.ngeom)

    def _move_camera(self, scene: mujoco.MjvScene, distance: float, step: int) -> None:
        """Swing the camera around the point that lies `distance` (m) ahead of it."""
        swings = np.sin(2 * np.pi * step / self._periods + self._phases) * self.view.distract_strength
        turn, rise, roll = swings * (TURN, RISE, ROLL)
        place, ahead, up = (np.array(getattr(scene.camera[0], name)) for name in ("pos", "forward", "up"))
        right, focus = np.cross(ahead, up), None
        turned = rotation(np.array([0.0, 0.0, 1.0]), turn) @ rotation(right, -abs(rise))
        rolled = turned @ rotation(ahead, roll)
        for eye in scene.camera:
            place = np.array(eye.pos)
            focus = place + distance * ahead if focus is None else focus
            eye.pos = focus + turned @ (place - focus)
            eye.forward, eye.up = turned @ ahead, rolled @ up

    def _paint(self, scene: mujoco.MjvScene, count: int) -> None:
        """Mix each geometry's colour with a random one of its own."""
        import mujoco

        colours = np.random.default_rng(self._colour_seed).uniform(0, 1, (count, 3))
        share = self.view.distract_strength
        for geom in scene.geoms[: scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and 0 <= geom.objid < count:
                geom.rgba[:3] = (1 - share) * geom.rgba[:3] + share * colours[geom.objid]

    def compose(
        self,
        picture: Image,
        segments: npt.NDArray[np.int32],
        scene: mujoco.MjvScene,
        model: mujoco.MjModel,
        step: int,
    ) -> Image:
        """Mix the clip's present frame into the sky and the backdrop of a picture (H, W, 3).

        segments (H, W): the scene's geometry that each pixel shows, counted from 1; 0: none.
        """
        import mujoco

        behind = np.zeros(scene.ngeom + 1, bool)
        behind[0] = True
        for number, geom in enumerate(scene.geoms[: scene.ngeom]):
            behind[number + 1] = geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.objid in self._backdrop
        mask = behind[np.minimum(segments, scene.ngeom)]
        length = len(self._clip)
        moment = (self._clip_start + int(step * self._clip_fps / self.fps)) % max(2 * length - 2, 1)
        frame = self._clip[min(moment, 2 * length - 2 - moment)]  # to its end and back again
        rows, columns = (
            np.arange(size) * frame.shape[axis] // size for axis, size in enumerate(picture.shape[:2])
        )
        share = round(256 * self.view.distract_strength)
        mixed = picture.astype(np.int32) * (256 - share) + frame[rows][:, columns].astype(np.int32) * share
        return np.where(mask[..., None], (mixed + 128) >> 8, picture).astype(np.uint8)


def _open(view: View) -> Store:
    """The store of a background's clips, whose module is imported by who has a background only."""
    from prelar.store.store import Store

    return Store.open(Path(str(view.distract_store)))


def rotation(axis: Doubles, angle: float) -> Doubles:
    """The matrix (3, 3) that turns vectors about an axis by an angle in radians."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turned: Doubles = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return turned
