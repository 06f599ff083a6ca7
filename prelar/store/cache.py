"""Blocks of objects of remote stores, kept on the local disk within a number of bytes.

Set `PRELAR_CACHE_GB` to the gigabytes that a machine has for it; `PRELAR_CACHE` names the folder, which is
`data/.cache` otherwise. A block is a file of its own: it appears whole or not at all, and one of another size
than its block has counts as missing, so that a process or a machine may stop at any moment. Several processes
share a folder; each counts it anew after every sixteenth of the bound that it has written.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from prelar.utils.errors import UserError, shown
from prelar.utils.frames import FRAME_BYTES

GIGABYTES, FOLDER = "PRELAR_CACHE_GB", "PRELAR_CACHE"
BLOCK = 32 * FRAME_BYTES
THREADS = 4

Piece = tuple[str, int, memoryview]
Range = tuple[str, int, int]
Key = tuple[str, int]


class Blocks:
    """The blocks in a folder: a file `<store>/<object>.<number>` each, of at most `most` bytes together.

    Where there is no room, blocks drawn at random make place: when all clips of a store come once an epoch in
    random order, those that were not read for longest are the next that are needed.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._lock = threading.RLock()
        self._scan()

    def size(self, name: str) -> int | None:
        """Bytes of a block, None where it is not kept."""
        return self._sizes.get(name)

    def path(self, name: str) -> str:
        """The file of a block."""
        return f"{self.folder}/{name}"

    def add(self, name: str, content: bytes) -> None:
        """Keep a block; nothing happens where it is larger than all that may be kept, or the disk is full."""
        if len(content) > self.most:
            return
        partial = Path(f"{self.path(name)}.{uuid.uuid4().hex}.{os.getpid()}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            with self._lock:
                if self._written > self.most // 16:
                    self._scan()
                self.forget(name)
                while self.total + len(content) > self.most:
                    place = random.randrange(len(self._names))
                    self._drop(self._names[place], place)
                partial.replace(self.path(name))
                self.total += len(content)
                self._written += len(content)
                self._sizes[name] = len(content)
                self._names.append(name)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _drop(self, name: str, place: int) -> None:
        """Remove the block `name`, which stands at `place`."""
        self._names[place] = self._names[-1]
        self._names.pop()
        self.total -= self._sizes.pop(name)
        with contextlib.suppress(OSError):
            Path(self.path(name)).unlink()

    def forget(self, name: str) -> None:
        """Remove a block that turned out to be missing or not whole."""
        with self._lock:
            if name in self._sizes:
                self._drop(name, self._names.index(name))

    def _scan(self) -> None:
        """Count what lies there, and remove what runs that were killed left half written."""
        sizes: dict[str, int] = {}
        for folder in [item for item in _entries(self.folder) if item.is_dir(follow_symlinks=False)]:
            for item in _entries(Path(folder.path)):
                with contextlib.suppress(OSError):
                    if not item.name.endswith(".partial"):
                        sizes[f"{folder.name}/{item.name}"] = item.stat().st_size
                    elif not _lives(item.name):
                        Path(item.path).unlink()
        self._sizes, self._names = sizes, list(sizes)
        self.total, self._written = sum(sizes.values()), 0
        while self.total > self.most and self._names:
            self._drop(self._names[-1], len(self._names) - 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        return list(found)
    return []


def _lives(partial: str) -> bool:
    """Whether the process that writes a partial file is there."""
    try:
        os.kill(int(partial.split(".")[-2]), 0)
    except (OSError, ValueError, OverflowError):
        return False
    return True


class CachedReader:
    """Fills views with ranges of a store's objects out of blocks that are kept, and fetches missing ones.

    store: names it by its content. size: bytes of an object. fetch: ranges (name, begin, end) of objects.
    """

    def __init__(
        self,
        kept: Blocks,
        store: str,
        size: Callable[[str], int],
        fetch: Callable[[Sequence[Range]], list[bytes]],
    ) -> None:
        self._kept, self._store, self._size, self._fetch = kept, store, size, fetch
        self._fetches: dict[Key, Future[dict[Key, bytes]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fill the view of each piece (name, offset, view)."""
        parts = [part for piece in pieces for part in _parts(piece)]
        pending = self._pending()
        missing = self._missing(key for key, _, _ in parts)
        fresh: dict[Key, bytes] = {}
        for ahead in {found for key in missing if (found := pending.get(key))}:
            if ahead.exception() is None:  # what failed ahead of time is asked for once more below
                fresh |= ahead.result()
        fresh |= self._get([key for key in missing if key not in fresh])
        for key, begin, view in parts:
            content = fresh.get(key)
            if content is None and not self._read(key, begin, view):
                self._kept.forget(self._name(key))
                content = fresh[key] = self._get([key])[key]
            if content is not None:
                view[:] = content[begin : begin + len(view)]

    def prefetch(self, pieces: Sequence[Piece]) -> None:
        """Let threads fetch missing blocks of pieces that will be asked for; their views stay as they are."""
        pending = self._pending()
        keys = self._missing(key for piece in pieces for key, _, _ in _parts(piece))
        if wanted := [key for key in keys if key not in pending]:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cache")
            ahead = self._pool.submit(self._get, wanted)
            pending |= dict.fromkeys(wanted, ahead)
            for key, other in list(pending.items()):
                if other.done() and other is not ahead:
                    pending.pop(key, None)

    def _pending(self) -> dict[Key, Future[dict[Key, bytes]]]:
        """The fetches that threads of this process were given, by block.

        A process that was forked has no such threads, and finds locked what they held: it starts anew.
        """
        if self._process != os.getpid():
            self._kept = _shared(self._kept.folder, self._kept.most, os.getpid())
            self._pool, self._fetches, self._process = None, {}, os.getpid()
        return self._fetches

    def _missing(self, keys: Iterable[Key]) -> list[Key]:
        return [key for key in dict.fromkeys(keys) if self._kept.size(self._name(key)) != self._bytes(key)]

    def _get(self, keys: Sequence[Key]) -> dict[Key, bytes]:
        """Fetch blocks, neighbours as one range, and keep them. Raises `UserError` where one is cut short."""
        runs: list[list[Key]] = []
        for key in sorted(keys):
            if not (runs and runs[-1][-1] == (key[0], key[1] - 1)):
                runs.append([])
            runs[-1].append(key)
        ranges = [(run[0][0], run[0][1] * BLOCK, run[-1][1] * BLOCK + self._bytes(run[-1])) for run in runs]
        found: dict[Key, bytes] = {}
        for run, (name, begin, end), content in zip(
            runs, ranges, self._fetch(ranges) if runs else [], strict=True
        ):
            if len(content) != end - begin:
                raise UserError(f"{name}: cut short; publish the store again")
            for place, key in enumerate(run):
                found[key] = content[place * BLOCK : (place + 1) * BLOCK]
                self._kept.add(self._name(key), found[key])
        return found

    def _read(self, key: Key, begin: int, view: memoryview) -> bool:
        """Fill a view from the file of a block; False where that cannot be."""
        try:
            handle = os.open(self._kept.path(self._name(key)), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return os.preadv(handle, [view], begin) == len(view)
        except OSError:
            return False
        finally:
            os.close(handle)

    def _bytes(self, key: Key) -> int:
        name, number = key
        return min(BLOCK, self._size(name) - number * BLOCK)

    def _name(self, key: Key) -> str:
        return f"{self._store}/{key[0].replace('/', '-')}.{key[1]}"


def _parts(piece: Piece) -> Iterator[tuple[Key, int, memoryview]]:
    """A piece by blocks: which, from where in it, and the part of the view."""
    name, offset, view = piece
    while len(view):
        number, begin = divmod(offset, BLOCK)
        count = min(len(view), BLOCK - begin)
        yield (name, number), begin, view[:count]
        view, offset = view[count:], offset + count


@functools.cache
def _shared(folder: Path, most: int, process: int) -> Blocks:
    return Blocks(folder, most)


def blocks() -> Blocks | None:
    """What the environment gives room to; None for 0 or nothing. Raises `UserError` where it is no number."""
    given = os.environ.get(GIGABYTES, "0")
    try:
        gigabytes = float(given)
        if not 0 <= gigabytes < 1e6:
            raise ValueError
    except ValueError:
        raise UserError(f"{GIGABYTES} = {shown(given)}: give a number of gigabytes, 0 or more") from None
    folder = Path(os.environ.get(FOLDER, "data/.cache")).absolute()
    return _shared(folder, int(gigabytes * 1e9), os.getpid()) if gigabytes else None
