"""Demonstrations in HDF5 files of robomimic's and LIBERO's layout, below a folder.

    data                      attributes: `env_args` (JSON: env_name, control_freq), LIBERO: `problem_info`
    data/demo_<i>/actions     (T, A)
    data/demo_<i>/obs/<name>  uint8 (T, H, W, 3) for a camera; other arrays are passed over

A picture comes before the action of its row, as in the store. LIBERO's pictures are stored upside down and
say so (`macros_image_convention: opengl`). The task is LIBERO's instruction, else the environment's name,
else the file's. Files may be anybody's: only hard links are followed, so that no link leads to another file,
and neither virtual data sets nor data in other files are read; sizes are judged before anything is.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from prelar.demos.episodes import ALIGNMENT, MAX_PIXELS, RESIZE, Array, Episode, Job, at_size
from prelar.envs.names import among
from prelar.utils import files
from prelar.utils.errors import UserError, one_line, printable
from prelar.utils.frames import FRAME, Frames

ENDINGS = (".hdf5", ".h5")
DEMO = re.compile(r"demo_\d{1,9}")
MAX_FRAMES, MAX_WIDTH, MAX_CHUNK, MAX_TEXT, MAX_TASK = 20_000, 1024, 256 << 20, 4 << 20, 200
FLIPPED = "opengl"


@dataclasses.dataclass(frozen=True)
class Hdf5:
    """Episodes of the files below a folder, of `tasks` or all; `width` of their actions."""

    folder: Path
    cameras: tuple[str, ...]
    width: int
    tasks: tuple[str, ...] = ()

    @property
    def arrays(self) -> dict[str, int]:
        """The actions."""
        return {"actions": self.width}

    @property
    def action_limit(self) -> float:
        """Whatever the robot's units are."""
        return 1e6

    @property
    def solved_only(self) -> bool:
        """The files do not tell."""
        return False

    def jobs(self) -> list[Job]:
        """Episodes by file and number."""
        return [job for job in _jobs(self.folder) if not self.tasks or job.task in self.tasks]

    def collect(self, job: Job) -> Episode:
        """Read an episode; what is wrong with it is its reason."""
        demo, name = job.files[0]
        try:
            with _opened(self.folder / name) as file:
                data = _group(file, "data")
                group = _group(data, demo)
                actions = _actions(_array(group, "actions"))
                flipped = _text(data, "macros_image_convention") == FLIPPED
                views = _group(group, "obs")
                frames = {camera: _frames(_array(views, camera), flipped) for camera in self.cameras}
                fps = _rate(data)
        except Exception as error:  # h5py raises many kinds for a damaged file
            return Episode(job, reason=f"{printable(name, 100)}, {demo}: {one_line(error)[:300]}")
        return Episode(job, frames, {"actions": actions}, fps=fps)

    def files(self, job: Job) -> list[Path]:
        """The episode's file."""
        return [self.folder / name for _, name in job.files]

    def attributes(self) -> dict[str, Any]:
        """The source; the folder is the user's and stays unnamed."""
        return {"source": {"name": "hdf5"}, "resize": RESIZE, "alignment": ALIGNMENT}


def open_folder(
    folder: Path, tasks: Sequence[str] | None = None, cameras: Sequence[str] | None = None
) -> Hdf5:
    """The source in a folder, of given tasks and cameras. Raises `UserError` where it lacks one."""
    jobs = _jobs(folder)
    among("demos.tasks", tasks, dict.fromkeys(job.task for job in jobs))
    seen: dict[str, None] = {}
    widths = collections.Counter[int]()
    for name in dict.fromkeys(job.files[0][1] for job in jobs):
        for views, width in _looks(folder / name):
            seen |= dict.fromkeys(views)
            widths[width] += 1
    if not seen:
        raise UserError(f"demos.path = {folder}: no data/demo_<i>/obs holds pictures (T, H, W, 3) of uint8")
    wanted = among("demos.cameras", cameras, sorted(seen))
    return Hdf5(folder, wanted, widths.most_common(1)[0][0], tuple(tasks or ()))


def _jobs(folder: Path) -> list[Job]:
    """Every episode below a folder; those of one task are numbered on from file to file."""
    if not folder.is_dir():
        raise UserError(f"demos.path = {folder}: no such folder; name the folder with the HDF5 files")
    found: list[Job] = []
    count = collections.Counter[str]()
    for path in sorted(path for path in files.walk(folder) if path.suffix.lower() in ENDINGS):
        name = path.relative_to(folder).as_posix()
        try:
            with _opened(path) as file:
                data = _group(file, "data")
                demos = sorted(filter(DEMO.fullmatch, data), key=lambda demo: (int(demo[5:]), demo))
                task = _task(data) or printable(path.stem, MAX_TASK)
        except Exception:  # the one episode that such a file stands for tells why
            demos, task = ["demo_0"], printable(path.stem, MAX_TASK)
        for demo in demos:
            found.append(Job(task, 0, count[task], files=((demo, name),)))
            count[task] += 1
    if not found:
        raise UserError(f"demos.path = {folder}: holds no .hdf5 file with data/demo_<i>; name another folder")
    return sorted(found, key=lambda job: (job.task, job.episode))


def _looks(path: Path) -> Iterator[tuple[list[str], int]]:
    """Cameras and the width of the actions of each episode of a file that can be read."""
    try:
        with _opened(path) as file:
            data = _group(file, "data")
            for demo in filter(DEMO.fullmatch, data):
                try:
                    group = _group(data, demo)
                    views, width = _group(group, "obs"), _array(group, "actions").shape[1]
                    yield [name for name in views if _is_camera(views, name)], width
                except (ValueError, IndexError, KeyError):
                    continue
    except Exception:  # the file's episodes tell why
        return


def _is_camera(views: h5py.Group, name: str) -> bool:
    try:
        return _holds_pictures(_array(views, name))
    except ValueError:
        return False


def _holds_pictures(held: h5py.Dataset) -> bool:
    """Whether a data set is uint8 (T, H, W, 3)."""
    return bool(held.dtype == np.uint8 and held.ndim == 4 and held.shape[-1] == 3)


def _opened(path: Path) -> h5py.File:
    """A file, opened for reading; each chunk is unpacked once. Raises `ValueError` where it is none."""
    if not path.is_file():
        raise ValueError("not a regular file")
    return h5py.File(os.fspath(path), "r", locking=False, rdcc_nbytes=MAX_CHUNK)


def _item(group: h5py.Group, name: str) -> Any:
    """What a group holds by a hard link. Raises `ValueError` where it has none, or a link that leads away."""
    link = group.get(name, getlink=True)
    if link is None:
        raise ValueError(f"holds no {printable(name, 100)}")
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{printable(name, 100)} is a soft or external link, which is not followed")
    return group[name]


def _group(group: h5py.Group, name: str) -> h5py.Group:
    found = _item(group, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{printable(name, 100)} is no group")
    return found


def _array(group: h5py.Group, name: str) -> h5py.Dataset:
    """A data set of numbers that lie in this file. `ValueError` for others, and for those too large."""
    found = _item(group, name)
    shown = printable(name, 100)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "buif":
        raise ValueError(f"{shown} is no array of numbers")
    if found.external or found.is_virtual:
        raise ValueError(f"{shown} lies in other files, which are not read")
    if not found.ndim or not 0 < found.shape[0] <= MAX_FRAMES:
        raise ValueError(f"{shown} has shape {found.shape}; 1 to {MAX_FRAMES} rows are read")
    if found.chunks and math.prod(found.chunks) * found.dtype.itemsize > MAX_CHUNK:
        raise ValueError(f"{shown} has chunks of {found.chunks}, too large to unpack")
    return found


def _actions(held: h5py.Dataset) -> Array:
    """Actions (T, A), float32, the last one zero. Raises `ValueError` for other shapes."""
    if held.ndim != 2 or not 0 < held.shape[1] <= MAX_WIDTH:
        raise ValueError(f"actions have shape {held.shape}, not (T, A)")
    actions = held[:].astype(np.float32)
    actions[-1] = 0
    return actions


def _frames(held: h5py.Dataset, flipped: bool) -> Frames:
    """A camera's pictures, uint8 (T, 64, 64, 3), upright, a picture at a time."""
    name = held.name.rpartition("/")[2]
    if not _holds_pictures(held):
        raise ValueError(f"camera {name}: {held.dtype} {held.shape}, not uint8 (T, H, W, 3)")
    if not 0 < held.shape[1] * held.shape[2] <= MAX_PIXELS:
        raise ValueError(
            f"camera {name}: {held.shape[1]}x{held.shape[2]} pixels, at most {MAX_PIXELS} are read"
        )
    frames = np.empty((held.shape[0], *FRAME), np.uint8)
    for number in range(held.shape[0]):
        picture = held[number]
        frames[number] = np.asarray(at_size(Image.fromarray(picture[::-1].copy() if flipped else picture)))
    return frames


def _text(group: h5py.Group, name: str) -> str:
    """An attribute that is a text, empty where there is none."""
    if name not in group.attrs or group.attrs.get_id(name).get_storage_size() > MAX_TEXT:
        return ""
    value = group.attrs[name]
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value if isinstance(value, str) else ""


def _parsed(group: h5py.Group, name: str) -> dict[str, Any]:
    """An attribute that is an object of JSON, empty where there is none."""
    try:
        found = files.parse_json(_text(group, name))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _task(data: h5py.Group) -> str:
    """The instruction or the environment's name, empty where neither is told."""
    spoken = _parsed(data, "problem_info").get("language_instruction")
    spoken = (
        "".join(spoken) if isinstance(spoken, list) and all(isinstance(t, str) for t in spoken) else spoken
    )
    named = _parsed(data, "env_args").get("env_name") or _text(data, "env_name")
    return next((printable(text, MAX_TASK) for text in (spoken, named) if isinstance(text, str) and text), "")


def _rate(data: h5py.Group) -> float | None:
    """Frames a second: how often the environment is controlled; None where that is not told."""
    settings = _parsed(data, "env_args").get("env_kwargs")
    rate = settings.get("control_freq") if isinstance(settings, dict) else None
    sound = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= 1e6
    return float(rate) if sound and rate is not None else None
