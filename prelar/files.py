"""Files and folders that are either whole or absent, and locks that name their holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from prelar.errors import UserError

LOCKS = Path("data/.locks")
STAGING = Path("data/.staging")


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; rename it over `path` when the block succeeds.

    A crash leaves the old file, or none, under the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def code_digests(*modules: str) -> dict[str, str]:
    """sha256 of the source of imported modules, by name."""
    return {name: digest(Path(str(sys.modules[name].__file__))) for name in modules}


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; nothing happens where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def publish(staged: Path, final: Path) -> None:
    """Move a finished file or folder to its final name, replacing what is there.

    The old artefact is first renamed aside, so that the final name never shows a mixture. What runs that were
    killed in here left aside is removed. Both paths lie on one file system.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if staged.is_dir():
        for item in staged.rglob("*"):
            sync(item)
    sync(staged)
    for left in final.parent.glob(f".{final.name}.*.old"):
        remove(left)
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
    if final.exists() or final.is_symlink():
        final.replace(aside)
    staged.replace(final)
    sync(final.parent)
    remove(aside)


def link(source: Path, copy: Path) -> None:
    """Give a finished file, or every file of a folder, a second name in `copy`, which takes no room.

    Where the file system has no such links, the bytes are copied. Neither name may be written to any more.
    """
    remove(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, copy, copy_function=_link_file)
    else:
        _link_file(source, copy)


def _link_file(source: Path | str, copy: Path | str) -> None:
    try:
        os.link(source, copy)
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.EXDEV,
            errno.ENOTSUP,
            errno.EOPNOTSUPP,
            errno.EMLINK,
            errno.ENOSYS,
        ):
            raise
        shutil.copy2(source, copy)


@contextlib.contextmanager
def exclusive(target: Path | str) -> Iterator[None]:
    """Hold the operating system's lock on an artefact while writing it.

    The lock ends with the process that holds it, however that process ends. A second writer gets a
    `UserError` at once that names the holder's PID.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    name = str(target).strip("/").replace("/", "-")
    with (LOCKS / f"{name}.lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise UserError(
                f"{target}: process {holder} is writing it; wait for it or stop it, then run this again"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
