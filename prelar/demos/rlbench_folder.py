"""Demonstrations in the folders that RLBench's own generator writes.

    <task>/variation<i>/episodes/episode<j>/<camera>_rgb/<n>.png    one picture a step, from 0
    <task>/variation<i>/episodes/episode<j>/low_dim_obs.pkl         a pickle of RLBench's Demo

Other data sets hold all variations of a task together, and name each episode's beside it:

    <task>/all_variations/episodes/episode<j>/…                     pictures and pickle as above
    <task>/all_variations/episodes/episode<j>/variation_number.pkl  a pickle of a number

The pickles are anybody's: `prelar.utils.pickles` reads them, so far as such files need it. The few names that
they need are inert stand-ins, and all others are refused. RLBench is not needed.

Data sets are recorded with all five cameras or with some of them: those that any episode has are expected of
every episode. An action is what the next step's observation tells of the arm, as the action mode says
(`MOTIONS`), and of the gripper: seven numbers and its opening.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar.demos.episodes import RESIZE, Array, Episode, Job, read_picture, same_episode
from prelar.envs.names import RLBENCH_CAMERAS, among
from prelar.utils import files, pickles
from prelar.utils.errors import UserError, one_line, printable
from prelar.utils.frames import SIZE, Frames

WIDTH = 7
"""Numbers of a pose or of the joints; the gripper's opening comes on top."""
FPS = 20.0
MOTIONS = {
    "joint_velocity": "joint_velocities",
    "joint_position": "joint_positions",
    "gripper_pose": "gripper_pose",
}
"""Action modes and the fields of RLBench's observations that tell their actions."""
ALIGNMENT = (
    "actions[t] leads from frame t to frame t + 1, as the source tells with frame t + 1; zero at the last "
    "frame of a clip"
)
EPISODE = re.compile(
    r"(?P<task>[^/]+)/(?:variation(?P<variation>\d+)|all_variations)/episodes/episode(?P<episode>\d+)"
)
TOGETHER = "all_variations"
LOW_DIM, VARIATION = "low_dim_obs.pkl", "variation_number.pkl"
PICTURE = re.compile(r"(?:rgb_)?(\d+)\.png")
MAX_PICTURE, MAX_BYTES, MAX_VARIATION = 64 << 20, 256 << 20, 4 << 10
MAX_STEPS = 20_000

Numbers = npt.NDArray[np.float64]


class RlbenchDemonstrations:
    """What both sources of RLBench's demonstrations tell of them."""

    @property
    def arrays(self) -> dict[str, int]:
        """Actions: as the action mode says. Gripper: x, y, z, quaternion x, y, z, w, opening."""
        return {"actions": WIDTH + 1, "gripper": WIDTH + 1}

    @property
    def action_limit(self) -> float:
        """Rad/s, rad or m, with room."""
        return 100.0

    @property
    def solved_only(self) -> bool:
        """RLBench keeps successful demonstrations only."""
        return True


def step_arrays(motion: Numbers, pose: Numbers, opening: Numbers) -> dict[str, Array]:
    """`actions` and `gripper` of a demonstration, float32 (T, 8) each.

    motion: (T, 7), the field of `MOTIONS`. pose: (T, 7). opening: (T). The last action is zero.
    """
    return {
        "actions": ahead(np.concatenate([motion, opening[:, None]], axis=1)),
        "gripper": np.concatenate([pose, opening[:, None]], axis=1).astype(np.float32),
    }


def ahead(recorded: npt.NDArray[Any]) -> Array:
    """Actions from what each frame's record says led to it, float32 (T, A); the last one is zero.

    recorded: (T, A), numbers.
    """
    actions = np.zeros(recorded.shape, dtype=np.float32)
    actions[:-1] = recorded[1:]
    return actions


@dataclasses.dataclass(frozen=True)
class RlbenchFolder(RlbenchDemonstrations):
    """Episodes below a folder, of `tasks` or all, from `cameras`, which are found by `open_folder`."""

    folder: Path
    cameras: tuple[str, ...] = RLBENCH_CAMERAS
    action_mode: str = "joint_velocity"
    tasks: tuple[str, ...] = ()

    def jobs(self) -> list[Job]:
        """Episodes by task, variation and number. Raises `UserError` where there is none, or one twice."""
        if not self.folder.is_dir():
            raise UserError(f"demos.path = {self.folder}: no such folder; name the data set's folder")
        found: dict[tuple[str, int, int], str] = {}
        for path in self.folder.glob("*/*/episodes/episode*"):
            place = path.relative_to(self.folder).as_posix()
            parts = EPISODE.fullmatch(place)
            if not parts or not path.is_dir():
                continue
            task = printable(parts["task"])
            if self.tasks and task not in self.tasks:
                continue
            variation = int(parts["variation"]) if parts["variation"] else _variation_or_none(path) or 0
            key = task, variation, int(parts["episode"])
            other = found.setdefault(key, place)
            if other != place:
                raise same_episode(self.folder, other, place)
        if not found:
            raise UserError(
                f"demos.path = {self.folder}: holds no <task>/variation<i>/episodes/episode<j> and no "
                "<task>/all_variations/episodes/episode<j>; name the data set's folder"
            )
        return [Job(*key, files=((LOW_DIM, f"{place}/{LOW_DIM}"),)) for key, place in sorted(found.items())]

    def episode_folder(self, job: Job) -> Path:
        """Where an episode lies."""
        return (self.folder / job.files[0][1]).parent

    def collect(self, job: Job) -> Episode:
        """Read an episode; what cannot be read is its reason."""
        folder = self.episode_folder(job)
        try:
            if folder.parents[1].name == TOGETHER:
                read_variation(folder / VARIATION)
            arrays = read_low_dim(folder / LOW_DIM, self.action_mode)
            length = len(arrays["actions"])
            frames = {camera: read_pictures(folder / f"{camera}_rgb", length) for camera in self.cameras}
        except ValueError as error:
            return Episode(job, reason=str(error))
        return Episode(job, frames, arrays, success=True, fps=FPS)

    def files(self, job: Job) -> list[Path]:
        """The episode's pickles and the folders of its pictures."""
        folder = self.episode_folder(job)
        return [folder / VARIATION, folder / LOW_DIM, *(folder / f"{camera}_rgb" for camera in self.cameras)]

    def attributes(self) -> dict[str, Any]:
        """The source; the folder is the user's and stays unnamed."""
        source = {"name": "rlbench_folder", "action_mode": self.action_mode}
        return {"source": source, "resize": RESIZE, "alignment": ALIGNMENT}


def open_folder(
    folder: Path,
    action_mode: str,
    tasks: Sequence[str] | None = None,
    cameras: Sequence[str] | None = None,
) -> RlbenchFolder:
    """The source in a folder, of given tasks and cameras. Raises `UserError` where it lacks one."""
    source = RlbenchFolder(folder, action_mode=action_mode)
    jobs = source.jobs()
    wanted = among("demos.tasks", tasks, {job.task for job in jobs})
    episodes = [source.episode_folder(job) for job in jobs if job.task in wanted]
    recorded = [name for name in RLBENCH_CAMERAS if any((path / f"{name}_rgb").is_dir() for path in episodes)]
    cameras = among("demos.cameras", cameras, recorded or RLBENCH_CAMERAS)
    return dataclasses.replace(source, tasks=tuple(tasks or ()), cameras=cameras)


def read_pictures(folder: Path, length: int) -> Frames:
    """A camera's pictures 0 to length - 1, uint8 (length, 64, 64, 3). `ValueError` names a bad one."""
    paths: dict[int, Path] = {}
    for path in folder.glob("*.png"):
        named = PICTURE.fullmatch(path.name)
        if named and paths.setdefault(int(named[1]), path) != path:
            raise ValueError(f"{folder.name}/{int(named[1])}.png: there under two names")
    expected = set(range(length))
    if paths.keys() != expected:
        odd = min(paths.keys() ^ expected)
        state = "missing" if odd in expected else f"left over: the episode has {length} steps"
        raise ValueError(f"{folder.name}/{odd}.png: {state}")
    frames = np.empty((length, SIZE, SIZE, 3), dtype=np.uint8)
    for number in range(length):
        try:
            frames[number] = read_picture(files.read_bytes(paths[number], MAX_PICTURE))
        except Exception as error:
            raise ValueError(f"{folder.name}/{paths[number].name}: {one_line(error)}") from None
    return frames


def read_low_dim(path: Path, action_mode: str = "joint_velocity") -> dict[str, Array]:
    """`actions` (T, 8) and `gripper` (T, 8) of an episode's pickle. Raises `ValueError` where it is unfit.

    The pickle is a Demo, or a list of its observations.
    """
    try:
        held = _load(path, MAX_BYTES)
        steps = held.state.get("_observations") if isinstance(held, _Record) else held
        if not isinstance(steps, (list, tuple)):
            raise ValueError("holds no Demo")
        if not 0 < len(steps) <= MAX_STEPS:
            raise ValueError(f"{len(steps)} steps, more than {MAX_STEPS}" if steps else "no step")
        rows = [_row(number, step, MOTIONS[action_mode]) for number, step in enumerate(steps)]
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    motion, pose, opening = (np.array(column) for column in zip(*rows, strict=True))
    return step_arrays(motion, pose, opening)


def read_variation(path: Path) -> int:
    """The number of an episode's variation. Raises `ValueError` where the pickle holds none."""
    try:
        return _whole(_load(path, MAX_VARIATION))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _load(path: Path, most: int) -> Any:
    return pickles.load(io.BytesIO(files.read_bytes(path, most)), _KNOWN, kind="demonstration")


def _whole(value: Any) -> int:
    number = _number(value, "the variation")
    if not (0 <= number < 1 << 31 and number.is_integer()):
        raise ValueError(f"the variation is {number:.10g}")
    return int(number)


def _variation_or_none(folder: Path) -> int | None:
    """The number of an episode's variation if it can be read; `RlbenchFolder.collect` says why not."""
    try:
        return read_variation(folder / VARIATION)
    except ValueError:
        return None


def _row(number: int, step: Any, motion: str) -> tuple[Numbers, Numbers, float]:
    """Motion, gripper's pose and opening of one observation."""
    if not isinstance(step, _Record):
        raise ValueError(f"step {number} is no observation")
    state = step.state
    try:
        return (
            _vector(state[motion], motion),
            _vector(state["gripper_pose"], "gripper_pose"),
            _number(state["gripper_open"], "gripper_open"),
        )
    except KeyError as error:
        raise ValueError(f"step {number} holds no {error.args[0]}") from None


def _number(value: Any, name: str) -> float:
    if isinstance(value, _Scalar):
        return value.number()
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large") from None


def _vector(value: Any, name: str) -> Numbers:
    if not isinstance(value, _Numbers):
        raise ValueError(f"a joint or pose vector is missing: {name}")
    return value.vector(name)


# --- What stands in for the names of a pickle -------------------------------------------------------------


class _Record:
    """Stands in for RLBench's Demo and observations: holds the attributes, does nothing."""

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes."""
        if not isinstance(state, dict):
            raise ValueError("an object's state is no dict")
        self.state = state


class _Kind:
    """Stands in for numpy's dtype: plain numbers only."""

    _CODES = frozenset({"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"})

    def __init__(self, code: Any = None, *_: object) -> None:
        if not isinstance(code, str) or code not in self._CODES:
            shown = repr(code[:9]) if isinstance(code, str) else "of no name"
            raise ValueError(f"dtype {shown} is refused")
        self._code = code
        self._order: Any = "<"

    def build(self, state: Any) -> None:
        """Take the order of bytes."""
        self._order = state[1] if isinstance(state, tuple) and len(state) > 1 else None

    def numbers(self, content: Any, count: int) -> Numbers:
        """`count` numbers, float64 (count), that are all of the bytes `content`."""
        if not isinstance(self._order, str) or self._order not in {"<", ">", "|", "="}:
            raise ValueError("a dtype's state is refused")
        dtype = np.dtype(self._order.replace("=", "<") + self._code)
        if not isinstance(content, (bytes, bytearray, str)) or len(content) != count * dtype.itemsize:
            raise ValueError("numbers that do not fit their bytes")
        if isinstance(content, str):
            content = content.encode("latin1")
        return np.frombuffer(content, dtype=dtype).astype(np.float64)


class _Numbers:
    """Stands in for numpy's ndarray: shape, kind and bytes, checked when they are used."""

    def __init__(self, *_: object) -> None:
        self._told: tuple[Any, ...] = ()

    def build(self, state: Any) -> None:
        """Take version, shape, kind, order and bytes."""
        self._told = state[1:6] if isinstance(state, tuple) else ()

    @classmethod
    def of(cls, content: Any, kind: Any, shape: Any, *order: Any) -> _Numbers:
        """Stands in for what makes an array of a buffer."""
        made = cls()
        made.build((None, shape, kind, order, content))
        return made

    def vector(self, name: str) -> Numbers:
        """A vector of `WIDTH` as float64. Raises `ValueError` with its name for others."""
        shape, kind, _, content = self._told if len(self._told) == 4 else (None,) * 4
        if not isinstance(kind, _Kind) or not isinstance(shape, tuple):
            raise ValueError(f"a joint or pose vector is missing: {name}")
        if shape != (WIDTH,):
            shown = ", ".join(str(size) for size in shape[:9] if isinstance(size, int))
            raise ValueError(f"a joint or pose vector has shape ({shown},), not ({WIDTH},): {name}")
        return kind.numbers(content, WIDTH)


class _Scalar:
    """Stands in for numpy's scalars."""

    def __init__(self, kind: Any = None, content: Any = None) -> None:
        self._kind, self._content = kind, content

    def number(self) -> float:
        """The number."""
        if not isinstance(self._kind, _Kind):
            raise ValueError("a number of a kind that is refused")
        return float(self._kind.numbers(self._content, 1)[0])


def _bytes_of(text: Any = None, encoding: Any = None) -> str:
    """Stands in for the encoder by which pickles before protocol 3 hold bytes: they are made at their use."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("an encoding that is refused")
    return text


_CORES = ("numpy.core", "numpy._core")
_KNOWN: pickles.Known = {
    "rlbench.demo Demo": _Record,
    "rlbench.backend.observation Observation": _Record,
    "rlbench.backend.observation UnimanualObservation": _Record,
    "numpy ndarray": _Numbers,
    "numpy dtype": _Kind,
    "_codecs encode": _bytes_of,
    **{f"{core}.multiarray _reconstruct": _Numbers for core in _CORES},
    **{f"{core}.multiarray scalar": _Scalar for core in _CORES},
    **{f"{core}.numeric _frombuffer": _Numbers.of for core in _CORES},
}
