"""Demonstrations in the episode files that APV published: one `.npz` per episode and camera.

A file holds `image` uint8 (T, 64, 64, 3) and, where present, `action` (T, A) and `gripper_pose` (T, 8). Its
name ends in `-<length>.npz`; names of the form `<task>-v<variation>-e<episode>-<camera>-<length>.npz` tell
which files show one episode. Any other file is an episode of its own: the folder it lies in names the task.
Where both kinds lie in a folder, the rarer one is left out.

A file tells with each frame the action that led to it, as replay files of DreamerV2 and its descendants do,
whose format this is, and as RLBench's joint velocities do. The first one led to no frame here and is dropped.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar.demos.episodes import Array, Episode, Job, same_episode
from prelar.demos.rlbench_folder import ALIGNMENT, ahead
from prelar.envs.names import among
from prelar.utils import files, zips
from prelar.utils.errors import UserError, one_line, printable
from prelar.utils.frames import Frames

EPISODE_NAME = re.compile(
    r"(?P<task>.+)-v(?P<variation>\d+)-e(?P<episode>\d+)-(?P<camera>[^-]+)-(?P<length>\d+)\.npz"
)
LENGTH = re.compile(r".*-(\d+)\.npz")
ONLY_CAMERA = "camera"
MAX_BYTES = 2 << 30
MAX_WIDTH = 1024
COLUMNS = {"actions": "action", "gripper": "gripper_pose"}


@dataclasses.dataclass(frozen=True)
class ApvNpz:
    """Episodes below a folder, of `tasks` or all. `cameras` and `widths` are found by `open_folder`."""

    folder: Path
    cameras: tuple[str, ...]
    widths: tuple[tuple[str, int], ...]
    tasks: tuple[str, ...] = ()

    @property
    def arrays(self) -> dict[str, int]:
        """Per-frame arrays that the files hold, and their widths."""
        return dict(self.widths)

    @property
    def action_limit(self) -> float:
        """Joint velocities in rad/s, with room."""
        return 100.0

    @property
    def solved_only(self) -> bool:
        """The files do not tell."""
        return False

    def jobs(self) -> list[Job]:
        """Episodes by task, variation and number, with the files of the cameras."""
        wanted = [job for job in _jobs(self.folder) if not self.tasks or job.task in self.tasks]
        seen = [tuple(file for file in job.files if file[0] in self.cameras) for job in wanted]
        return [
            dataclasses.replace(job, files=files or job.files[:1])
            for job, files in zip(wanted, seen, strict=True)
        ]

    def collect(self, job: Job) -> Episode:
        """Read an episode's files; a file that cannot be read is the episode's reason."""
        frames: dict[str, Frames] = {}
        arrays: dict[str, Array] = {}
        digests: dict[str, str] = {}
        for camera, name in job.files:
            try:
                if camera not in self.cameras:
                    raise ValueError(f"is of camera {camera}, not of {' or '.join(self.cameras)}")
                digests[camera] = _digest(self.folder / name)
                content = read_npz(self.folder / name)
                expected = LENGTH.fullmatch(name)
                if expected and len(content["image"]) != int(expected[1]):
                    raise ValueError(f"{len(content['image'])} frames, its name says {expected[1]}")
                frames[camera] = content["image"]
                aligned = {key: _aligned(content, key) for key in self.arrays}
                arrays = arrays or aligned
                for key in arrays:
                    if not np.array_equal(arrays[key], aligned[key], equal_nan=True):
                        raise ValueError(f"its {COLUMNS[key]} is not that of the other cameras")
            except Exception as error:
                reason = f"{printable(name)}: {one_line(error)}"
                return Episode(job, reason=reason, digests=digests)
        return Episode(job, frames, arrays, digests=digests)

    def files(self, job: Job) -> list[Path]:
        """The episode's files."""
        return [self.folder / name for _, name in job.files]

    def attributes(self) -> dict[str, Any]:
        """The source; the folder is the user's and stays unnamed."""
        return {"source": {"name": "apv_npz"}, "resize": "none", "alignment": ALIGNMENT}


def open_folder(
    folder: Path, tasks: Sequence[str] | None = None, cameras: Sequence[str] | None = None
) -> ApvNpz:
    """The source in a folder, of given tasks and cameras. Raises `UserError` where it lacks one."""
    jobs = _jobs(folder)
    if not jobs:
        raise UserError(f"demos.path = {folder}: holds no .npz episode; name the folder with the episodes")
    among("demos.tasks", tasks, {job.task for job in jobs})
    jobs = [job for job in jobs if not tasks or job.task in tasks]
    recorded = {camera for job in jobs for camera, _ in job.files} if cameras else _main_cameras(jobs)
    seen = among("demos.cameras", cameras, sorted(recorded))
    source = ApvNpz(folder, seen, (), tuple(tasks or ()))
    return dataclasses.replace(source, widths=_widths(folder, source.jobs()))


def _main_cameras(jobs: Sequence[Job]) -> set[str]:
    """Cameras of the episodes whose files' names tell them, or that of the others if these are more."""
    single = [job for job in jobs if job.files[0][0] == ONLY_CAMERA]
    if 2 * len(single) > len(jobs):
        return {ONLY_CAMERA}
    return {camera for job in jobs for camera, _ in job.files} - {ONLY_CAMERA}


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ValueError("not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
    return files.digest(path)


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an episode file that matter here, read without pickle.

    Raises `ValueError` where it is too large, and one of many errors where it is broken.
    """
    with zips.open_zip(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"unpacks to {size} bytes, more than {MAX_BYTES}")
        found = {}
        for key in ("image", *COLUMNS.values()):
            if _shape(archive, key) is not None:
                with archive.open(f"{key}.npy") as handle:
                    found[key] = np.lib.format.read_array(handle, allow_pickle=False)
    if "image" not in found:
        raise ValueError("holds no `image`")
    return found


def _shape(archive: zipfile.ZipFile, key: str) -> tuple[int, ...] | None:
    """The shape of an array in a file, None where there is none.

    Raises `ValueError` where it holds Python objects, or less than its header tells.
    """
    if f"{key}.npy" not in archive.namelist():
        return None
    with archive.open(f"{key}.npy") as handle:
        version = np.lib.format.read_magic(handle)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"`{key}` is of an unknown version {version}")
        header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(handle)
    claimed, present = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{key}.npy").file_size
    if dtype.hasobject:
        raise ValueError(f"Object arrays cannot be read: `{key}` is a pickle")
    if min(shape, default=0) < 0 or claimed > present:
        raise ValueError(f"`{key}` tells of {claimed} bytes and has {present}")
    return tuple(shape)


def _aligned(content: Mapping[str, npt.NDArray[Any]], name: str) -> Array:
    """An array of the file as the store wants it: float32, no action after the last frame."""
    if COLUMNS[name] not in content:
        raise ValueError(f"holds no `{COLUMNS[name]}`")
    values = content[COLUMNS[name]]
    return ahead(values) if name == "actions" else values.astype(np.float32)


def _jobs(folder: Path) -> list[Job]:
    if not folder.is_dir():
        raise UserError(f"demos.path = {folder}: no such folder; name the folder with the .npz episodes")
    named: dict[tuple[str, int, int], dict[str, str]] = {}
    single: dict[str, list[str]] = {}
    for path in sorted(path for path in files.walk(folder) if path.suffix == ".npz"):
        name = path.relative_to(folder).as_posix()
        parts = EPISODE_NAME.fullmatch(path.name)
        if parts:
            key = printable(parts["task"]), int(parts["variation"]), int(parts["episode"])
            other = named.setdefault(key, {}).setdefault(printable(parts["camera"]), name)
            if other != name:
                raise same_episode(folder, other, name)
        else:
            single.setdefault(printable(path.parent.name), []).append(name)
    jobs = [Job(*key, files=tuple(sorted(found.items()))) for key, found in sorted(named.items())]
    for task, names in sorted(single.items()):
        free = (number for number in itertools.count() if (task, 0, number) not in named)
        jobs += [
            Job(task, 0, number, files=((ONLY_CAMERA, name),))
            for number, name in zip(free, names, strict=False)
        ]
    return jobs


def _widths(folder: Path, jobs: list[Job]) -> tuple[tuple[str, int], ...]:
    """Per-frame arrays and their widths, as most of the episodes that can be read have them."""
    seen = collections.Counter[tuple[tuple[str, int], ...]]()
    for job in jobs:
        try:
            with zips.open_zip(folder / job.files[0][1]) as archive:
                shapes = {key: _shape(archive, column) for key, column in COLUMNS.items()}
        except Exception:
            continue
        pairs = ((key, shape[1]) for key, shape in shapes.items() if shape is not None and len(shape) == 2)
        seen[tuple((key, width) for key, width in pairs if 0 < width <= MAX_WIDTH)] += 1
    return seen.most_common(1)[0][0] if seen else ()
