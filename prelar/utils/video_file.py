"""Videos that browsers play, as a pure function of their frames."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from prelar.utils.errors import UserError
from prelar.utils.files import atomic_file


@functools.cache
def ffmpeg_binary() -> str:
    """Path of the ffmpeg binary: the static one of imageio-ffmpeg unless IMAGEIO_FFMPEG_EXE names another.

    Raises `UserError` where there is none.
    """
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        raise UserError("no ffmpeg binary; reinstall imageio-ffmpeg or set IMAGEIO_FFMPEG_EXE") from None


def enlarge(frames: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Repeat every pixel of frames (…, H, W, 3) `factor` times in both directions (nearest neighbour)."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def side_by_side(
    truth: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8], *, observed: int, factor: int = 3
) -> npt.NDArray[np.uint8]:
    """Videos that compare predictions with what happened, frames uint8 (T, H', W', 3).

    `truth` and `predicted` are uint8 (N, T, H, W, 3). Each of the N clips is a row: truth, prediction,
    absolute difference, enlarged `factor` times. A bar above the predictions is grey while frames are
    observed, the first `observed`, and orange where the model predicts without seeing.
    """
    error = np.abs(truth.astype(np.int16) - predicted).astype(np.uint8)
    clips, length, height, width, _ = truth.shape
    gap, cell, bar = 4, (height * factor, width * factor), 8
    size = (bar + clips * (cell[0] + gap), 3 * cell[1] + 2 * gap)
    canvas = np.full((length, *size, 3), 255, dtype=np.uint8)
    for row in range(clips):
        top = bar + gap + row * (cell[0] + gap)
        for column, video in enumerate((truth, predicted, error)):
            left = column * (cell[1] + gap)
            place = canvas[:, top : top + cell[0], left : left + cell[1]]
            place[:] = enlarge(video[row], factor)
    middle = slice(cell[1] + gap, 2 * cell[1] + gap)
    canvas[:observed, :bar, middle] = (150, 150, 150)
    canvas[observed:, :bar, middle] = (230, 120, 0)
    return canvas


def write_mp4(path: Path, frames: npt.NDArray[np.uint8], fps: float) -> None:
    """Write frames uint8 (T, H, W, 3), RGB, as an H.264 video of even sides; it appears whole or not at all.

    Odd sides are padded by their last row or column. Same frames and same ffmpeg: same bytes. Raises
    `ValueError` for other shapes, `UserError` where ffmpeg fails.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: not uint8 (T, H, W, 3)")
    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    height, width = even.shape[1:3]
    with atomic_file(path) as partial:
        command = (
            ffmpeg.input(
                "pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=f"{fps:g}"
            )
            .output(
                f"file:{partial}",  # so that no other protocol or option is read off its name
                format="mp4",
                vcodec="libx264",
                pix_fmt="yuv420p",
                crf=18,
                preset="medium",
                threads=1,
                movflags="+faststart",
                map_metadata=-1,
                fflags="+bitexact",
                flags="+bitexact",
            )
            .global_args("-v", "error", "-nostdin", "-y")
            .compile(cmd=ffmpeg_binary())
        )
        done = subprocess.run(command, input=even.tobytes(), capture_output=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines() or [
                f"exit status {done.returncode}"
            ]
            raise UserError(f"{path}: ffmpeg failed ({reason[-1]}); free space or try another ffmpeg")
