"""Pictures and videos put together from 64×64 frames: all functions of arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from PIL import Image

from prelar.store.store import Store
from prelar.utils.files import atomic_file
from prelar.utils.frames import Frames
from prelar.utils.tables import evenly_spaced_indices

MARK = (240, 164, 96)
GAP = 2
PAPER = 128


def write_png(path: Path, image: Frames) -> None:
    """Write an image uint8 (H, W, 3), RGB; it appears whole or not at all."""
    with atomic_file(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")


def error_image(truth: Frames, predicted: Frames) -> Frames:
    """The absolute difference of frames of the same shape, channel by channel."""
    return np.abs(truth.astype(np.int16) - predicted).astype(np.uint8)


def grid(cells: Frames, gap: int = GAP) -> Frames:
    """Cells (R, C, …, H, W, 3) in R rows and C columns, grey between them: (…, R·H', C·W', 3)."""
    rows, columns = cells.shape[:2]
    height, width = cells.shape[-3:-1]
    whole = np.full(
        (*cells.shape[2:-3], rows * (height + gap) - gap, columns * (width + gap) - gap, 3), PAPER, np.uint8
    )
    for r in range(rows):
        for c in range(columns):
            y, x = r * (height + gap), c * (width + gap)
            whole[..., y : y + height, x : x + width, :] = cells[r, c]
    return whole


def strip(truth: Frames, predicted: Frames, observed: int, columns: int = 8) -> Frames:
    """A film strip of one clip (T, H, W, 3): truth, prediction, error, time from left to right.

    The columns are spread evenly over the clip; a coloured line stands before the first that was predicted.
    """
    picks = evenly_spaced_indices(len(truth), columns)
    cells = np.stack([truth[picks], predicted[picks], error_image(truth[picks], predicted[picks])])
    image = grid(cells)
    first = int(np.searchsorted(picks, observed))
    if 0 < first < len(picks):
        x = first * (truth.shape[2] + GAP) - GAP
        image[:, x : x + GAP] = MARK
    return image


def tile_horizontally(episodes: list[Frames], marked: list[bool], height: int = 4) -> Frames:
    """A video of episodes (T, H, W, 3) in one row, each held on its last frame until the longest ends.

    A coloured bar of `height` pixels lies under those that are marked. Returns (T, H', W', 3).
    """
    longest = max(len(frames) for frames in episodes)
    cells = []
    for frames, mark in zip(episodes, marked, strict=True):
        held = np.concatenate([frames, np.repeat(frames[-1:], longest - len(frames), 0)])
        bar = np.full((longest, height, frames.shape[2], 3), MARK if mark else PAPER, np.uint8)
        cells.append(np.concatenate([held, bar], axis=1))
    return grid(np.stack(cells)[None])


def contact_sheet(frames: Frames, columns: int = 8) -> Frames:
    """Frames (N, H, W, 3) in rows of `columns`; places left over stay grey."""
    rows = -(-len(frames) // columns)
    columns = min(columns, len(frames))
    cells = np.full((rows * columns, *frames.shape[1:]), PAPER, np.uint8)
    cells[: len(frames)] = frames
    return grid(cells.reshape(rows, columns, *frames.shape[1:]))


SHEET = 32
EXAMPLES = 5


def describe(store: Store) -> dict[str, Any]:
    """Sizes, splits and attributes of a store, and what was left out of it and why."""
    bad = store.index.filter(pc.equal(store.index["status"], "bad"))
    reasons: dict[str, list[str]] = {}
    for row in bad.select(["id", "reason"]).to_pylist():
        reasons.setdefault(row["reason"], []).append(row["id"])
    counts = pc.value_counts(store.clip_index["split"]).to_pylist()
    return {
        "frames": store.num_frames,
        "clips": store.num_clips,
        "pairs": int((store.clip_length - 1).sum()),
        "labels": len(pc.unique(store.clip_index["label"])),
        "splits": {item["values"]: item["counts"] for item in sorted(counts, key=lambda i: str(i["values"]))},
        "bad": len(bad),
        "shortest": int(store.clip_length.min()),
        "longest": int(store.clip_length.max()),
        "median": float(np.median(store.clip_length)),
        "sheet": len(evenly_spaced_indices(store.num_clips, SHEET)),
        "reasons": [
            {"reason": reason, "count": len(ids), "examples": ids[:EXAMPLES]}
            for reason, ids in sorted(reasons.items())
        ],
        "attributes": {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in store.attrs.items()
        },
    }


def overview(store: Store) -> Frames:
    """A contact sheet of the middle frames of at most `SHEET` clips, spread evenly over the store."""
    picks = evenly_spaced_indices(store.num_clips, SHEET)
    middles = store.clip_start[picks] + store.clip_length[picks] // 2
    return contact_sheet(store.read_many(middles, 1)[:, 0])


LABELS = 24
CLIPS = 3
MOMENTS = 8


def write_previews(store: Store, folder: Path) -> list[dict[str, Any]]:
    """Write a picture for each label, for `LABELS` of them spread evenly where there are more.

    Returns what the pictures show, in the order of the labels: `label`, `file` (its name in `folder`),
    `clips` (how many the label has) and `rows` (cameras or clips of the picture, from the top).
    """
    columns = ["label", "id", "camera", "variation", "episode", "start", "frames"]
    labels: dict[str, list[dict[str, Any]]] = {}
    for row in store.clip_index.select(columns).to_pylist():
        labels.setdefault(str(row["label"]), []).append(row)
    names = sorted(labels)
    picks = evenly_spaced_indices(len(names), LABELS)
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for number, pick in enumerate(picks.tolist()):
        clips = labels[names[pick]]
        rows = first_of(clips)
        file = f"{number:02d}.png"
        write_png(folder / file, contact_sheet(moments(store, rows), columns=MOMENTS))
        titles = [row["camera"] or row["id"] for row in rows]
        shown.append({"label": names[pick], "file": file, "clips": len(clips), "rows": titles})
    return shown


def first_of(clips: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The clips of one label that its picture shows."""
    first = clips[0]
    if first["camera"] is None:
        return list(clips[:CLIPS])
    return [row for row in clips if all(row[key] == first[key] for key in ("variation", "episode"))]


def moments(store: Store, clips: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.uint8]:
    """Frames (clips · MOMENTS, H, W, 3), those of a clip one after the other."""
    spread = [row["start"] + np.linspace(0, row["frames"] - 1, MOMENTS).round().astype(int) for row in clips]
    return store.read_many(np.concatenate(spread), 1)[:, 0]
