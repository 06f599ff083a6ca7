"""Files and folders that are either whole or absent, and locks that name their holder."""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prelar.utils.errors import UserError, one_line, printable

LOCKS = Path("data/.locks")
STAGING = Path("data/.staging")
RESUME, RESUME_FOLDER = Path("data/.resume"), "PRELAR_RESUME"
"""Where snapshots lie, and the variable that names an absolute folder in its place."""
DEPTH = 64

_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


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


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file from elsewhere. Raises `ValueError` for others and for more than `most`."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file" if path.exists() else "missing")
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > most:
                raise ValueError(f"{size} bytes, more than {most}")
            return handle.read(size)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def parse_json(content: bytes | str) -> Any:
    """Parse JSON from elsewhere. Whatever is wrong with it is a `ValueError` that says so in a short line.

    Refused are a key that stands twice in an object, text that is no Unicode, and more than `DEPTH` levels.
    """
    try:
        text = content.decode(json.detect_encoding(content)) if isinstance(content, bytes) else content
        text.encode()
        parsed = json.loads(text, object_pairs_hook=_object)
        level = [parsed]
        for _ in range(DEPTH + 1):
            level = [inner for value in level for inner in _inside(value)]
        if level:
            raise ValueError("nested too deeply")
        if _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeError:
        raise ValueError("holds text that is no Unicode") from None
    except MemoryError:
        raise ValueError("too large") from None
    except ValueError as error:
        raise ValueError(one_line(error)) from None
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {printable(twice, 100)} stands twice in an object")
    return made


def _inside(value: Any) -> Iterable[Any]:
    """The objects and arrays right inside a value of JSON."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in held if isinstance(inner, dict | list)]


def walk(folder: Path) -> Iterator[Path]:
    """Every path below a folder that is no folder. Links to folders are followed, no folder is entered twice.

    What lies in the folder itself comes before what only links lead to, so that it keeps its name where links
    are added. A folder that cannot be looked into is named on the standard error.
    """
    folders, links = [folder], collections.deque[Path]()
    entered: set[tuple[int, int]] = set()
    while folders or links:
        place = folders.pop() if folders else links.popleft()
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = [(path, path.is_dir()) for path in sorted(place.iterdir())]
        except OSError as error:
            message = printable(f"{place}: cannot be looked into ({error.strerror}); passed over")
            print(message, file=sys.stderr, flush=True)
            continue
        for path, enclosing in entries:
            if enclosing:
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path


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

    The old artefact is first renamed aside, so that the final name never shows a mixture; before that, a new
    one on another file system is copied beside its final name. What runs that were killed in here left behind
    is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(final.parent, final.name):
        remove(left)
    mark = uuid.uuid4().hex[:8]
    beside, aside = (final.with_name(f".{final.name}.{mark}.{state}") for state in ("new", "old"))
    ready = staged
    if _apart(staged.parent, final.parent):
        ready = beside
        _copy(staged, beside, _copy_file)
    if ready.is_dir():
        for item in ready.rglob("*"):
            sync(item)
    sync(ready)
    if final.exists() or final.is_symlink():
        final.replace(aside)
    ready.replace(final)
    sync(final.parent)
    remove(aside)
    remove(staged)


def leftovers(folder: Path, name: str) -> list[Path]:
    """What runs that were killed while publishing `name`, or what begins so, left in a folder."""
    return [path for state in ("new", "old") for path in folder.glob(f".{name}.*.{state}")]


def _apart(folder: Path, other: Path) -> bool:
    """Whether nothing can be renamed from one folder into the other: they lie on two file systems."""
    name = f".{uuid.uuid4().hex}.partial"
    try:
        (folder / name).touch()
        (folder / name).replace(other / name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return True
    finally:
        for place in (folder, other):
            (place / name).unlink(missing_ok=True)
    return False


def link(source: Path, copy: Path) -> None:
    """Give a finished file, or every file of a folder, a second name in `copy`, which takes no room.

    Where the file system has no such links, the bytes are copied. Neither name may be written to any more.
    """
    remove(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    _copy(source, copy, _link_file)


def _copy(source: Path, copy: Path, copy_file: Callable[[Path, Path], object]) -> None:
    """Copy a file, or a folder file by file, and keep nothing where that fails.

    `shutil.copytree` goes on after an error, and no longer knows in the end that the disk is full.
    """
    try:
        if not source.is_dir():
            copy_file(source, copy)
            return
        copy.mkdir()
        for item in sorted(source.rglob("*")):
            place = copy / item.relative_to(source)
            if item.is_dir() and not item.is_symlink():
                place.mkdir()
            else:
                copy_file(item, place)
    except BaseException:
        remove(copy)
        raise


def _copy_file(source: Path, copy: Path) -> None:
    shutil.copy2(source, copy, follow_symlinks=False)


def _link_file(source: Path, copy: Path) -> None:
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
        _copy_file(source, copy)


@contextlib.contextmanager
def exclusive(target: Path | str) -> Iterator[None]:
    """Hold the operating system's lock on an artefact while writing it.

    The lock ends with the process that holds it, however that process ends. A second writer gets a
    `UserError` at once that names the holder's PID.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    name = os.path.relpath(target).replace("/", "-")
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
