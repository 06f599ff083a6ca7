"""Demonstrations: episodes with actions, from any source, as clips of a store.

A source (`Source`) names its jobs, one an episode, and collects each of them on its own in a worker process.

Alignment of the per-frame arrays, the same for every source: `actions[t]` is the action taken after frame t,
which leads to frame t + 1, so `pairs` and `actions` share their index. The last frame of a clip has no action
after it: its row is zero. `gripper[t]` is the hand as frame t shows it.

An episode becomes one clip per camera. Either all of its cameras are stored or none: an episode with a fault
stands in the index under each camera with status "bad" and the reason. An expert's failure is no fault: it is
kept out too (unless asked for), with `success` false.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from prelar.store import schema, writer
from prelar.store.schema import Row
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME, SIZE, Frames

RESIZE = f"brought to {SIZE}x{SIZE} by means of whole blocks of pixels, or else by Pillow's bicubic"
ALIGNMENT = "actions[t] is taken after frame t and leads to frame t + 1; zero at the last frame of a clip"
HELD_OUT, ENOUGH, TURN = 10, 4, 5
MOTION, STILL = 8, 1e-6
MAX_PIXELS = 2048 * 2048
VERSIONS = ("numpy", "pillow")

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Job:
    """One episode to collect.

    files: what a source that reads files takes it from, pairs of a name that means something to the source,
    such as a camera's, and a path.
    """

    task: str
    variation: int
    episode: int
    files: tuple[tuple[str, str], ...] = ()

    def clip_id(self, camera: str) -> str:
        """Name of the episode's clip from one camera."""
        return f"{self.task}-v{self.variation}-e{self.episode}-{camera}"


def same_episode(folder: Path, one: str, other: str) -> UserError:
    """What is wrong where two places below a folder hold one episode."""
    first, second = sorted((one, other))
    return UserError(
        f"demos.path = {folder}: {first} and {second} are the same episode; leave one of them there"
    )


@dataclasses.dataclass(frozen=True)
class Episode:
    """What came of a job.

    frames: camera to uint8 (T, 64, 64, 3), upright. arrays: name to float32 (T, D), aligned as this module
    says. success: whether the task was solved, None if unknown. fps: frames a second of simulated time.
    reason: why there is nothing to store, else None. digests: camera to sha256 of the file that held its
    frames, where there is one. split: "train", "validation" or "test" if the source decides, else None.
    """

    job: Job
    frames: Mapping[str, Frames] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    success: bool | None = None
    fps: float | None = None
    reason: str | None = None
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    split: str | None = None


class Source(Protocol):
    """Where demonstrations come from: a picklable value, so that workers can collect.

    A source may also have `in_turn = True`: then its jobs are collected one after the other in their order,
    in one process, and `close()` ends it; and `code` and `packages`, names of modules beside its own and of
    installed packages that decide the result.
    """

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of every episode, in the order in which their clips are stored."""

    @property
    def arrays(self) -> dict[str, int]:
        """Per-frame arrays of every episode and their widths."""

    @property
    def action_limit(self) -> float:
        """Largest magnitude of a sound action."""

    @property
    def solved_only(self) -> bool:
        """Whether only episodes that solve their task are stored."""

    def jobs(self) -> list[Job]:
        """All episodes in the order in which they are stored. Raises `UserError` where that is impossible."""

    def collect(self, job: Job) -> Episode:
        """Collect one episode; a pure function of the source and the job. Runs in a worker process."""

    def files(self, job: Job) -> list[Path]:
        """Files that decide an episode, if it is read and not made."""

    def attributes(self) -> dict[str, Any]:
        """What the store's attributes tell about the source."""


def staging_key(source: Source, jobs: Sequence[Job], fps: float | None = None) -> str:
    """A name for all that decides the result, so that only work towards the same result is continued."""
    kinds = [kind.__module__ for kind in type(source).__mro__ if kind.__module__ != "builtins"]
    code = (schema.__name__, writer.__name__, __name__, *kinds, *getattr(source, "code", ()))
    packages = (*VERSIONS, *getattr(source, "packages", ()))
    found = [path for job in jobs for path in source.files(job) if path.exists()]
    decides = {
        "schema": schema.SCHEMA,
        "source": repr(source),
        "fps": fps,
        "jobs": [dataclasses.astuple(job) for job in jobs],
        "files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found],
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "gl": os.environ.get("MUJOCO_GL"),
        "code": files.code_digests(*code),
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


# --- From episodes to clips ---------------------------------------------------------------------------------


def at_size(picture: Image.Image) -> Image.Image:
    """A picture brought to 64x64 without aliasing, as `RESIZE` says."""
    width, height = picture.size
    if width % SIZE or height % SIZE:
        return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return picture.reduce((width // SIZE, height // SIZE))


def read_picture(content: bytes, formats: tuple[str, ...] = ("PNG",)) -> Frames:
    """A picture as uint8 (64, 64, 3); its header is judged before it is decoded. `ValueError` if unfit."""
    try:
        picture = Image.open(io.BytesIO(content), formats=formats)
    except Image.UnidentifiedImageError:
        raise ValueError(f"cannot identify a {' or '.join(formats)} in it") from None
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS}")
        return np.asarray(at_size(picture.convert("RGB")))


def fault(episode: Episode, source: Source) -> str | None:
    """What makes an episode of a source unfit to be stored, in words; None for a sound one."""
    lengths = {}
    for camera in source.cameras:
        frames = episode.frames.get(camera)
        if frames is None:
            return f"camera {camera}: no frames"
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != FRAME:
            return (
                f"camera {camera}: frames are {frames.dtype} {frames.shape}, not uint8 (T, {SIZE}, {SIZE}, 3)"
            )
        lengths[camera] = len(frames)
    length = max(lengths.values())
    for camera, frames_of_camera in lengths.items():
        if frames_of_camera != length:
            return f"camera {camera}: {frames_of_camera} frames where another camera has {length}"
    if length < 2:
        return f"{length} frames; two are needed"
    for name, width in source.arrays.items():
        values = episode.arrays.get(name)
        if values is None or values.shape != (length, width):
            shape = None if values is None else values.shape
            return f"{name}: shape {shape}, expected {(length, width)}"
        if values.dtype != np.float32:
            return f"{name}: {values.dtype}, expected float32"
        if not np.isfinite(values).all():
            return f"{name}: not finite at frame {int(np.argmin(np.isfinite(values).all(axis=1)))}"
    if "actions" in source.arrays:
        largest = np.abs(episode.arrays["actions"]).max(axis=1)
        if largest.max() > source.action_limit:
            frame = int(largest.argmax())
            return f"actions: {largest[frame]:g} at frame {frame}, larger than {source.action_limit:g}"
        if action_range(episode.arrays["actions"][:-1]) < STILL:
            return "its actions never change"
    if not any(_moves(episode.frames[camera]) for camera in lengths):
        return "nothing moves in any camera"
    return None


def action_range(actions: Array) -> float:
    """The widest range of any component of actions (T, A), none of which comes after a last frame."""
    return float(np.ptp(actions, axis=0).max()) if len(actions) else 0.0


def _moves(frames: Frames) -> bool:
    """Whether any pixel departs from the first frame by more than noise."""
    return any(bool((np.abs(frame.astype(np.int16) - frames[0]) > MOTION).any()) for frame in frames[1:])


class Splits:
    """Deals stored episodes into train and validation, in the order of the store.

    Of each task the first episode is held out for validation, and every tenth after it. Of tasks that are
    given fewer than `ENOUGH` episodes only every fifth holds its first one out, and none of a single episode.
    """

    def __init__(self, jobs: Iterable[Job], rows: Iterable[Row]) -> None:
        """Continue after the stored clips `rows`."""
        self._planned: dict[str, int] = {}
        for job in jobs:
            self._planned[job.task] = self._planned.get(job.task, 0) + 1
        stored = {(row["task"], row["variation"], row["episode"]) for row in rows if row["status"] == "ok"}
        self._stored: dict[str, int] = {}
        for task, _, _ in stored:
            self._stored[task] = self._stored.get(task, 0) + 1
        few = [task for task, count in self._planned.items() if 1 < count < ENOUGH]
        self._held = {task for task, count in self._planned.items() if count >= ENOUGH} | {*few[::TURN]}

    def deal(self, task: str) -> str:
        """The split of the next stored episode of a task."""
        number = self._stored.get(task, 0)
        self._stored[task] = number + 1
        return "validation" if task in self._held and number % HELD_OUT == 0 else "train"


ClipRecord = tuple[Frames | None, dict[str, Any], dict[str, Array]]


def clips(
    episode: Episode, source: Source, label_id: int, splits: Splits, fps: float | None = None
) -> Iterator[ClipRecord]:
    """An episode as what `StoreWriter.append` takes: one clip per camera, with its row and its arrays.

    `fps` is told of it in place of its own rate, if given. A clip's sha256 is that of its file, or of the
    bytes of its frames where no file of its own holds them.
    """
    job = episode.job
    beyond = schema.misfit({"variation": job.variation, "episode": job.episode})
    reason = episode.reason or beyond or fault(episode, source)
    split = None if reason else episode.split or splits.deal(job.task)
    for camera in source.cameras:
        row = {
            "id": job.clip_id(camera),
            "split": split,
            "label": job.task,
            "label_id": label_id,
            "width": SIZE,
            "height": SIZE,
            "fps": fps or episode.fps,
            "task": job.task,
            "variation": job.variation,
            "camera": camera,
            "episode": job.episode,
            "success": episode.success,
            "reason": reason,
            "sha256": episode.digests.get(camera),
        }
        if reason:
            yield None, row, {}
        else:
            row["sha256"] = row["sha256"] or hashlib.sha256(episode.frames[camera].tobytes()).hexdigest()
            yield episode.frames[camera], row, {name: episode.arrays[name] for name in source.arrays}
