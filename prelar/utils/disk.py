"""Room on the disk: what a long job is going to write, and a refusal where clearly too little is free.

The estimates are rough: enough to stop a job of hours that cannot end, no reason to stop one that might.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME_BYTES

CLIP_FRAMES = 45
"""Frames of a clip of Something-Something V2 in the mean."""
EXPANSION = 6
"""Bytes of frames that a byte of its archive becomes: 220,847 clips in about 19 GB."""
CLEARLY = 0.75
"""Share of an estimate that has to be free."""


def free_bytes(path: Path) -> int:
    """Free room for this user on the file system where `path` lies, or will lie."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require(path: Path, needed: int, what: str) -> None:
    """Raise `UserError` where clearly less than `needed` bytes are free for `path`; `what` needs them."""
    free = free_bytes(path)
    if free < CLEARLY * needed:
        raise UserError(
            f"{path}: {format_bytes(free)} free, but {what} takes about {format_bytes(needed)}; free space, "
            "or put the project on a larger disk"
        )


def format_bytes(size: float) -> str:
    """A number of bytes with its unit, in powers of 1000, to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def archive_bytes(clips: int, size: int | None) -> int:
    """Bytes of the store of an archive with labels of `clips` clips and `size` bytes, the lesser estimate."""
    frames = clips * CLIP_FRAMES * FRAME_BYTES
    return frames if size is None else min(frames, size * EXPANSION)
