"""Demonstrations in the folders that RLBench's own generator writes.

    <task>/variation<i>/episodes/episode<j>/<camera>_rgb/<n>.png    one picture a step, from 0
    <task>/variation<i>/episodes/episode<j>/low_dim_obs.pkl         a pickle of RLBench's Demo

Other data sets hold all variations of a task together, and name each episode's beside it:

    <task>/all_variations/episodes/episode<j>/…                     pictures and pickle as above
    <task>/all_variations/episodes/episode<j>/variation_number.pkl  a pickle of a number

The pickles are anybody's: they are read by an unpickler that knows the few names such files need, builds
inert stand-ins for them, and refuses all others. RLBench is not needed.

Data sets are recorded with all five cameras or with some of them: those that any episode has are expected of
every episode. Actions are those of `prelar.data.rlbench_steps`.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from prelar.data.demonstrations import ALIGNMENT, Array, Episode, Job
from prelar.data.rlbench_steps import MOTIONS, RATE, WIDTH, RlbenchDemonstrations, step_arrays
from prelar.data.store import SIZE, Frames
from prelar.errors import UserError, one_line
from prelar.names import RLBENCH_CAMERAS, among

CAMERAS = RLBENCH_CAMERAS
MAX_PIXELS = 2048 * 2048
MAX_BYTES = 256 << 20
EPISODE = re.compile(
    r"(?P<task>[^/]+)/(?:variation(?P<variation>\d+)|all_variations)/episodes/episode(?P<episode>\d+)"
)
TOGETHER = "all_variations"
LOW_DIM, VARIATION = "low_dim_obs.pkl", "variation_number.pkl"

Numbers = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class RlbenchFolder(RlbenchDemonstrations):
    """Episodes below a folder, of `tasks` or all, from `cameras`, which are found by `open_folder`."""

    folder: Path
    cameras: tuple[str, ...] = CAMERAS
    action_mode: str = "joint_velocity"
    tasks: tuple[str, ...] = ()

    def jobs(self) -> list[Job]:
        """Episodes by task, variation and number. Raises `UserError` where there is none, or one twice."""
        if not self.folder.is_dir():
            raise UserError(f"rlbench.path = {self.folder}: no such folder; name the data set's folder")
        found: dict[tuple[str, int, int], str] = {}
        for path in self.folder.glob("*/*/episodes/episode*"):
            place = path.relative_to(self.folder).as_posix()
            parts = EPISODE.fullmatch(place)
            if not parts or not path.is_dir() or (self.tasks and parts["task"] not in self.tasks):
                continue
            variation = int(parts["variation"]) if parts["variation"] else _variation_or_none(path) or 0
            other = found.setdefault((parts["task"], variation, int(parts["episode"])), place)
            if other != place:
                raise UserError(
                    f"rlbench.path = {self.folder}: {min(place, other)} and {max(place, other)} are the same "
                    "episode; leave one of them there"
                )
        if not found:
            raise UserError(
                f"rlbench.path = {self.folder}: holds no <task>/variation<i>/episodes/episode<j> and no "
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
        return Episode(job, frames, arrays, success=True, fps=RATE)

    def files(self, job: Job) -> list[Path]:
        """The episode's pickles and the folders of its pictures."""
        folder = self.episode_folder(job)
        return [folder / VARIATION, folder / LOW_DIM, *(folder / f"{camera}_rgb" for camera in self.cameras)]

    def attributes(self) -> dict[str, Any]:
        """The source; the folder is the user's and stays unnamed."""
        resize = f"Pillow bicubic to {SIZE}x{SIZE}"
        source = {"name": "rlbench_folder", "action_mode": self.action_mode}
        return {"source": source, "resize": resize, "alignment": ALIGNMENT}


def open_folder(
    folder: Path,
    action_mode: str,
    tasks: Sequence[str] | None = None,
    cameras: Sequence[str] | None = None,
) -> RlbenchFolder:
    """The source in a folder, of given tasks and cameras. Raises `UserError` where it lacks one."""
    source = RlbenchFolder(folder, action_mode=action_mode)
    jobs = source.jobs()
    wanted = among("rlbench.tasks", tasks, {job.task for job in jobs})
    episodes = [source.episode_folder(job) for job in jobs if job.task in wanted]
    recorded = [name for name in CAMERAS if any((path / f"{name}_rgb").is_dir() for path in episodes)]
    cameras = among("rlbench.cameras", cameras, recorded or CAMERAS)
    return dataclasses.replace(source, tasks=tuple(tasks or ()), cameras=cameras)


def read_pictures(folder: Path, length: int) -> Frames:
    """A camera's pictures 0 to length - 1, uint8 (length, 64, 64, 3). `ValueError` names a bad one."""
    numbers = {int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()}
    expected = set(range(length))
    if numbers != expected:
        odd = min(numbers ^ expected)
        state = "missing" if odd in expected else f"left over: the episode has {length} steps"
        raise ValueError(f"{folder.name}/{odd}.png: {state}")
    frames = np.empty((length, SIZE, SIZE, 3), dtype=np.uint8)
    for number in range(length):
        path = folder / f"{number}.png"
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} pixels")
                colours = picture.convert("RGB")
        except Exception as error:
            raise ValueError(f"{folder.name}/{path.name}: {_without_path(error, path)}") from None
        if colours.size != (SIZE, SIZE):
            colours = colours.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        frames[number] = np.asarray(colours)
    return frames


def _without_path(error: Exception, path: Path) -> str:
    return one_line(error).replace(str(path), path.name)


def read_low_dim(path: Path, action_mode: str = "joint_velocity") -> dict[str, Array]:
    """`actions` (T, 8) and `gripper` (T, 8) of an episode's pickle. Raises `ValueError` where it is unfit."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
        with path.open("rb") as handle:
            steps = _Reader(handle).load().state["_observations"]
        rows = [_row(step.state, MOTIONS[action_mode]) for step in steps]
    except FileNotFoundError:
        raise ValueError(f"{path.name}: missing") from None
    except Exception as error:
        raise ValueError(f"{path.name}: {one_line(error)}") from None
    if not rows:
        raise ValueError(f"{path.name}: no step")
    motion, pose, opening = (np.array(column) for column in zip(*rows, strict=True))
    return step_arrays(action_mode, motion, pose, opening)


def read_variation(path: Path) -> int:
    """The number of an episode's variation. Raises `ValueError` where the pickle holds none."""
    try:
        with path.open("rb") as handle:
            number = _Reader(handle).load()
        found = int(_number(number, "the variation"))
    except FileNotFoundError:
        raise ValueError(f"{path.name}: missing") from None
    except Exception as error:
        raise ValueError(f"{path.name}: {one_line(error)}") from None
    if found < 0:
        raise ValueError(f"{path.name}: the variation is {found}")
    return found


def _variation_or_none(folder: Path) -> int | None:
    """The number of an episode's variation if it can be read; `RlbenchFolder.collect` says why not."""
    try:
        return read_variation(folder / VARIATION)
    except ValueError:
        return None


def _row(step: dict[str, Any], motion: str) -> tuple[Numbers, Numbers, float]:
    """Motion, gripper's pose and opening of one observation."""
    pose = _vector(step["gripper_pose"])
    return _vector(step[motion]), pose, _number(step["gripper_open"], "gripper_open")


def _number(value: Any, name: str) -> float:
    if isinstance(value, _Scalar):
        return float(np.frombuffer(value.content, dtype=value.kind.numpy, count=1)[0])
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is a {type(value).__name__}")
    return float(value)


def _vector(value: Any) -> Numbers:
    if not isinstance(value, _Numbers):
        raise ValueError("a joint or pose vector is missing")
    vector = value.array()
    if vector.shape != (WIDTH,):
        raise ValueError(f"a joint or pose vector has shape {vector.shape}, not ({WIDTH},)")
    return vector


# --- The restricted unpickler -------------------------------------------------------------------------------


class _Record:
    """Stands in for RLBench's Demo and Observation: holds the attributes, does nothing."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("an object's state is no dict")
        self.state = state


class _Kind:
    """Stands in for numpy's dtype: plain numbers only."""

    _CODES = frozenset({"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"})

    def __init__(self, code: str, *_: object) -> None:
        if code not in self._CODES:
            raise ValueError(f"dtype {code!r} is refused")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a dtype's state is refused")
        self.order = state[1]

    @property
    def numpy(self) -> np.dtype[Any]:
        """The real dtype."""
        return np.dtype(self.order + self.code)


class _Numbers:
    """Stands in for numpy's ndarray: shape, kind and bytes, checked when they are used."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> Numbers:
        """The numbers as float64. Raises `ValueError` where shape, kind and bytes disagree."""
        _, shape, kind, by_column, content = self.state
        if not isinstance(kind, _Kind) or not isinstance(content, bytes):
            raise ValueError("an array's content is refused")
        flat = np.frombuffer(content, dtype=kind.numpy)
        return flat.reshape(shape, order="F" if by_column else "C").astype(np.float64)


class _Scalar:
    """Stands in for numpy's scalars."""

    def __init__(self, kind: _Kind, content: bytes) -> None:
        if not isinstance(kind, _Kind) or not isinstance(content, bytes):
            raise ValueError("a scalar's content is refused")
        self.kind, self.content = kind, content


_KNOWN: dict[tuple[str, str], type] = {
    ("rlbench.demo", "Demo"): _Record,
    ("rlbench.backend.observation", "Observation"): _Record,
    ("numpy", "ndarray"): _Numbers,
    ("numpy", "dtype"): _Kind,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Numbers for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    """Reads a pickle in which nothing but the known names occurs, and builds stand-ins for them."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a known name. Raises `ValueError` for all others."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise ValueError(f"names {module}.{name}, which no demonstration needs: refused") from None

    def persistent_load(self, identity: Any) -> Any:
        """Refused."""
        raise ValueError("refers to something outside of the file: refused")
