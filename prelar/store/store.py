"""Reading stores, on a disk or in a bucket: a segment of a clip takes one system call, which copies once.

How a store lies there: `prelar.store.schema`. A store may also be joined of others, which
`prelar.store.joined` writes and finds, and which reads as one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prelar.store import schema
from prelar.store.cache import Piece
from prelar.store.parquet import read_parquet
from prelar.store.remote import Published, open_pointer
from prelar.store.schema import INDEX_SCHEMA, SCHEMA, Layout, index_path, pair_index
from prelar.utils import files
from prelar.utils.errors import UserError, printable, remake, shown
from prelar.utils.frames import FRAME, Frames

JSON_BYTES, INDEX_BYTES = 4 << 20, 1 << 30
LONGEST, WIDEST = 1 << 40, 1 << 16
KEY_CLIPS = 64
"""Clips whose first frames go into a store's digest."""


def _read(path: Path, most: int) -> bytes:
    try:
        return files.read_bytes(path, most)
    except ValueError as error:
        raise UserError(f"{path}: {error}; the store is incomplete or damaged, build it again") from None


class _Place(Protocol):
    """Where the files of a store lie; names are relative to the store."""

    @property
    def is_cached(self) -> bool:
        """Whether what lies elsewhere is kept here, so that it is worth a `prefetch`."""

    def arrays(self) -> list[str]:
        """Names of the arrays."""

    def content(self, name: str, most: int) -> bytes:
        """The bytes of a file of at most `most` bytes."""

    def index(self, most: int) -> bytes:
        """The bytes of the index, at most `most`."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where it is missing."""

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fill the view of each piece (name, offset, view) from its file."""

    def prefetch(self, pieces: Sequence[Piece]) -> None:
        """Begin to fetch pieces that will be asked for; their views stay as they are."""


class _Folder:
    """A store in a folder of this machine."""

    is_cached = False

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: no such store; {remake(path)}")
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def arrays(self) -> list[str]:
        return sorted(item.name for item in self._path.iterdir() if item.is_dir())

    def content(self, name: str, most: int) -> bytes:
        return _read(self._path / name, most)

    def index(self, most: int) -> bytes:
        return _read(index_path(self._path), most)

    def size(self, name: str) -> int | None:
        path = self._path / name
        return path.stat().st_size if path.is_file() else None

    def fill(self, pieces: Sequence[Piece]) -> None:
        for name, of_file in itertools.groupby(pieces, lambda piece: piece[0]):
            handle = os.open(f"{self._path}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for _, offset, view in of_file:
                    while len(view):
                        count = os.preadv(handle, [view], offset)
                        if count == 0:
                            raise UserError(f"{self._path}/{name}: cut short; build the store again")
                        view, offset = view[count:], offset + count
            finally:
                os.close(handle)

    def prefetch(self, pieces: Sequence[Piece]) -> None:
        """Nothing: the files are here."""


class _Items:
    """Items of one array, `items` of them, laid out as `layout` says; `readers` are those of their files."""

    layout: Layout
    items: int
    readers: list[_Reader]

    def places(self, starts: Sequence[int], out: npt.NDArray[Any]) -> list[tuple[_Place, list[Piece]]]:
        """What fills `out[i]` with the items from `starts[i]` on, by where it lies."""
        raise NotImplementedError

    def read_many(self, starts: Sequence[int], out: npt.NDArray[Any]) -> None:
        """Fill `out[i]` with the items from `starts[i]` on."""
        for place, pieces in self.places(starts, out):
            place.fill(pieces)

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Items `start` to `start + length` as a new array (length, *item)."""
        out = np.empty((length, *self.layout.item), dtype=self.layout.dtype)
        if length:
            self.read_many([start], out[None])
        return out


class _Reader(_Items):
    """Reads runs of items of one array of files."""

    def __init__(self, place: _Place, name: str, layout: Layout, items: int) -> None:
        self.layout = layout
        self.items = items
        self.place = place
        self.readers = [self]
        self._name = name
        self._files: list[str] = []
        for begin in range(0, items, layout.shard):
            file = layout.key(name, len(self._files))
            if place.size(file) != layout.shard_bytes(min(items - begin, layout.shard)):
                raise UserError(f"{place}/{file}: missing or cut short; build the store again")
            self._files.append(file)

    def pieces(self, start: int, out: npt.NDArray[Any]) -> Iterator[Piece]:
        """What fills the contiguous array `out` (n, *item) with the items from `start` on."""
        if start < 0 or start + len(out) > self.items:
            raise IndexError(
                f"{self.place}/{self._name}: items {start} to {start + len(out)} of {self.items}"
            )
        view, size, shard = out.data.cast("B"), self.layout.item_bytes, self.layout.shard
        done = 0
        while done < len(view):
            number, inside = divmod(start + done // size, shard)
            count = min(len(view) - done, (shard - inside) * size)
            yield self._files[number], inside * size, view[done : done + count]
            done += count

    def places(self, starts: Sequence[int], out: npt.NDArray[Any]) -> list[tuple[_Place, list[Piece]]]:
        pieces = (self.pieces(start, part) for start, part in zip(starts, out, strict=True))
        return [(self.place, list(itertools.chain.from_iterable(pieces)))]


class _Joined(_Items):
    """Reads runs of items of one array that several stores hold, one store after the other."""

    def __init__(self, parts: Sequence[_Items]) -> None:
        self.layout = parts[0].layout
        self.readers = [reader for part in parts for reader in part.readers]
        self._ends = list(itertools.accumulate(reader.items for reader in self.readers))
        self.items = self._ends[-1]

    def places(self, starts: Sequence[int], out: npt.NDArray[Any]) -> list[tuple[_Place, list[Piece]]]:
        wanted: list[list[Piece]] = [[] for _ in self.readers]
        for start, part in zip(starts, out, strict=True):
            if start < 0 or start + len(part) > self.items:
                raise IndexError(f"items {start} to {start + len(part)} of {self.items}")
            done = 0
            while done < len(part):
                number = bisect.bisect_right(self._ends, start + done)
                reader = self.readers[number]
                inside = start + done - (self._ends[number] - reader.items)
                count = min(len(part) - done, reader.items - inside)
                wanted[number] += reader.pieces(inside, part[done : done + count])
                done += count
        return [(reader.place, pieces) for reader, pieces in zip(self.readers, wanted, strict=True) if pieces]


class _Computed(_Items):
    """Numbers that are not read from a file."""

    def __init__(self, layout: Layout, items: int, make: Callable[[], npt.NDArray[np.int64]]) -> None:
        self.layout, self.items, self.readers, self._make = layout, items, [], make

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        return self._make()[start : start + length]


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the stores that a joined store reads as one; `weight` is None in a union."""

    name: str
    store: Store
    weight: float | None = None

    @property
    def prefix(self) -> str:
        """What stands before its clips' ids and cameras in the joined index, empty in a union."""
        return "" if self.weight is None else f"{self.name}/"


class Store:
    """A finished store. Reading holds no lock and no open file, and is safe from threads and after a fork.

    `members` are those of a joined store, in their order; other stores have none.
    """

    def __init__(
        self,
        path: Path | str,
        attrs: dict[str, Any],
        readers: Mapping[str, _Items],
        index: pa.Table,
        members: Sequence[Member] = (),
    ) -> None:
        self.path = path
        self.attrs = attrs
        self.index = index
        self.members = tuple(members)
        self._readers = readers
        self.clip_start: npt.NDArray[np.int64] = readers["clip_start"].read(0, readers["clip_start"].items)
        self.clip_length: npt.NDArray[np.int64] = readers["clip_length"].read(0, readers["clip_length"].items)

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open a store and its index: a folder, a pointer in its place, or the URL of a published store.

        The folder may be a joined store's. Raises `UserError` where one is missing, incomplete or foreign.
        """
        from prelar.store import joined  # which opens stores itself

        is_url = isinstance(path, str) and "://" in path
        if not is_url and (found := joined.open_members(Path(path))):
            return cls._of_members(Path(path), *found)
        published = Published(str(path)) if is_url else open_pointer(Path(path))
        place: _Place = published or _Folder(Path(path))
        if published is not None and published.folder is not None:
            place = _Folder(published.folder)
        attrs = _parsed(place, "zarr.json").get("attributes", {})
        if not isinstance(attrs, dict):
            raise UserError(f"{place}/zarr.json: attributes that are no object; build the store again")
        _check_schema(place, attrs.get("schema"))
        readers = {name: _open_array(place, name) for name in place.arrays()}
        missing = {"frames", "clip_start", "clip_length", "pairs"} - set(readers)
        if missing:
            raise UserError(f"{place}: lacks {', '.join(sorted(missing))}; build the store again")
        content = place.index(INDEX_BYTES)
        if hashlib.sha256(content).hexdigest() != attrs.get("index_sha256"):
            raise UserError(f"{place}: its index is not the index of this store; build the store again")
        index = _parse_index(place, content)
        _check_items(place, index, readers)
        store = cls(path if published else Path(path), attrs, readers, index)
        _check_clips(place, store)
        return store

    @classmethod
    def _of_members(cls, path: Path, told: Mapping[str, Any], members: Sequence[Member]) -> Store:
        """A joined store. It has the optional arrays that all members have, of the same width."""
        content = _read(index_path(path), INDEX_BYTES)
        if hashlib.sha256(content).hexdigest() != told["index_sha256"]:
            raise UserError(f"{path}: its index is not the index of this store; join the stores again")
        index, stores = _parse_index(path, content), [member.store for member in members]
        lengths = np.concatenate([store.clip_length for store in stores])
        starts = np.cumsum(lengths) - lengths
        clips, pairs = len(lengths), int(lengths.sum()) - len(lengths)
        readers: dict[str, _Items] = {
            "clip_start": _Computed(schema.CLIPS, clips, lambda: starts),
            "clip_length": _Computed(schema.CLIPS, clips, lambda: lengths),
            "pairs": _Computed(schema.PAIRS, pairs, lambda: pair_index(starts, lengths)),
        }
        for name in stores[0]._readers:
            held = [store._readers.get(name) for store in stores]
            alike = [reader for reader in held if reader and reader.layout == stores[0]._readers[name].layout]
            if name not in readers and len(alike) == len(stores):
                readers[name] = _Joined(alike)
        known = ("name", "digest", "weight")
        listed = [{key: about[key] for key in known} for about in told["members"]]
        attrs = {"schema": SCHEMA, "members": listed, "index_sha256": told["index_sha256"]}
        _check_items(path, index, readers)
        store = cls(path, attrs, readers, index, members)
        _check_clips(path, store)
        return store

    @property
    def parts(self) -> list[tuple[range, float]]:
        """Clips that count alike, by number, and their weight: a part a member of a mixture, else one."""
        counts = [member.store.num_clips for member in self.members]
        weights = [member.weight for member in self.members if member.weight is not None]
        if not weights:
            return [(range(self.num_clips), 1.0)]
        ends = list(itertools.accumulate(counts))
        return [
            (range(end - count, end), weight)
            for end, count, weight in zip(ends, counts, weights, strict=True)
        ]

    def split_parts(self, clips: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Clip numbers, by the part of `parts` that they are of."""
        return [clips[(clips >= part.start) & (clips < part.stop)] for part, _ in self.parts]

    def digest(self) -> str:
        """What tells the store from others: sha256 of its attributes and of frames spread over it, in hex.

        The attributes know the index, and the index each clip's source; frames tell stores apart that other
        code made of the same.
        """
        clips = np.unique(np.linspace(0, self.num_clips - 1, min(KEY_CLIPS, self.num_clips)).astype(np.int64))
        digest = hashlib.sha256(json.dumps(self.attrs, sort_keys=True).encode())
        digest.update(self.read_many(self.clip_start[clips], 1).tobytes())
        return digest.hexdigest()

    @property
    def num_frames(self) -> int:
        """N, frames in all."""
        return self._readers["frames"].items

    @property
    def num_clips(self) -> int:
        """C, clips in all."""
        return len(self.clip_start)

    @property
    def pairs(self) -> npt.NDArray[np.int64]:
        """t of every pair (t, t+1), read anew at each use, int64 (P,)."""
        return self._readers["pairs"].read(0, self._readers["pairs"].items)

    @functools.cached_property
    def clip_index(self) -> pa.Table:
        """The index's rows of the clips in the store: row c describes clip c."""
        return self.index.filter(pc.equal(self.index["status"], "ok"))

    def read(self, start: int, length: int) -> Frames:
        """Frames `start` to `start + length` as uint8 (length, 64, 64, 3)."""
        return self._readers["frames"].read(start, length)

    def read_many(
        self,
        starts: npt.ArrayLike,
        length: int,
        out: Frames | None = None,
        *,
        strides: npt.NDArray[np.int64] | None = None,
    ) -> Frames:
        """Segments of `length` frames from `starts`, uint8 (n, length, 64, 64, 3), in `out` if given.

        A segment's frames are neighbours, or `strides` (n,) frames apart; only they are read.
        """
        begins = np.asarray(starts, dtype=np.int64)
        shape = (len(begins), length, *FRAME)
        if out is None:
            out = np.empty(shape, dtype=np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out: {out.dtype} {out.shape}, expected contiguous uint8 {shape}")
        self._readers["frames"].read_many(*_spread(begins, out, strides))
        return out

    def prefetch(
        self, starts: npt.ArrayLike, length: int, *, strides: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Begin to fetch segments that `read_many` will be asked for, where there is a cache for them."""
        begins = np.asarray(starts, dtype=np.int64)
        untouched = np.empty((len(begins), length, *FRAME), dtype=np.uint8)
        for place, pieces in self._readers["frames"].places(*_spread(begins, untouched, strides)):
            place.prefetch(pieces)

    @property
    def is_cached(self) -> bool:
        """Whether what lies elsewhere is kept here, so that it is worth a `prefetch`."""
        return any(reader.place.is_cached for reader in self._readers["frames"].readers)

    def has(self, name: str) -> bool:
        """Whether the store holds the optional per-frame array `name`."""
        return name in self._readers and self._readers[name].layout.dtype == "float32"

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """The whole optional per-frame array `name`, float32 (N, D)."""
        if not self.has(name):
            raise UserError(f"{self.path}: holds no {name}; build the store from a source that has them")
        return self._readers[name].read(0, self._readers[name].items)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of every array, by name."""
        return {name: (r.layout.dtype, (r.items, *r.layout.item)) for name, r in self._readers.items()}

    def strides(self, gap: float | None) -> npt.NDArray[np.int64]:
        """Frames from one to the next that lies `gap` seconds later, by each clip's own rate: int64 (C,).

        At least 1; 1 for all where `gap` is None. A clip too short for its stride has its own length. Raises
        `UserError` where the index does not tell a clip's rate.
        """
        if gap is None:
            return np.ones(self.num_clips, dtype=np.int64)
        rates = self.clip_index["fps"].to_numpy()
        silent = np.flatnonzero(~(np.isfinite(rates) & (rates > 0)))
        if len(silent):
            example = printable(self.clip_index["id"][int(silent[0])].as_py(), 100)
            raise UserError(
                f"{self.path}: {len(silent)} of {self.num_clips} clips tell no rate (fps), {example} is one, "
                f"which frame_gap = {gap:g} needs; set demos.fps, or give those videos a rate, and make the "
                "store again, or set frame_gap to null"
            )
        return np.minimum(np.maximum(np.rint(gap * rates), 1), self.clip_length).astype(np.int64)

    def clips(
        self,
        split: str | None = None,
        label: str | None = None,
        min_length: int = 1,
        gap: float | None = None,
    ) -> npt.NDArray[np.int64]:
        """Ascending numbers of the clips of a split and a label with at least `min_length` frames, int64.

        The frames are neighbours, or `gap` seconds apart as `strides` says.
        """
        chosen = self.clip_length > (min_length - 1) * self.strides(gap)
        for column, value in (("split", split), ("label", label)):
            if value is not None:
                equal = pc.fill_null(pc.equal(self.clip_index[column], value), False)
                chosen &= equal.to_numpy(zero_copy_only=False)
        return np.flatnonzero(chosen).astype(np.int64)


def _spread(
    begins: npt.NDArray[np.int64], out: Frames, strides: npt.NDArray[np.int64] | None
) -> tuple[list[int], Frames]:
    """Where runs of neighbours begin that fill segments `out` (n, length, …), and a view of it for them."""
    if strides is None or (strides == 1).all():
        return begins.tolist(), out
    apart = begins[:, None] + strides[:, None] * np.arange(out.shape[1])
    return apart.ravel().tolist(), out.reshape(-1, 1, *FRAME)


def _parsed(place: _Place, name: str) -> dict[str, Any]:
    try:
        content = files.parse_json(place.content(name, JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{place}/{name}: not JSON ({error}); build the store again") from None
    if not isinstance(content, dict):
        raise UserError(f"{place}/{name}: not an object; build the store again")
    return content


def _check_items(place: object, index: pa.Table, readers: Mapping[str, _Items]) -> None:
    """Raise `UserError` unless the arrays are as long as the index and each other say."""
    frames, clips = readers["frames"].items, pc.sum(pc.equal(index["status"], "ok")).as_py() or 0
    wanted = {"clip_start": clips, "clip_length": clips, "pairs": frames - clips}
    for name, reader in readers.items():
        expected = wanted.get(name, frames)
        if reader.items != expected:
            raise UserError(
                f"{place}/{name}: {reader.items} items, the index and the frames have {expected}; "
                "build the store again"
            )


def _check_clips(place: object, store: Store) -> None:
    """Raise `UserError` unless the clips cover the frames one after the other, as the index has them too."""
    starts, lengths = store.clip_start, store.clip_length
    fits = bool(np.all((lengths > 0) & (lengths <= store.num_frames)))
    if not fits or lengths.sum() != store.num_frames or (starts != np.cumsum(lengths) - lengths).any():
        raise UserError(f"{place}: its clips do not lie one after the other; build the store again")
    for name, held in (("start", starts), ("frames", lengths)):
        if not pc.fill_null(store.clip_index[name], -1).equals(pa.chunked_array([held])):
            raise UserError(f"{place}: index and clips differ in {name}; build the store again")


def _check_schema(place: _Place, found: object) -> None:
    """Raise `UserError` where a store is of another schema than the one known here."""
    if type(found) is not int:
        raise UserError(f"{place}: schema {shown(found)}, so not a store; build the store again")
    if found == SCHEMA:
        return
    if found > SCHEMA:
        raise UserError(
            f"{place}: schema {found} is newer than {SCHEMA}, the newest known here; update prelar"
        )
    raise UserError(f"{place}: schema {found} is older than {SCHEMA}; build the store again with this prelar")


def _open_array(place: _Place, name: str) -> _Reader:
    """A reader of one array; it must lie exactly as `schema` has it."""
    metadata = _parsed(place, f"{name}/zarr.json")
    fixed = {
        "frames": schema.FRAMES,
        "clip_start": schema.CLIPS,
        "clip_length": schema.CLIPS,
        "pairs": schema.PAIRS,
    }
    shape = metadata.get("shape")
    if not (
        isinstance(shape, list) and shape and all(type(size) is int and 0 <= size < LONGEST for size in shape)
    ):
        raise UserError(f"{place}/{name}: not an array of a store; build the store again")
    items, *rest = shape
    if name not in fixed and (len(rest) != 1 or rest[0] > WIDEST):
        raise UserError(f"{place}/{name}: not an array of a store; build the store again")
    layout = fixed.get(name) or schema.per_frame(*rest)
    if metadata != layout.metadata(items):
        raise UserError(f"{place}/{name}: laid out by another version or program; build the store again")
    return _Reader(place, name, layout, items)


def _parse_index(path: object, content: bytes) -> pa.Table:
    try:
        table = read_parquet(content, INDEX_SCHEMA)
    except ValueError as error:
        raise UserError(f"{path}: not an index ({error}); build it again") from None
    if not pc.all(pc.is_in(table["status"], pa.array(["ok", "bad"]))).as_py():
        raise UserError(f"{path}: not an index (a status is neither ok nor bad); build it again")
    return table
