"""A contact sheet for each label of a store: what its clips look like, moment by moment.

A row is a clip, its frames evenly spread over its length. Of demonstrations the rows are the cameras of the
label's first episode, of other videos its first clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prelar.data.store import Store
from prelar.evaluation.panels import contact_sheet, write_png
from prelar.spread import evenly

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
    picks = evenly(len(names), LABELS)
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
