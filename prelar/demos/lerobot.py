"""Demonstrations of a LeRobotDataset: videos or images, actions and state.

`prelar.videos.lerobot` reads the set. `action` of a row is taken after the row's pictures, which is the
store's alignment; the last one leads to no frame and is dropped. The state stands in the store's array
`state`. An episode's task is its text; of several, all. Where the set names a split for validation, its
splits are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prelar.demos.episodes import ALIGNMENT, RESIZE, Episode, Job, read_picture
from prelar.envs.names import among
from prelar.store import parquet
from prelar.utils.errors import UserError, one_line
from prelar.utils.frames import FRAME, Frames
from prelar.utils.processes import processors
from prelar.videos import decode, ffmpeg_log, lerobot, sequential
from prelar.videos.decode import SCALE, Decoder
from prelar.videos.lerobot import VIDEO, EpisodeMeta, LerobotSet

COLUMNS = {"actions": ("action", "actions"), "state": ("observation.state", "state")}
FORMATS = ("PNG", "JPEG")
MAX_FRAMES = decode.MAX_FRAMES


@dataclasses.dataclass(frozen=True)
class LerobotJob(Job):
    """An episode, and what the set's meta tells of it."""

    meta: EpisodeMeta | None = None


@dataclasses.dataclass(frozen=True)
class Lerobot:
    """Episodes of a set, of `tasks` or all.

    views: pairs of a camera and its feature. columns: pairs of a store's array and its feature. ffmpeg: the
    version that decodes.
    """

    dataset: LerobotSet
    views: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...] = ()
    ffmpeg: str = ""
    code = tuple(module.__name__ for module in (lerobot, sequential, decode, ffmpeg_log, parquet))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras by their short names."""
        return tuple(camera for camera, _ in self.views)

    @property
    def arrays(self) -> dict[str, int]:
        """Actions and state, where the set has them, and their widths."""
        return {name: dict(self.dataset.widths)[feature] for name, feature in self.columns}

    @property
    def action_limit(self) -> float:
        """Whatever the robot's units are."""
        return 1e6

    @property
    def solved_only(self) -> bool:
        """The set does not tell."""
        return False

    @property
    def in_turn(self) -> bool:
        """Whether episodes share video files, each of which is decoded once, from its beginning on."""
        return any(kind == VIDEO for _, kind in self._kinds())

    def _kinds(self) -> list[tuple[str, str]]:
        return [(camera, dict(self.dataset.cameras)[feature]) for camera, feature in self.views]

    def jobs(self) -> list[Job]:
        """Episodes by number."""
        return [
            LerobotJob(meta.task, 0, meta.number, meta=meta)
            for meta in self.dataset.episodes()
            if not self.tasks or meta.task in self.tasks
        ]

    def collect(self, job: Job) -> Episode:
        """Read an episode; what is wrong with it is its reason."""
        assert isinstance(job, LerobotJob) and job.meta is not None
        meta = job.meta
        try:
            if meta.reason or meta.length > MAX_FRAMES:
                raise ValueError(meta.reason or f"{meta.length} frames, more than {MAX_FRAMES}")
            rows = self.dataset.rows(meta, [feature for _, feature in self.columns])
            arrays = {name: rows.values[feature] for name, feature in self.columns}
            for name, values in arrays.items():
                if values.shape[1] != self.arrays[name]:
                    raise ValueError(
                        f"{name}: {values.shape[1]} numbers a frame, info.json tells of {self.arrays[name]}"
                    )
            if "actions" in arrays:
                arrays["actions"][-1] = 0
            frames = {camera: self._frames(meta, camera, kind, rows.step) for camera, kind in self._kinds()}
        except ValueError as error:
            return Episode(job, reason=one_line(error))
        fps = self.dataset.fps if abs(rows.step * self.dataset.fps - 1) < sequential.STEADY else 1 / rows.step
        return Episode(job, frames, arrays, fps=fps, split=meta.split)

    def _frames(self, meta: EpisodeMeta, camera: str, kind: str, step: float) -> Frames:
        """A camera's frames, uint8 (T, 64, 64, 3). Raises `ValueError` where they are not to be had."""
        feature = dict(self.views)[camera]
        if kind == VIDEO:
            part = self.dataset.part(dict(meta.views)[feature], meta.length, step)
            clip = _decoder(camera, os.getpid()).decode_part(part)
            if clip.frames is None:
                raise ValueError(
                    f"camera {camera}: {part.path.relative_to(self.dataset.folder)}: {clip.reason}"
                )
            return clip.frames
        frames = np.empty((meta.length, *FRAME), np.uint8)
        count = 0
        for count, content in enumerate(self.dataset.pictures(meta, feature), 1):
            if count <= meta.length:
                try:
                    frames[count - 1] = read_picture(content, FORMATS)
                except Exception as error:
                    raise ValueError(f"camera {camera}, frame {count - 1}: {one_line(error)}") from None
        if count != meta.length:
            raise ValueError(f"camera {camera}: {count} pictures for {meta.length} rows")
        return frames

    def close(self) -> None:
        """End the decodes that are open in this process."""
        for camera in self.cameras:
            _decoder(camera, os.getpid()).close()
        _decoder.cache_clear()

    def files(self, job: Job) -> list[Path]:
        """info.json, and the files that hold the episode."""
        assert isinstance(job, LerobotJob) and job.meta is not None
        meta = job.meta
        places = [lerobot.INFO, meta.data, *(view.path for _, view in meta.views)]
        return [self.dataset.folder / place for place in places if place]

    def attributes(self) -> dict[str, Any]:
        """The source; the folder is the user's and stays unnamed."""
        kinds = {kind for _, kind in self._kinds()}
        made = {
            "source": {"name": "lerobot", "version": self.dataset.version, "features": dict(self.columns)}
        }
        resize = {"resize": SCALE, "ffmpeg": self.ffmpeg} if VIDEO in kinds else {"resize": RESIZE}
        own = {"splits": "as the set names them"} if self.dataset.splits else {}
        return {**made, **resize, **own, "alignment": ALIGNMENT}


@functools.cache
def _decoder(camera: str, process: int) -> Decoder:
    """A camera's decoder in a process, which goes on with a file where the last episode ended."""
    return Decoder(None, processors())


def open_folder(
    folder: Path, tasks: Sequence[str] | None = None, cameras: Sequence[str] | None = None
) -> Lerobot:
    """The source in a folder, of given tasks and cameras. Raises `UserError` where it lacks one."""
    dataset = lerobot.open_set(folder)
    named = {camera: key for key, camera in lerobot.short_names(key for key, _ in dataset.cameras).items()}
    if not named:
        raise UserError(f"demos.path = {folder}: no feature is a video or an image; name a set with a camera")
    wanted = among("demos.cameras", cameras, named)
    widths = dict(dataset.widths)
    found = _columns(widths)
    video = any(dict(dataset.cameras)[named[camera]] == VIDEO for camera in wanted)
    version = _decoder(wanted[0], os.getpid()).version if video else ""
    source = Lerobot(
        dataset, tuple((camera, named[camera]) for camera in wanted), tuple(found), ffmpeg=version
    )
    among("demos.tasks", tasks, dict.fromkeys(job.task for job in source.jobs()) if tasks else ())
    return dataclasses.replace(source, tasks=tuple(tasks or ()))


def _columns(widths: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The features of the store's arrays, as far as the set has them."""
    for name, features in COLUMNS.items():
        for feature in features:
            if feature in widths:
                yield name, feature
                break
