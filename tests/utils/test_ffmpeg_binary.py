"""A machine without ffmpeg is told so in one line, whoever needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from prelar import sample
from prelar.utils import video_file
from prelar.utils.errors import UserError
from prelar.utils.video_file import ffmpeg_binary
from prelar.videos.decode import Decoder

FRAMES = np.zeros((2, 240, 64, 3), dtype=np.uint8)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> str:
        raise RuntimeError("No ffmpeg exe could be found.\nInstall ffmpeg on your system")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", find)
    ffmpeg_binary.cache_clear()


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: Decoder(),
        lambda folder: video_file.write_mp4(folder / "x.mp4", FRAMES, 10),
        lambda folder: sample.encode(FRAMES, 64, folder / "x.webm"),
    ],
    ids=["decoder", "mp4", "webm"],
)
def test_a_missing_binary_is_told(absent: None, tmp_path: Path, use: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match="no ffmpeg binary; reinstall imageio-ffmpeg or set"):
        use(tmp_path)
