"""Demonstrations in the episode files that APV published: one `.npz` per episode and camera.

A file holds `image` uint8 (T, 64, 64, 3) and, where present, `action` (T, A) and `gripper_pose` (T, 8). Its
name ends in `-<length>.npz`; names of the form `<task>-v<variation>-e<episode>-<camera>-<length>.npz` tell
which files show one episode. Any other file is an episode of its own: the folder it lies in names the task.

A file gives the action at the moment of its frame, which is the motion towards the next frame.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar import files
from prelar.data.demonstrations import ALIGNMENT, Array, Episode, Job
from prelar.data.store import Frames
from prelar.errors import UserError, one_line
from prelar.names import among

NAMED = re.compile(
    r"(?P<task>.+)-v(?P<variation>\d+)-e(?P<episode>\d+)-(?P<camera>[^-]+)-(?P<length>\d+)\.npz"
)
LENGTH = re.compile(r".*-(\d+)\.npz")
ONLY_CAMERA = "camera"
MAX_BYTES = 2 << 30
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
        return [
            dataclasses.replace(job, files=tuple(file for file in job.files if file[0] in self.cameras))
            for job in _jobs(self.folder)
            if not self.tasks or job.task in self.tasks
        ]

    def collect(self, job: Job) -> Episode:
        """Read an episode's files; a file that cannot be read is the episode's reason."""
        frames: dict[str, Frames] = {}
        arrays: dict[str, Array] = {}
        digests: dict[str, str] = {}
        for camera, name in job.files:
            try:
                digests[camera] = files.digest(self.folder / name)
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
                reason = f"{name}: {one_line(error)}"
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
        raise UserError(f"rlbench.path = {folder}: holds no .npz episode; name the folder with the episodes")
    among("rlbench.tasks", tasks, {job.task for job in jobs})
    recorded = {camera for job in jobs if not tasks or job.task in tasks for camera, _ in job.files}
    seen = among("rlbench.cameras", cameras, sorted(recorded))
    source = ApvNpz(folder, seen, (), tuple(tasks or ()))
    return dataclasses.replace(source, widths=_widths(folder, source.jobs()))


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an episode file that matter here, read without pickle.

    Raises `ValueError` where it is too large, and one of many errors where it is broken.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"unpacks to {size} bytes, more than {MAX_BYTES}")
    with np.load(path, allow_pickle=False) as content:
        wanted = ("image", *COLUMNS.values())
        found = {key: content[key] for key in wanted if key in content}
    if "image" not in found:
        raise ValueError("holds no `image`")
    return found


def _aligned(content: Mapping[str, npt.NDArray[Any]], name: str) -> Array:
    """An array of the file as the store wants it: float32, no action after the last frame."""
    if COLUMNS[name] not in content:
        raise ValueError(f"holds no `{COLUMNS[name]}`")
    values = content[COLUMNS[name]].astype(np.float32)
    if name == "actions":
        values[-1:] = 0
    return values


def _jobs(folder: Path) -> list[Job]:
    if not folder.is_dir():
        raise UserError(f"rlbench.path = {folder}: no such folder; name the folder with the .npz episodes")
    named: dict[tuple[str, int, int], dict[str, str]] = {}
    single: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.npz")):
        name = path.relative_to(folder).as_posix()
        parts = NAMED.fullmatch(path.name)
        if parts:
            key = parts["task"], int(parts["variation"]), int(parts["episode"])
            named.setdefault(key, {})[parts["camera"]] = name
        else:
            single.setdefault(path.parent.name, []).append(name)
    jobs = [Job(*key, files=tuple(sorted(files.items()))) for key, files in sorted(named.items())]
    for task, names in sorted(single.items()):
        jobs += [Job(task, 0, number, files=((ONLY_CAMERA, name),)) for number, name in enumerate(names)]
    return jobs


def _widths(folder: Path, jobs: list[Job]) -> tuple[tuple[str, int], ...]:
    """Per-frame arrays of the first file that can be read."""
    for job in jobs:
        for _, name in job.files:
            try:
                content = read_npz(folder / name)
            except Exception:
                continue
            return tuple(
                (key, content[column].shape[1])
                for key, column in COLUMNS.items()
                if column in content and content[column].ndim == 2
            )
    return ()
