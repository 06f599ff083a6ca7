"""TensorBoard and Weights & Biases beside the log: the same scalars by the same names, videos, pictures.

They lie in `reports/loggers/<logger>/`, outside what DVC tracks, since they hold times. A run that resumes
goes on in its log from the step of its snapshot. Nothing goes over the network but to Weights & Biases, and
there only where the user is logged in.
"""

from __future__ import annotations

import io
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import imageio_ffmpeg
import numpy as np
from PIL import Image

from prelar.utils.errors import UserError, extras_named
from prelar.utils.files import remove

LOGGERS = Path("reports/loggers")
WANDB_HOST = "api.wandb.ai"


class Logger(Protocol):
    """Where scalars and videos go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take scalars by name."""

    def video(self, step: int, name: str, path: Path) -> None:
        """Take an MP4."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Take a PNG."""

    def close(self) -> None:
        """Write what is left to write."""


def open_loggers(names: Sequence[str], run: str, key: str, start: int, root: Path = LOGGERS) -> list[Logger]:
    """The loggers of a run: `run` is its stage, `key` its resume key, `start` the steps done before.

    Raises `UserError` where a package lacks.
    """
    with extras_named():
        return [KINDS[name](root / name, run, key, start) for name in dict.fromkeys(names)]


class TensorBoard:
    """Event files in `<folder>/<run>`; videos are GIFs, which its images show."""

    def __init__(self, folder: Path, run: str, key: str, start: int) -> None:
        import tensorboard  # noqa: F401  whose lack torch tells in other words
        from torch.utils.tensorboard import SummaryWriter

        if not start:
            remove(folder / run)
        self._writer: Any = SummaryWriter(str(folder / run), purge_step=start + 1 if start else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Append a video."""
        self._image(step, name, *as_gif(path))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Append a picture."""
        with Image.open(path) as image:
            self._image(step, name, path.read_bytes(), image.size)

    def _image(self, step: int, name: str, content: bytes, size: tuple[int, int]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._writer._get_file_writer().add_summary(
            Summary(value=[Summary.Value(tag=name, image=image)]), step
        )

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `prelar`: as `WANDB_MODE` says, else online where the user is logged in."""

    def __init__(self, folder: Path, run: str, key: str, start: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project="prelar",
            name=run,
            id=key,
            resume="allow",
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append scalars."""
        self._run.log(dict(values), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Append a video."""
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Append a picture."""
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


KINDS: dict[str, Callable[[Path, str, str, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def _logged_in() -> bool:
    """Whether the user has a key of Weights & Biases at hand."""
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return bool(os.environ.get("WANDB_API_KEY")) or WANDB_HOST in known


def as_gif(path: Path) -> tuple[bytes, tuple[int, int]]:
    """An MP4 as an animated GIF, and its width and height."""
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    pictures = [Image.fromarray(np.frombuffer(frame, np.uint8).reshape(height, width, 3)) for frame in reader]
    if not pictures:
        raise UserError(f"{path}: holds no picture; remove it and start again")
    held = io.BytesIO()
    pace = round(1000 / about["fps"])
    pictures[0].save(held, "GIF", save_all=True, append_images=pictures[1:], duration=pace, loop=0)
    return held.getvalue(), (width, height)
