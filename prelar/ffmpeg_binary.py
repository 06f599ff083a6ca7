"""Which ffmpeg is used where the user names none."""

from __future__ import annotations

import functools

import imageio_ffmpeg

from prelar.errors import UserError


@functools.cache
def ffmpeg_binary() -> str:
    """Path of the ffmpeg binary: the static one of imageio-ffmpeg unless IMAGEIO_FFMPEG_EXE names another.

    Raises `UserError` where there is none.
    """
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        raise UserError("no ffmpeg binary; reinstall imageio-ffmpeg or set IMAGEIO_FFMPEG_EXE") from None
