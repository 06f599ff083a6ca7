"""LeRobotDataset folders, v2.0 to v3.0: what lies where, read without the package lerobot.

    meta/info.json                      version, rate, features, templates of the paths below
    meta/episodes/…parquet              v3.0: a row an episode; meta/episodes.jsonl before
    data/…parquet                       a row a frame; in v3.0, many episodes share a file
    videos/…mp4                         a camera's pictures; in v3.0, many episodes share a file

An episode is found by what its own row tells, for each camera apart, never by counting files or sorting
names. Its pictures are cut out of a shared file by time: picture i is the one within half a frame of
`from_timestamp` + i / rate, and a count that does not fit is the episode's reason. Everything in such a
folder may come from elsewhere: paths that would leave it are refused, and tables have bounds before they are
unpacked.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prelar.store.parquet import open_parquet
from prelar.utils import files
from prelar.utils.errors import UserError, one_line, printable, shown
from prelar.videos.archive import Member
from prelar.videos.labels import Label, Labels
from prelar.videos.own_videos import hashed_splits
from prelar.videos.sequential import STEADY, Part

INFO = "meta/info.json"
VERSIONS = {"v2.0", "v2.1", "v3.0"}
MAX_INFO, MAX_LINES, MAX_FILE, MAX_VALUES = 16 << 20, 256 << 20, 1 << 30, 4 << 30
MAX_WIDTH, MAX_TASK = 1024, 200
MAX_EPISODE = 1 << 31
DATA = {
    "v2": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEOS = {
    "v2": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")
VALIDATION, TEST = ("val", "valid", "validation", "eval"), ("test",)
IMAGE, VIDEO = "image", "video"
ERRORS = (ValueError, OSError, pa.ArrowException)
"""What reading a damaged table can raise: for a page that does not unpack, Arrow raises `OSError`."""
Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class View:
    """An episode as one camera shows it: from `begin` (seconds) on in the file `path`, relative to the set.

    end: where the set says that it ends, None if it does not.
    """

    path: str
    begin: float
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class EpisodeMeta:
    """An episode as meta tells of it; `reason` says what is wrong with that, else it is None.

    data: file of its rows, relative to the set. views: video features and where they show it. split:
    "train", "validation" or "test" where the set names one for validation.
    """

    number: int
    length: int
    task: str
    data: str
    views: tuple[tuple[str, View], ...]
    split: str | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of an episode in order: features, float32 (T, D) each; `step` seconds lie between two rows."""

    step: float
    values: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LerobotSet:
    """A set in a folder, as its info.json has it.

    cameras: feature to `IMAGE` or `VIDEO`, without depth. widths: features of numbers, and how many a frame.
    """

    folder: Path
    version: str
    fps: float
    data_path: str
    video_path: str
    chunks_size: int
    cameras: tuple[tuple[str, str], ...]
    widths: tuple[tuple[str, int], ...]
    splits: tuple[tuple[str, int, int], ...] = ()

    @property
    def layout(self) -> str:
        """Which of `DATA` and `VIDEOS` the set follows."""
        return self.version[:2]

    def episodes(self) -> list[EpisodeMeta]:
        """All episodes by number. Raises `UserError` where meta cannot be read, or one stands there twice."""
        rows = _episode_lines(self) if self.layout == "v2" else _episode_rows(self)
        found: dict[int, EpisodeMeta] = {}
        for row in rows:
            episode = self._meta(row)
            if episode.number in found:
                raise UserError(
                    f"{self.folder}: episode {episode.number} stands twice in meta/episodes; leave one there"
                )
            found[episode.number] = episode
        if not found:
            raise UserError(f"{self.folder}: meta names no episode; name the folder of a whole set")
        return [found[number] for number in sorted(found)]

    def _meta(self, row: dict[str, Any]) -> EpisodeMeta:
        number = row.get("episode_index")
        if type(number) is not int or not 0 <= number < MAX_EPISODE:
            raise UserError(f"{self.folder}: an episode of number {shown(number)} in meta/episodes; mend it")
        tasks = row.get("tasks")
        task = "; ".join(sorted(map(str, tasks))) if isinstance(tasks, list) else ""
        split = next((name for name, begin, end in self.splits if begin <= number < end), None)
        meta = EpisodeMeta(number, 0, printable(task, MAX_TASK), "", (), split)
        length = row.get("length")
        try:
            if type(length) is not int or length < 1:
                raise ValueError(f"meta/episodes tells of {shown(length)} frames")
            data = self.place("data_path", number, row.get("data/chunk_index"), row.get("data/file_index"))
            views = tuple((key, self._view(row, number, key)) for key, kind in self.cameras if kind == VIDEO)
        except ValueError as error:
            return dataclasses.replace(meta, reason=str(error))
        return dataclasses.replace(meta, length=length, data=data, views=views)

    def _view(self, row: dict[str, Any], number: int, key: str) -> View:
        """Where a camera shows an episode. Raises `ValueError` where the row does not tell."""
        if self.layout == "v2":
            return View(self.place("video_path", number, video_key=key), 0.0)
        begin = row.get(f"videos/{key}/from_timestamp")
        if not isinstance(begin, float | int) or not math.isfinite(begin) or begin < 0:
            raise ValueError(f"{printable(key, 100)}: begins at {shown(begin)} s in its file")
        end = row.get(f"videos/{key}/to_timestamp")
        chunk, file = (row.get(f"videos/{key}/{name}_index") for name in ("chunk", "file"))
        path = self.place("video_path", number, chunk, file, key)
        return View(path, float(begin), float(end) if isinstance(end, float | int) else None)

    def place(
        self, template: str, number: int, chunk: Any = None, file: Any = None, video_key: str = ""
    ) -> str:
        """A path of info.json, filled in. Raises `ValueError` where it is none or leads out of the set."""
        given: dict[str, Any] = {"episode_index": number, "episode_chunk": number // self.chunks_size}
        given |= {"chunk_index": chunk, "file_index": file, "video_key": video_key}

        def fill(found: re.Match[str]) -> str:
            value = given.get(found[1])
            if found[1] == "video_key" and not found[2]:
                return video_key
            if type(value) is not int or not 0 <= value < MAX_EPISODE:
                raise ValueError(f"{template}: {found[1]} is {shown(value)}")
            return f"{value:0{found[2] or 1}d}"

        path = FIELD.sub(fill, getattr(self, template))
        parts = PurePosixPath(path).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in path or len(path) > 1024:
            raise ValueError(f"{template}: {shown(path)} leads out of the set")
        return path

    def rows(self, episode: EpisodeMeta, features: Sequence[str]) -> Rows:
        """The rows of an episode. Raises `ValueError` where they are not those that it tells of."""
        path = self.folder / episode.data
        try:
            table = _numbers(path, _stamp(path), tuple(features))
            of_episode = np.flatnonzero(table["episode_index"][:, 0] == episode.number)
            order = of_episode
            if "frame_index" in table:
                order = of_episode[np.argsort(table["frame_index"][of_episode, 0], kind="stable")]
                numbers = table["frame_index"][order, 0]
                if not np.array_equal(numbers, np.arange(len(order))):
                    odd = int(np.flatnonzero(numbers != np.arange(len(order)))[0])
                    raise ValueError(f"its frame {odd} is missing, or there twice")
            if len(order) != episode.length:
                raise ValueError(f"{len(order)} rows of the episode, meta/episodes tells of {episode.length}")
            step = self._step(table["timestamp"][order, 0])
        except ERRORS as error:
            raise ValueError(f"{printable(episode.data, 100)}: {error}") from None
        return Rows(step, {key: np.ascontiguousarray(table[key][order], np.float32) for key in features})

    def _step(self, times: npt.NDArray[np.float64]) -> float:
        """Seconds from row to row. Raises `ValueError` where the rows do not keep one rate."""
        if not np.isfinite(times).all() or (times < 0).any():
            raise ValueError(f"its row {int(np.argmin(np.isfinite(times) & (times >= 0)))} has no sound time")
        step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / self.fps
        if step <= 0 or (np.abs(times - step * np.arange(len(times))) >= step / 2).any():
            raise ValueError("the times of its rows do not keep a rate from 0 s on")
        return float(step)

    def part(self, view: View, length: int, step: float, first: int = 0, final: bool = False) -> Part:
        """The part of a video file that shows `length` frames of an episode, from number `first` on."""
        begin = view.begin + (first - 0.5) * step
        return Part(self.folder / view.path, begin, begin + length * step, length, exact=True, final=final)

    def pictures(self, episode: EpisodeMeta, key: str) -> Iterator[bytes]:
        """The encoded pictures of an image feature in order. Raises `ValueError` where one is missing."""
        path = self.folder / episode.data
        try:
            file = open_parquet(files.read_bytes(path, MAX_FILE), MAX_VALUES)
            names = [
                name for name in ("episode_index", "frame_index", key) if name in file.schema_arrow.names
            ]
            if key not in names:
                raise ValueError(f"no column {printable(key, 100)}")
            groups = [n for n in range(file.num_row_groups) if _may_hold(file, n, episode.number)]
            count = 0
            for batch in file.iter_batches(batch_size=8, row_groups=groups, columns=names):
                mine = batch.filter(pc.equal(batch["episode_index"], episode.number))
                column = mine[key]
                if pa.types.is_struct(column.type):
                    column = column.field("bytes")
                for number, content in enumerate(column.to_pylist(), count):
                    if not isinstance(content, bytes):
                        raise ValueError(f"{printable(key, 100)}: no picture at frame {number}")
                    if "frame_index" in names and mine["frame_index"][number - count].as_py() != number:
                        raise ValueError(f"the rows of its pictures are not in order at frame {number}")
                    yield content
                count += mine.num_rows
        except (*ERRORS, KeyError) as error:
            raise ValueError(f"{printable(episode.data, 100)}: {error}") from None


# --- meta ---------------------------------------------------------------------------------------------------


def is_set(folder: Path) -> bool:
    """Whether a folder holds a LeRobotDataset, of whatever version."""
    return (folder / INFO).is_file() or (folder / "meta_data/info.json").is_file()


def open_set(folder: Path, key: str = "demos.path") -> LerobotSet:
    """The set in a folder, which `key` of params.yaml names.

    Raises `UserError` where there is none, it is of another version, or info.json is not as it should be.
    """
    if not (folder / INFO).is_file():
        old = (folder / "meta_data").is_dir()
        problem = "a LeRobotDataset of v1, which is not read; convert it" if old else f"holds no {INFO}"
        raise UserError(f"{key} = {folder}: {problem}; name the folder of a LeRobotDataset of v2.0 to v3.0")
    try:
        info = files.parse_json(files.read_bytes(folder / INFO, MAX_INFO))
        version = info.get("codebase_version") if isinstance(info, dict) else None
        if not isinstance(version, str) or version not in VERSIONS:
            raise ValueError(f"codebase_version is {shown(version)}; read are {', '.join(sorted(VERSIONS))}")
        fps, features = info.get("fps"), info.get("features")
        if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= 1e6:
            raise ValueError(f"fps is {shown(fps)}")
        if not isinstance(features, dict):
            raise ValueError("it names no features")
        chunks = info.get("chunks_size", 1000)
        if type(chunks) is not int or chunks < 1:
            raise ValueError(f"chunks_size is {shown(chunks)}")
        data = info.get("data_path") or DATA[version[:2]]
        videos = info.get("video_path") or VIDEOS[version[:2]]
        for path in (data, videos):
            if not isinstance(path, str) or re.search(r"[{}]", FIELD.sub("", path)):
                raise ValueError(f"a path is {shown(path)}")
    except ValueError as error:
        raise UserError(f"{key} = {folder}: {INFO}: {error}; mend it, or name another set") from None
    cameras = {name: about["dtype"] for name, about in features.items() if _is_camera(about)}
    widths = {name: _width(about) for name, about in features.items()}
    return LerobotSet(
        folder,
        version,
        float(fps),
        data,
        videos,
        chunks,
        tuple(cameras.items()),
        tuple((name, width) for name, width in widths.items() if width),
        _own_splits(info.get("splits")),
    )


def _is_camera(about: Any) -> bool:
    """Whether a feature is pictures to learn from: depth is none."""
    if not isinstance(about, dict) or about.get("dtype") not in (IMAGE, VIDEO):
        return False
    held = [about.get(name) for name in ("info", "video_info")]
    entries = [about, *(each for each in held if isinstance(each, dict))]
    return not any(
        each.get(key) is True for each in entries for key in ("is_depth_map", "video.is_depth_map")
    )


def _width(about: Any) -> int:
    """Numbers a frame of a feature, 0 where it is none of numbers."""
    shape = about.get("shape") if isinstance(about, dict) else None
    if not isinstance(shape, list) or not re.fullmatch(r"(float|int|uint)\d+|bool", str(about.get("dtype"))):
        return 0
    if not all(type(size) is int and 0 < size <= MAX_WIDTH for size in shape):
        return 0
    width = math.prod(shape)
    return width if width <= MAX_WIDTH else 0


def _own_splits(splits: Any) -> tuple[tuple[str, int, int], ...]:
    """Splits as "train", "validation" or "test" with their episodes, if one is for validation."""
    found = []
    for name, text in splits.items() if isinstance(splits, dict) else ():
        borders = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text) if isinstance(text, str) else None
        if borders:
            split = "validation" if name in VALIDATION else "test" if name in TEST else "train"
            found.append((split, int(borders[1]), int(borders[2])))
    return tuple(found) if any(split == "validation" for split, _, _ in found) else ()


def _episode_lines(held: LerobotSet) -> Iterator[dict[str, Any]]:
    """v2: the lines of meta/episodes.jsonl."""
    path = held.folder / "meta/episodes.jsonl"
    try:
        for line in files.read_bytes(path, MAX_LINES).splitlines():
            if line.strip():
                row = files.parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError("a line that is no object")
                yield row
    except ValueError as error:
        raise UserError(f"{path}: {error}; name the folder of a whole set") from None


def _episode_rows(held: LerobotSet) -> Iterator[dict[str, Any]]:
    """v3: the rows of all files of meta/episodes, without the statistics."""
    paths = sorted((held.folder / "meta/episodes").glob("*/*.parquet"))
    for path in paths:
        try:
            file = open_parquet(files.read_bytes(path, MAX_FILE), MAX_VALUES)
            names = [name for name in file.schema_arrow.names if not name.startswith(("stats/", "meta/"))]
            table = file.read([name for name in names if name != "tasks"])
            tasks = _texts(file) if "tasks" in names else [None] * table.num_rows
            rows = table.to_pylist()
        except ERRORS as error:
            raise UserError(f"{path}: {one_line(error)}; name the folder of a whole set") from None
        for row, texts in zip(rows, tasks, strict=True):
            yield {**row, "tasks": texts}


def _texts(file: Any) -> list[list[str]]:
    """The column `tasks` of an opened file. Raises `ValueError` where its texts unpack to too much."""
    found: list[list[str]] = []
    for group in range(file.num_row_groups):  # Arrow reads such a column of several groups not at once
        column = file.read_row_group(group, ["tasks"])["tasks"].combine_chunks()
        if not pa.types.is_list(column.type) or not pa.types.is_dictionary(column.type.value_type):
            raise ValueError(f"tasks are {column.type}")
        texts = [printable(text or "", MAX_TASK) for text in column.values.dictionary.to_pylist()]
        known = column.values.indices.to_pylist()
        found += [
            [texts[number] for number in known[begin:end] if number is not None]
            for begin, end in itertools.pairwise(column.offsets.to_pylist())
        ]
    return found


# --- data ---------------------------------------------------------------------------------------------------


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with a file's content. Raises `ValueError` where there is none."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=2)
def _numbers(path: Path, stamp: tuple[int, int], features: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """Columns of numbers of a data file, (rows, D) each. `ValueError` where one is missing or no numbers."""
    file = open_parquet(files.read_bytes(path, MAX_FILE), MAX_VALUES)
    there = set(file.schema_arrow.names)
    needed = ["episode_index", "timestamp", *features]
    if lacking := [name for name in needed if name not in there]:
        raise ValueError(f"no column {printable(lacking[0], 100)}")
    names = [*needed, *({"frame_index"} & there)]
    table = file.read(names)
    return {name: _as_rows(name, table[name]) for name in names}


def _as_rows(name: str, column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of numbers, or of lists of them of one length, as (rows, D)."""
    values = column.combine_chunks()
    rows = len(values)
    while (
        pa.types.is_list(values.type)
        or pa.types.is_large_list(values.type)
        or pa.types.is_fixed_size_list(values.type)
    ):
        if values.null_count:
            raise ValueError(f"{printable(name, 100)}: rows without a value")
        lengths = np.unique(pc.list_value_length(values).to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise ValueError(f"{printable(name, 100)}: rows of {lengths[0]} and of {lengths[-1]} numbers")
        values = values.flatten()
    kind = values.type
    if values.null_count or not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or kind == pa.bool_()
    ):
        raise ValueError(f"{printable(name, 100)}: not a number in each row")
    numbers = values.to_numpy(zero_copy_only=False)
    numbers = numbers if pa.types.is_integer(kind) else numbers.astype(np.float64)
    return numbers.reshape(rows, -1) if rows else numbers.reshape(0, 1)


def _may_hold(file: Any, group: int, episode: int) -> bool:
    """Whether a row group may have rows of an episode, as far as its statistics tell."""
    paths = [file.schema.column(number).path for number in range(len(file.schema.names))]
    statistics = file.metadata.row_group(group).column(paths.index("episode_index")).statistics
    return (
        statistics is None or not statistics.has_min_max or bool(statistics.min <= episode <= statistics.max)
    )


# --- As videos without actions ------------------------------------------------------------------------------


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Features to the names of their cameras, without a common beginning where they stay apart."""
    named = {key: printable(key.removeprefix("observation.").removeprefix("images."), 100) for key in keys}
    return named if len(set(named.values())) == len(named) else {key: printable(key, 100) for key in named}


def plan(held: LerobotSet, seconds: float) -> tuple[list[Member], Labels]:
    """The clips of all episodes, file after file, their labels and splits.

    An episode is one clip, or as many of nearly `seconds` as come nearest. Its clips are of one split.
    """
    episodes = held.episodes()
    names = short_names(key for key, kind in held.cameras if kind == VIDEO)
    if not names:
        raise UserError(f"{held.folder}: no camera is a video; read it with demos.source: lerobot")
    splits = hashed_splits([f"episode_{episode.number:06d}" for episode in episodes])
    labels = {text: number for number, text in enumerate(sorted({episode.task for episode in episodes}))}
    members: list[Member] = []
    known: dict[str, Label] = {}
    for key, camera in names.items():
        there = [episode for episode in episodes if not episode.reason]
        views = {episode.number: dict(episode.views)[key] for episode in there}
        there.sort(key=lambda episode: (views[episode.number].path, views[episode.number].begin))
        last = {views[episode.number].path: episode.number for episode in there}
        sizes: dict[str, int] = {}
        frames: collections.Counter[str] = collections.Counter()
        for episode in [*there, *(episode for episode in episodes if episode.reason)]:
            name = f"episode_{episode.number:06d}/{camera}"
            try:
                if episode.reason:
                    raise ValueError(episode.reason)
                view = views[episode.number]
                if view.path not in sizes:
                    sizes[view.path], _ = _stamp(held.folder / view.path)
                frames[view.path] += episode.length
                if frames[view.path] > sizes[view.path]:
                    file = printable(view.path, 100)
                    raise ValueError(f"meta/episodes tells of more frames than {file} has bytes")
                clips = _cut(held, name, episode, view, seconds, last[view.path] == episode.number)
            except ValueError as error:
                clips = [Member(f"{name}#0000", None, str(error))]
            split = episode.split or splits[f"episode_{episode.number:06d}"]
            known |= {clip.id: Label(split, episode.task, labels[episode.task]) for clip in clips}
            members += clips
    return members, Labels(known, labels)


def _cut(
    held: LerobotSet, name: str, episode: EpisodeMeta, view: View, seconds: float, final: bool
) -> list[Member]:
    """The clips of an episode; `final`: the file shows no later one."""
    length, step = episode.length, 1 / held.fps
    if view.end is not None and abs((view.end - view.begin) / (length * step) - 1) < STEADY:
        step = (view.end - view.begin) / length
    count = max(1, min(round(length * step / seconds), length))
    borders = itertools.pairwise(length * number // count for number in range(count + 1))
    return [
        Member(
            f"{name}#{number:04d}",
            None,
            part=held.part(view, end - begin, step, begin, final and end == length),
        )
        for number, (begin, end) in enumerate(borders)
    ]
