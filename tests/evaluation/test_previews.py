"""The contact sheets of labels: which clips they show, and at which moments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from prelar.evaluation import panels
from prelar.evaluation.panels import GAP, MOMENTS, write_previews
from prelar.store.store import Store
from prelar.store.writer import StoreWriter


def make_store(path: Path, rows: list[dict[str, object]]) -> Store:
    """A clip a row, of 5 frames each; frame t of clip n is of colour 40 t + n."""
    with StoreWriter(path) as writer:
        for number, row in enumerate(rows):
            colours = np.arange(5, dtype=np.uint8) * 40 + number
            frames = np.broadcast_to(colours[:, None, None, None], (5, 64, 64, 3))
            writer.append(np.ascontiguousarray(frames), {"id": f"clip {number}", "split": "train", **row})
        return writer.finish({})


def colours(path: Path) -> list[list[int]]:
    """The red of each cell of a sheet, row by row."""
    return np.asarray(Image.open(path))[:: 64 + GAP, :: 64 + GAP, 0].tolist()


def test_videos_show_the_first_clips_of_each_label(tmp_path: Path) -> None:
    labels = ["b", "a", "a", "b", "a", "a"]
    store = make_store(tmp_path / "x.zarr", [{"label": label} for label in labels])
    shown = write_previews(store, tmp_path / "previews")
    assert [(each["label"], each["clips"]) for each in shown] == [("a", 4), ("b", 2)]
    assert [each["rows"] for each in shown] == [["clip 1", "clip 2", "clip 4"], ["clip 0", "clip 3"]]
    moments = np.linspace(0, 4, MOMENTS).round().astype(int) * 40
    assert colours(tmp_path / "previews" / shown[0]["file"]) == [(moments + n).tolist() for n in (1, 2, 4)]


def test_demonstrations_show_all_cameras_of_the_first_episode(tmp_path: Path) -> None:
    rows = [
        {
            "label": "open_door",
            "task": "open_door",
            "variation": variation,
            "episode": episode,
            "camera": camera,
        }
        for variation, episode in ((1, 0), (1, 1), (0, 0))
        for camera in ("wrist", "front")
    ]
    (shown,) = write_previews(make_store(tmp_path / "x.zarr", rows), tmp_path / "previews")
    assert shown["rows"] == ["wrist", "front"] and shown["clips"] == 6
    assert [row[0] for row in colours(tmp_path / "previews" / shown["file"])] == [0, 1]


def test_many_labels_are_shown_in_part(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"label": f"label {n:02d}"} for n in range(2 * panels.LABELS)]
    shown = write_previews(make_store(tmp_path / "x.zarr", rows), tmp_path / "previews")
    assert len(shown) == panels.LABELS == len(list((tmp_path / "previews").iterdir()))
    assert (shown[0]["label"], shown[-1]["label"]) == ("label 00", "label 47")
