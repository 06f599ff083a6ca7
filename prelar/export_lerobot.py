"""A store as a LeRobotDataset v3.0, as the package lerobot itself lays it out.

Each episode of a store of demonstrations is one with all of its cameras; each clip of another store is one
with the camera `main`. Rows hold the store's arrays as they are (`actions` as `action`, `state` or `gripper`
as `observation.state`), the label as task and, where a model is named, the latent actions that it infers.
Splits follow one another, as info.json names them. Videos are coded in one run a file, so that picture n lies
at n / fps, in AV1 of preset 8 (lerobot's own, 12, spoils every second picture) or in H.264 without B-frames.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from prelar import api
from prelar.store.store import Member, Store
from prelar.utils import files
from prelar.utils.errors import UserError, shown
from prelar.utils.frames import SIZE, Frames
from prelar.utils.video_file import ffmpeg_binary
from prelar.videos import lerobot

VERSION = "v3.0"
CODECS: dict[str, dict[str, Any]] = {
    "av1": {"c:v": "libsvtav1", "preset": 8, "crf": 30, "g": 2},
    "h264": {"c:v": "libx264", "preset": "medium", "crf": 23, "g": 2, "bf": 0},
}
FRAMES_OF_FILE, FILES_OF_CHUNK = 50_000, 1000
ONLY_CAMERA = "main"
SPLITS = ("train", "validation", "test")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
INDICES = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
DATA, VIDEO, EPISODES = lerobot.DATA["v3"], lerobot.VIDEOS["v3"], "meta/episodes/chunk-000/file-000.parquet"

Stats = dict[str, Any]
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode: its clips in the store, by camera, its task, split and length."""

    clips: dict[str, int]
    task: str
    split: str
    length: int


def run(
    path: Path,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    codec: str = "av1",
    fps: float | None = None,
    device: str = "cpu",
    ffmpeg: str | None = None,
) -> None:
    """Write the store at `path` to `folder`, which appears whole or not at all.

    checkpoint: the model whose latent actions become a feature. fps: only clips of that rate, or of none that
    is known. Raises `UserError` where the folder is there, clips are of several rates, or ffmpeg fails.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"--fps {fps:g}: not a rate; give frames a second, above 0")
    if folder.exists():
        raise UserError(f"{folder}: exists already; name another folder, or remove it")
    store = Store.open(path)
    episodes, rate = chosen_episodes(store, fps)
    model = api.load(checkpoint, device) if checkpoint else None
    staged = folder.with_name(f".{folder.name}.partial")
    files.remove(staged)
    writer = _Writer(store, episodes, rate, staged, codec, model, ffmpeg or ffmpeg_binary())
    try:
        writer.write()
        files.sync(staged)
        staged.rename(folder)
    finally:
        files.remove(staged)
    clips = len(episodes) * len(writer.cameras)
    summary = f"{len(episodes)} episodes, {clips} of {store.num_clips} clips, {rate:g} frames a second"
    print(f"export-lerobot: {summary} -> {folder}", flush=True)


def chosen_episodes(store: Store, fps: float | None) -> tuple[list[Episode], float]:
    """The episodes of one rate, split after split, and the rate.

    Members of a joined store may have episodes of one task and number; these stay apart. Raises
    `UserError` where clips are of several rates or none is of the one, and where cameras differ or a name of
    one cannot stand in a set.
    """
    names = ["task", "variation", "episode", "camera", "label", "split", "frames", "fps"]
    rows = store.clip_index.select(names).to_pylist()
    rates = collections.Counter(row["fps"] for row in rows if row["fps"])
    listed = ", ".join(f"{rate:g} ({count} clips)" for rate, count in rates.most_common(5)) or "none"
    if fps is None:
        if len(rates) != 1:
            raise UserError(f"{store.path}: a set has one rate, its clips have {listed}; name one with --fps")
        (fps,) = rates
    found: dict[Any, Episode] = {}
    for number, (row, (member, prefix)) in enumerate(zip(rows, _members(store), strict=True)):
        if row["fps"] and row["fps"] != fps:
            continue
        alone = row["camera"] is None or row["episode"] is None
        key = number if alone else (member, row["task"], row["variation"], row["episode"])
        task = row["label"] or row["task"] or ""
        episode = found.setdefault(key, Episode({}, task, row["split"] or "train", row["frames"]))
        episode.clips[ONLY_CAMERA if alone else row["camera"].removeprefix(prefix)] = number
    if not found:
        raise UserError(f"{store.path}: no clip of {fps:g} frames a second, its clips have {listed}")
    cameras = {tuple(sorted(episode.clips)) for episode in found.values()}
    if len(cameras) != 1:
        listed = "; ".join(", ".join(each) for each in sorted(cameras))
        raise UserError(
            f"{store.path}: episodes have different cameras ({listed}); --fps may choose among them"
        )
    if odd := [camera for camera in next(iter(cameras)) if "/" in camera]:
        raise UserError(f"{store.path}: a camera {shown(odd[0])}; a set's names have no slash, rename it")
    return sorted(found.values(), key=lambda episode: SPLITS.index(episode.split)), fps


def _members(store: Store) -> Iterator[tuple[int, str]]:
    """Of each clip, the member of a joined store that holds it, and what joining put before its camera."""
    for number, member in enumerate(store.members or [Member("", store)]):
        yield from itertools.repeat((number, member.prefix), member.store.num_clips)


class _Writer:
    """Writes the set, file after file."""

    def __init__(
        self,
        store: Store,
        episodes: Sequence[Episode],
        fps: float,
        folder: Path,
        codec: str,
        model: api.Loaded | None,
        ffmpeg: str,
    ) -> None:
        self._store, self._episodes, self._fps, self._folder = store, episodes, fps, folder
        self._codec, self._model, self._ffmpeg = codec, model, ffmpeg
        self.cameras = {camera: f"observation.images.{camera}" for camera in episodes[0].clips}
        self._arrays = _features(store)
        self._tasks = {task: n for n, task in enumerate(dict.fromkeys(each.task for each in episodes))}
        several = len(self.cameras) > 1
        self._latent = {
            camera: f"latent_action.{camera}" if several else "latent_action" for camera in self.cameras
        }
        self._meta: list[pa.Table] = []

    def write(self) -> None:
        """All files of the set."""
        total = sum(episode.length for episode in self._episodes)
        with tqdm(desc="export", total=total * len(self.cameras), unit="frame", disable=None) as bar:
            number = index = 0
            for file, group in enumerate(_files(self._episodes)):
                place = dict(zip(("chunk_index", "file_index"), divmod(file, FILES_OF_CHUNK), strict=True))
                stats, latents = self._write_videos(group, place, bar)
                index = self._write_rows(group, number, index, place, stats, latents)
                number += len(group)
        self._write_meta(total)

    def _write_videos(
        self, group: Sequence[Episode], place: dict[str, int], bar: Any
    ) -> tuple[list[dict[str, Stats]], list[dict[str, Array]]]:
        """A video a camera; returns each episode's statistics of pictures and latent actions."""
        stats: list[dict[str, Stats]] = [{} for _ in group]
        latents: list[dict[str, Array]] = [{} for _ in group]
        for camera, key in self.cameras.items():
            path = self._folder / VIDEO.format(video_key=key, **place)
            with encoder(self._ffmpeg, path, self._codec, self._fps) as give:
                for number, episode in enumerate(group):
                    frames = self._store.read(*self._range(episode.clips[camera]))
                    give(frames)
                    stats[number][key] = picture_stats(frames)
                    if self._model is not None:
                        stride = self._model.spec.stride(self._fps)
                        found = self._model.infer(frames, stride=stride)
                        padded = np.zeros((len(frames), self._model.action_dim), np.float32)
                        padded[: len(found)] = found
                        latents[number][self._latent[camera]] = padded
                    bar.update(len(frames))
        return stats, latents

    def _range(self, clip: int) -> tuple[int, int]:
        return int(self._store.clip_start[clip]), int(self._store.clip_length[clip])

    def _write_rows(
        self,
        group: Sequence[Episode],
        first: int,
        index: int,
        place: dict[str, int],
        stats: list[dict[str, Stats]],
        latents: list[dict[str, Array]],
    ) -> int:
        """The rows of a data file, a row group an episode, and theirs of meta; returns the next index."""
        path = self._folder / DATA.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([pa.field(name, _arrow(*about)) for name, about in self._columns().items()])
        begins, rows = index, []
        with pq.ParquetWriter(path, schema) as writer:
            for number, (episode, of_pictures, latent) in enumerate(
                zip(group, stats, latents, strict=True), first
            ):
                start, length = self._range(next(iter(episode.clips.values())))
                values = {
                    name: array[start : start + length] for name, array in self._arrays.items()
                } | latent
                counted = np.arange(length)
                values |= {
                    "timestamp": (counted / self._fps).astype(np.float32),
                    "frame_index": counted,
                    "episode_index": np.full(length, number),
                    "index": index + counted,
                    "task_index": np.full(length, self._tasks[episode.task]),
                }
                columns = [_column(values[field.name], field.type) for field in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=length)
                found = of_pictures | {name: number_stats(column) for name, column in values.items()}
                rows.append(self._described(episode, number, index, index - begins, place, found))
                index += length
        self._meta.append(pa.Table.from_pylist(rows))
        return index

    def _described(
        self,
        episode: Episode,
        number: int,
        index: int,
        before: int,
        place: dict[str, int],
        stats: dict[str, Stats],
    ) -> dict[str, Any]:
        """A row of meta/episodes; `before` frames lie before the episode in its files."""
        row: dict[str, Any] = {"episode_index": number, "tasks": [episode.task], "length": episode.length}
        row |= {f"data/{name}": value for name, value in place.items()}
        row |= {"dataset_from_index": index, "dataset_to_index": index + episode.length}
        times = {"from_timestamp": before / self._fps, "to_timestamp": (before + episode.length) / self._fps}
        for key in self.cameras.values():
            row |= {f"videos/{key}/{name}": value for name, value in {**place, **times}.items()}
        for key, about in stats.items():
            row |= {f"stats/{key}/{name}": value for name, value in about.items()}
        return {**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}

    def _columns(self) -> dict[str, tuple[str, int]]:
        """Columns of the data files: dtype and width."""
        columns = {name: ("float32", array.shape[1]) for name, array in self._arrays.items()}
        if self._model is not None:
            columns |= dict.fromkeys(self._latent.values(), ("float32", self._model.action_dim))
        return columns | {"timestamp": ("float32", 1)} | {name: (kind, 1) for name, kind in INDICES.items()}

    def _write_meta(self, total: int) -> None:
        folder = self._folder
        (folder / EPISODES).parent.mkdir(parents=True)
        meta = pa.concat_tables(self._meta).combine_chunks()
        pq.write_table(meta, folder / EPISODES)
        texts = pd.Index(list(self._tasks), dtype=object, name="task")
        pd.DataFrame({"task_index": range(len(texts))}, index=texts).to_parquet(folder / "meta/tasks.parquet")
        keys = [*self.cameras.values(), *self._columns()]
        pooled = {key: pooled_stats(_stats_of(meta, key)) for key in keys}
        files.write_text(folder / "meta/stats.json", json.dumps(pooled, indent=4))
        files.write_text(folder / lerobot.INFO, json.dumps(self._info(total), indent=4))

    def _info(self, total: int) -> dict[str, Any]:
        fps = int(self._fps) if self._fps == int(self._fps) else self._fps
        options = CODECS[self._codec]
        about = {"height": SIZE, "width": SIZE, "codec": self._codec, "pix_fmt": "yuv420p", "fps": fps}
        about |= {"channels": 3, "g": options["g"], "crf": options["crf"], "preset": options["preset"]}
        notes = {f"video.{name}": value for name, value in about.items()}
        video: dict[str, Any] = {
            "dtype": "video",
            "shape": [SIZE, SIZE, 3],
            "names": ["height", "width", "channels"],
        }
        video["info"] = {**notes, "has_audio": False, "is_depth_map": False}
        features: dict[str, Any] = dict.fromkeys(self.cameras.values(), video)
        for name, (kind, width) in self._columns().items():
            plain = name == "timestamp" or name in INDICES
            names = None if plain else [f"{name.rpartition('.')[2]}_{number}" for number in range(width)]
            features[name] = {"dtype": kind, "shape": [width], "names": names}
        counts = collections.Counter(episode.split for episode in self._episodes)
        ends = list(itertools.accumulate(counts[split] for split in SPLITS))
        borders = {s: f"{end - counts[s]}:{end}" for s, end in zip(SPLITS, ends, strict=True) if counts[s]}
        return {
            "codebase_version": VERSION,
            "fps": fps,
            "features": features,
            "total_episodes": len(self._episodes),
            "total_frames": total,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_OF_CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "data_path": DATA,
            "video_path": VIDEO,
            "robot_type": None,
            "splits": borders,
        }


def _features(store: Store) -> dict[str, Array]:
    """The store's arrays by the features' names."""
    names = [name for name in store.shapes() if store.has(name)]
    called = {"actions": "action", "state": "observation.state"}
    if "state" not in names:
        called["gripper"] = "observation.state"
    return {called.get(name, f"observation.{name}"): store.array(name) for name in names}


def _files(episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
    """The episodes of each file: at most `FRAMES_OF_FILE` frames, unless one alone has more."""
    held: list[Episode] = []
    for episode in episodes:
        if held and sum(each.length for each in held) + episode.length > FRAMES_OF_FILE:
            yield held
            held = []
        held.append(episode)
    yield held


def _arrow(kind: str, width: int) -> pa.DataType:
    value = pa.from_numpy_dtype(np.dtype(kind))
    return value if width == 1 else pa.list_(value, width)


def _column(values: Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.array(values.reshape(-1), kind)


@contextlib.contextmanager
def encoder(ffmpeg: str, path: Path, codec: str, fps: float) -> Iterator[Any]:
    """What takes frames uint8 (T, 64, 64, 3) and codes them to a file. `UserError` where ffmpeg fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-framerate", f"{fps:.10g}"]
    options = [word for key, value in CODECS[codec].items() for word in (f"-{key}", str(value))]
    exact = ["-threads", "1", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact"]
    words = [
        ffmpeg,
        "-v",
        "error",
        "-y",
        *raw,
        "-i",
        "pipe:",
        *options,
        "-pix_fmt",
        "yuv420p",
        *exact,
        str(path),
    ]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=said, env={**os.environ, "SVT_LOG": "1"}
        )
        assert process.stdin is not None
        whole = False
        try:
            with contextlib.suppress(BrokenPipeError):
                stdin = process.stdin
                yield lambda frames: stdin.write(np.ascontiguousarray(frames).data)
                stdin.close()
            whole = True
        finally:
            if not whole:
                process.kill()
            status = process.wait()
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
    if status:
        raise UserError(
            f"{path}: ffmpeg failed ({lines[-1] if lines else status}); free space, try --codec "
            f"{'h264' if codec == 'av1' else 'av1'}, or name another ffmpeg"
        )


# --- Statistics ---------------------------------------------------------------------------------------------


def number_stats(values: Array) -> Stats:
    """Statistics of a column (T, D) or (T,), lists of D numbers."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    made = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    listed: Stats = {name: each.tolist() for name, each in made.items()}
    quantiles = {name: np.quantile(rows, share, axis=0).tolist() for name, share in QUANTILES.items()}
    return {**listed, "count": [len(rows)], **quantiles}


def picture_stats(frames: Frames) -> Stats:
    """Statistics of pictures' channels, which lie in [0, 1], as lists of shape (3, 1, 1)."""
    counts = np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])
    levels, shares = np.arange(256) / 255, counts / counts[0].sum()
    mean = shares @ levels
    made = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0)),
    }
    reached = shares.cumsum(1)
    quantiles = {name: levels[(reached < share - 1e-12).sum(1)] for name, share in QUANTILES.items()}
    listed = {name: each.reshape(3, 1, 1).tolist() for name, each in (made | quantiles).items()}
    return {**listed, "count": [len(frames)]}


def _stats_of(meta: pa.Table, key: str) -> dict[str, Array]:
    """The statistics of a feature by name, a row an episode, of meta/episodes."""
    names = ("min", "max", "mean", "std", "count", *QUANTILES)
    return {name: np.array(meta[f"stats/{key}/{name}"].to_pylist(), np.float64) for name in names}


def pooled_stats(held: dict[str, Array]) -> Stats:
    """Statistics over episodes: pooled mean and deviation; quantiles are weighted means, as in lerobot.

    held: those of the episodes by name, float64 with a row an episode.
    """
    counts = held["count"].reshape(-1, *[1] * (held["mean"].ndim - 1))
    share = counts / counts.sum()
    mean = (held["mean"] * share).sum(0)
    spread = ((held["std"] ** 2 + (held["mean"] - mean) ** 2) * share).sum(0)
    made = {"min": held["min"].min(0), "max": held["max"].max(0), "mean": mean, "std": np.sqrt(spread)}
    made |= {name: (held[name] * share).sum(0) for name in QUANTILES}
    return {**{name: each.tolist() for name, each in made.items()}, "count": [int(counts.sum())]}
