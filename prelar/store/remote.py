"""Stores kept away from the project, in object storage or a folder that several projects share.

A published store is the folder `<data_root>/<name>/<id>` with the objects of the store, its index, and,
written last, `manifest.json`: name, size and sha256 of every object. Without its manifest it is not a store.
`<id>` begins the manifest's sha256, so the same store has the same place whoever publishes it, another one
never takes it, and an upload that was killed goes on where it was.

In the project stands a pointer instead of the store, `data/<name>.zarr/pointer.json`, with the store's URL
and the sha256 of its manifest. DVC tracks the pointer, and so knows when the store is another one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from prelar.store import cache
from prelar.store.cache import Piece
from prelar.utils import files
from prelar.utils.errors import UserError, one_line, shown
from prelar.utils.urls import check_url


class Objects:
    """The objects whose names begin with a URL. Safe from threads and after a fork."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` for other kinds of URL than stores are published at; nothing is asked for."""
        try:
            check_url(url)
        except ValueError as error:
            raise UserError(f"{url.rpartition('@')[2]}: cannot be used ({error})") from None
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    @property
    def local(self) -> Path | None:
        """The folder, where the URL names one of this machine."""
        system, base = self._place()
        return Path(base) if isinstance(system, LocalFileSystem) else None

    def sizes(self) -> dict[str, int]:
        """Bytes of every object there now, by name; empty where there is none."""
        with self._failing():
            system, base = self._place()
            system.invalidate_cache()
            found = system.find(base, detail=True)
            return {name[len(base) :].strip("/"): int(about["size"]) for name, about in found.items()}

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where there is none."""
        with self._failing(name):
            system, base = self._place()
            try:
                about = system.info(f"{base}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(about["size"]) if about["type"] == "file" else None

    def read(self, name: str) -> bytes:
        """The bytes of an object. Raises `UserError` where there is none."""
        with self._failing(name):
            system, base = self._place()
            content: bytes = system.cat_file(f"{base}/{name}")
            return content

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes `begin` to `end` of objects, each wanted as (name, begin, end), asked for all at once."""
        with self._failing(wanted[0][0] if wanted else ""):
            system, base = self._place()
            names = [f"{base}/{name}" for name, _, _ in wanted]
            begins, ends = [begin for _, begin, _ in wanted], [end for _, _, end in wanted]
            found: list[bytes] = system.cat_ranges(names, begins, ends, on_error="raise")
            return found

    def put(self, name: str, path: Path) -> None:
        """Make an object of a finished file, which is not written to any more."""
        with self._failing(name):
            if self.local:
                with files.atomic_file(self.local / name) as partial:
                    files.link(path, partial)
                return
            system, base = self._place()
            system.put_file(str(path), f"{base}/{name}")

    def put_bytes(self, name: str, content: bytes) -> None:
        """Make an object of some bytes."""
        with self._failing(name):
            if self.local:
                with files.atomic_file(self.local / name) as partial:
                    partial.write_bytes(content)
                return
            system, base = self._place()
            system.pipe_file(f"{base}/{name}", content)

    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        with self._failing():
            system, base = fsspec.core.url_to_fs(self.url)
            return system, str(base).rstrip("/")

    @contextlib.contextmanager
    def _failing(self, name: str = "") -> Iterator[None]:
        """Tell what any kind of storage raises in one line."""
        shown = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{shown}: not there; check the URL, or build the store again") from None
        except (ImportError, ValueError) as error:
            raise UserError(f"{shown}: cannot be used ({_line(error)})") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{shown}: {_line(error)}; check the URL, the network and the credentials in the environment"
            ) from None


def _line(error: Exception) -> str:
    return one_line(error)[:300]


SCHEMA = 1
MANIFEST = "manifest.json"
POINTER = "pointer.json"
MANIFEST_BYTES, POINTER_BYTES = 16 << 20, 1 << 16
PARALLEL = 4


def publish(
    root: str, store: Path, index: Path, progress: Callable[[int], object] = lambda count: None
) -> dict[str, Any]:
    """Publish a finished store and its index below the URL `root`, and return what a pointer to it holds.

    Objects that are there already are not sent again; `progress(n)` hears of every n bytes that are in place.
    Raises `UserError` where the storage cannot be reached or holds objects of other sizes in the end.
    """
    parts = {f"{store.name}/{path.relative_to(store).as_posix()}": path for path in store.rglob("*")}
    parts = {name: path for name, path in sorted(parts.items()) if path.is_file()} | {index.name: index}
    listed = {
        name: {"size": path.stat().st_size, "sha256": files.digest(path)} for name, path in parts.items()
    }
    manifest = {"schema": SCHEMA, "store": store.name, "index": index.name, "objects": listed}
    content = json.dumps(manifest, indent=1, sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    objects = Objects(f"{root.rstrip('/')}/{store.stem}/{digest[:16]}")
    wanted = {name: path.stat().st_size for name, path in parts.items()}
    held = objects.sizes()

    def send(name: str) -> None:
        if held.get(name) != wanted[name]:
            objects.put(name, parts[name])
        progress(wanted[name])

    with ThreadPoolExecutor(PARALLEL) as pool:
        for sent in [pool.submit(send, name) for name in parts]:
            sent.result()
    _compare(objects, wanted, objects.sizes())
    objects.put_bytes(MANIFEST, content)
    return {"schema": SCHEMA, "url": objects.url, "manifest_sha256": digest}


def write_pointer(folder: Path, pointer: dict[str, Any]) -> None:
    """Write the pointer that stands for a store in the project."""
    files.write_text(folder / POINTER, json.dumps(pointer, indent=2) + "\n")


class Published:
    """A published store for reading: its manifest is there and agrees with the objects."""

    def __init__(self, url: str, digest: str | None = None) -> None:
        """Raises `UserError` where the store is missing or not whole, or its manifest has another sha256."""
        self._objects = Objects(url)
        size = self._objects.size(MANIFEST)
        if size is None:
            raise UserError(f"{url}: no store, or not whole ({MANIFEST} is missing); publish it again")
        if size > MANIFEST_BYTES:
            raise UserError(f"{url}/{MANIFEST}: {size} bytes, more than {MANIFEST_BYTES}; publish it again")
        content = self._objects.read(MANIFEST)
        found = hashlib.sha256(content).hexdigest()
        if digest not in (None, found):
            raise UserError(f"{url}: another store than the one published there; build the store again")
        self._store, self._index, self._told = _read_manifest(f"{url}/{MANIFEST}", content)
        wanted = {name: about["size"] for name, about in self._told.items()}
        _compare(self._objects, wanted, self._objects.sizes())
        self._cached = None
        if self._objects.local is None and (kept := cache.blocks()):
            self._cached = cache.CachedReader(kept, found[:16], wanted.__getitem__, self._objects.read_ranges)

    def __str__(self) -> str:
        return self._objects.url

    @property
    def is_cached(self) -> bool:
        """Whether what is read is kept on this machine."""
        return self._cached is not None

    @property
    def folder(self) -> Path | None:
        """The store's folder, where it lies on this machine."""
        return self._objects.local / self._store if self._objects.local else None

    def arrays(self) -> list[str]:
        """Names of the store's arrays."""
        inner = [name.split("/")[1:] for name in self._told if name.startswith(f"{self._store}/")]
        return sorted({parts[0] for parts in inner if len(parts) > 1})

    def content(self, name: str, most: int) -> bytes:
        """The bytes, at most `most`, of an object of the store, as the manifest knows them."""
        return self._whole(f"{self._store}/{name}", most)

    def index(self, most: int) -> bytes:
        """The bytes of the index, at most `most`."""
        return self._whole(self._index, most)

    def size(self, name: str) -> int | None:
        """Bytes of an object of the store, None where there is none."""
        about = self._told.get(f"{self._store}/{name}")
        return None if about is None else int(about["size"])

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fill each view with the bytes of the object `name` from `offset` on; all are asked for at once."""
        if self._cached is not None:
            self._cached.fill([(f"{self._store}/{name}", begin, view) for name, begin, view in pieces])
            return
        wanted = [(f"{self._store}/{name}", begin, begin + len(view)) for name, begin, view in pieces]
        for (name, _, view), got in zip(pieces, self._objects.read_ranges(wanted), strict=True):
            if len(got) != len(view):
                raise UserError(f"{self}/{self._store}/{name}: cut short; publish the store again")
            view[:] = got

    def prefetch(self, pieces: Sequence[Piece]) -> None:
        """Begin to fetch pieces that will be asked for, where there is a cache for them."""
        if self._cached is not None:
            self._cached.prefetch([(f"{self._store}/{name}", begin, view) for name, begin, view in pieces])

    def _whole(self, name: str, most: int) -> bytes:
        if name not in self._told:
            raise UserError(f"{self}/{name}: missing; publish the store again")
        if self._told[name]["size"] > most:
            raise UserError(f"{self}/{name}: more than {most} bytes; publish the store again")
        content = self._objects.read(name)
        if hashlib.sha256(content).hexdigest() != self._told[name]["sha256"]:
            raise UserError(f"{self}/{name}: differs from the manifest; publish the store again")
        return content


def open_pointer(folder: Path) -> Published | None:
    """The published store that a folder of the project points to, None where it holds no pointer."""
    path = folder / POINTER
    if not path.is_file():
        return None
    try:
        pointer = _parsed(str(path), files.read_bytes(path, POINTER_BYTES))
    except ValueError as error:
        raise UserError(f"{path}: no pointer ({error}); build the store again") from None
    url, digest = pointer.get("url"), pointer.get("manifest_sha256")
    if not isinstance(url, str) or not isinstance(digest, str):
        raise UserError(f"{path}: no pointer (a url and a manifest_sha256 are needed); build the store again")
    return Published(url, digest)


def _parsed(shown_as: str, content: bytes) -> dict[str, Any]:
    try:
        found = files.parse_json(content)
    except ValueError as error:
        raise UserError(f"{shown_as}: not what it should be ({error}); build the store again") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise UserError(f"{shown_as}: not what it should be; build the store again")
    if found["schema"] is True or found["schema"] != SCHEMA:
        raise UserError(
            f"{shown_as}: schema {shown(found['schema'])}, expected {SCHEMA}; build the store again"
        )
    return found


def _read_manifest(shown_as: str, content: bytes) -> tuple[str, str, dict[str, dict[str, Any]]]:
    """Names of the store and of its index, and size and sha256 of every object by name."""
    manifest = _parsed(shown_as, content)
    store, index, objects = manifest.get("store"), manifest.get("index"), manifest.get("objects")
    if not (isinstance(store, str) and isinstance(index, str) and isinstance(objects, dict)) or not (
        all(map(_is_name, (store, index)))
        and all(name == index or name.startswith(f"{store}/") for name in objects)
        and all(all(map(_is_name, name.split("/"))) for name in objects)
        and all(map(_is_object, objects.values()))
    ):
        raise UserError(
            f"{shown_as}: names no store with an index and objects below it; publish the store again"
        )
    return store, index, objects


def _is_object(value: object) -> bool:
    """Whether a value tells the size and the sha256 of an object."""
    size, digest = (value.get("size"), value.get("sha256")) if isinstance(value, dict) else (None, None)
    return type(size) is int and size >= 0 and isinstance(digest, str)


def _is_name(value: object) -> bool:
    """Whether a value is the name of a file or a folder, and leads to no other place."""
    return (
        isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and value.isprintable()
    )


def _compare(objects: Objects, wanted: dict[str, int], held: dict[str, int]) -> None:
    for name, size in wanted.items():
        if held.get(name) != size:
            found = f"has {held[name]} bytes" if name in held else "is missing"
            raise UserError(f"{objects}/{name}: {found}, expected {size} bytes; publish the store again")
