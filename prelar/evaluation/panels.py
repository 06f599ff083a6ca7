"""Pictures and videos put together from 64×64 frames: all functions of arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from prelar.files import atomic_file
from prelar.spread import evenly

Frames = npt.NDArray[np.uint8]

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
    picks = evenly(len(truth), columns)
    cells = np.stack([truth[picks], predicted[picks], error_image(truth[picks], predicted[picks])])
    image = grid(cells)
    first = int(np.searchsorted(picks, observed))
    if 0 < first < len(picks):
        x = first * (truth.shape[2] + GAP) - GAP
        image[:, x : x + GAP] = MARK
    return image


def abreast(episodes: list[Frames], marked: list[bool], height: int = 4) -> Frames:
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
