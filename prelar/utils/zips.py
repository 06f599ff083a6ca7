"""Zip files from elsewhere: opened within bounds, and all the errors that reading one can raise."""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from pathlib import Path

MAX_DIRECTORY = 4 << 20
ERRORS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError, KeyError, IndexError, OverflowError),
)
"""What opening and reading a zip can raise where it is broken, locked or of an unknown compression."""


class _Bounded(io.FileIO):
    """A file of which no more than `MAX_DIRECTORY` bytes are read at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise ValueError(f"a directory of {size} bytes, more than {MAX_DIRECTORY}")
        return super().read(-1 if size is None else size)


def begins_zip(path: Path) -> bool:
    """Whether a file begins as zips do; what cannot be read does not."""
    try:
        with path.open("rb") as handle:
            return handle.read(2) == b"PK"
    except OSError:
        return False


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file for reading. Raises one of `ERRORS`, and so may all that is read of it.

    Its directory is bounded before it is read. No name may stand in it twice, and nothing may claim more
    bytes than the file has.
    """
    if not path.is_file():
        raise ValueError("not a regular file")
    with _Bounded(path) as handle, zipfile.ZipFile(handle) as archive:
        entries, size = archive.infolist(), path.stat().st_size
    if any(entry.compress_size > size for entry in entries):
        raise ValueError("what is packed claims more bytes than the file has")
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice in its directory")
    return zipfile.ZipFile(path)
