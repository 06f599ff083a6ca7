"""The store of frames and its index: the only module that knows their schema.

`data/<name>.zarr` is a Zarr v3 group that zarr-python and tensorstore read:

    frames       uint8   (N, 64, 64, 3)   every frame once, RGB, upright, clip after clip
    clip_start   int64   (C,)             first frame of each clip
    clip_length  int64   (C,)             frames of each clip
    pairs        int64   (P,)             t of every pair (t, t+1) within one clip, P = sum(length - 1)
    <name>       float32 (N, D)           optional, one row a frame, such as the actions of demonstrations

Nothing is compressed, so a shard file is its items in order with Zarr's shard index at the end. The writer
therefore appends straight to shard files, and the reader takes a segment of a clip with one system call that
neither copies twice nor maps memory.

`data/<name>.parquet` is the index, one row a clip in the order of ingest; its rows with status "ok" are the
clips of the store in order, the others name what is wrong.

A store may also be joined of others, which `prelar.store.joined` writes and finds, and which reads as one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prelar.store.parquet import read_parquet
from prelar.store.remote import Piece, Published, follow
from prelar.utils import files
from prelar.utils.errors import UserError, printable, shown
from prelar.utils.frames import FRAME

SCHEMA = 1
ABSENT = 2**64 - 1
JSON_BYTES, INDEX_BYTES = 4 << 20, 1 << 30
LONGEST, WIDEST = 1 << 40, 1 << 16
KEY_CLIPS = 64
"""Clips whose first frames go into a store's digest."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32()),
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("start", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("sha256", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("task", pa.string()),
        pa.field("variation", pa.int32()),
        pa.field("camera", pa.string()),
        pa.field("episode", pa.int32()),
        pa.field("success", pa.bool_()),
    ]
)

Frames = npt.NDArray[np.uint8]
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array lies on the disk: `shard` items a file, in chunks of `chunk` items."""

    dtype: str
    item: tuple[int, ...]
    chunk: int
    shard: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one item, such as one frame."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.item, dtype=np.int64))

    @property
    def chunks(self) -> int:
        """Chunks in a full shard."""
        return self.shard // self.chunk

    @property
    def tail_bytes(self) -> int:
        """Bytes of the shard index: offset and size of every chunk, and a checksum."""
        return 16 * self.chunks + 4

    def shard_bytes(self, items: int) -> int:
        """Bytes of a finished shard file that holds `items` items."""
        return -(-items // self.chunk) * self.chunk * self.item_bytes + self.tail_bytes

    def tail(self, items: int) -> bytes:
        """The shard index of a shard that holds `items` items."""
        entries = np.full((self.chunks, 2), ABSENT, dtype="<u8")
        used, size = -(-items // self.chunk), self.chunk * self.item_bytes
        entries[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(size)
        entries[:used, 1] = size
        packed = entries.tobytes()
        return packed + int(google_crc32c.value(packed)).to_bytes(4, "little")

    def key(self, name: str, number: int) -> str:
        """The name within the store of shard `number` of the array `name`."""
        return "/".join([name, "c", str(number), *["0"] * len(self.item)])

    def file(self, folder: Path, number: int) -> Path:
        """The file of shard `number` of the array in `folder`."""
        return folder.parent / self.key(folder.name, number)

    def metadata(self, items: int) -> dict[str, Any]:
        """The array's zarr.json."""
        plain: dict[str, Any] = {"name": "bytes"}
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self.chunk, *self.item],
            "codecs": [plain if np.dtype(self.dtype).itemsize == 1 else little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        grid = {"chunk_shape": [self.shard, *self.item]}
        return {
            "shape": [items, *self.item],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if self.dtype.startswith("float") else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


FRAMES = Layout("uint8", FRAME, chunk=32, shard=16_384)
CLIPS = Layout("int64", (), chunk=4_096, shard=1_048_576)
PAIRS = Layout("int64", (), chunk=4_096, shard=4_194_304)


def per_frame(width: int) -> Layout:
    """The layout of an optional float32 array (N, width)."""
    return Layout("float32", (width,), chunk=512, shard=16_384)


def index_path(store: Path) -> Path:
    """Where the index of a store lies: `data/x.zarr` has `data/x.parquet`."""
    return store.with_suffix(".parquet")


def checks_path(store: Path) -> Path:
    """Where the outcome of a store's validation lies: `data/x.zarr` has `data/x.json`."""
    return store.with_suffix(".json")


# --- Writing ------------------------------------------------------------------------------------------------


class _Column:
    """Appends items to the shard files of one array."""

    def __init__(self, folder: Path, layout: Layout, items: int = 0) -> None:
        """Continue after the first `items` items; whatever lies behind them is cut off."""
        self.folder = folder
        self.layout = layout
        self.items = items
        self._handle: int | None = None
        self._cut()

    def _cut(self) -> None:
        number, inside = divmod(self.items, self.layout.shard)
        for shard in range(number):
            path = self.layout.file(self.folder, shard)
            if not path.is_file() or path.stat().st_size != self.layout.shard_bytes(self.layout.shard):
                raise UserError(
                    f"{path}: damaged while staged; delete {self.folder.parent.parent} and run again"
                )
        for path in (self.folder / "c").glob("*"):
            if int(path.name) > number or (int(path.name) == number and not inside):
                files.remove(path)
        if inside:
            path = self.layout.file(self.folder, number)
            held = path.stat().st_size if path.is_file() else 0
            if held < inside * self.layout.item_bytes:
                raise UserError(
                    f"{path}: damaged while staged; delete {self.folder.parent.parent} and run again"
                )
            os.truncate(path, inside * self.layout.item_bytes)

    def append(self, items: npt.NDArray[Any]) -> None:
        """Write items of shape (n, *layout.item)."""
        if items.shape[1:] != self.layout.item or items.dtype != np.dtype(self.layout.dtype):
            raise ValueError(f"{self.folder.name}: got {items.dtype} {items.shape}, expected {self.layout}")
        data = np.ascontiguousarray(items).data.cast("B") if len(items) else memoryview(b"")
        done = 0
        while done < len(items):
            inside = self.items % self.layout.shard
            count = min(len(items) - done, self.layout.shard - inside)
            size = self.layout.item_bytes
            self._write(inside * size, data[done * size : (done + count) * size])
            done += count
            self.items += count
            if self.items % self.layout.shard == 0:
                self._close(self.layout.shard)

    def _write(self, offset: int, data: memoryview | bytes) -> None:
        if self._handle is None:
            path = self.layout.file(self.folder, self.items // self.layout.shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        view = memoryview(data)
        while len(view):
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written

    def _close(self, items: int) -> None:
        """Pad the open shard to whole chunks, write its index and let it go."""
        padded = self.layout.shard_bytes(items) - self.layout.tail_bytes
        self._write(items * self.layout.item_bytes, bytes(padded - items * self.layout.item_bytes))
        self._write(padded, self.layout.tail(items))
        self.sync()
        self.close()

    def sync(self) -> None:
        """Force what was written to the disk."""
        if self._handle is not None:
            os.fdatasync(self._handle)

    def close(self) -> None:
        """Close the open shard file as it is."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def finish(self) -> None:
        """Complete the last shard and write the metadata."""
        if self.items % self.layout.shard:
            self._close(self.items % self.layout.shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / "zarr.json", self.layout.metadata(self.items))


class StoreWriter:
    """Builds a store and its index in a staging folder, and survives being killed.

        with StoreWriter(staging / "x.zarr", arrays={"actions": 4}) as writer:
            writer.append(frames, {"id": "7", "split": "train"}, actions=actions)
            writer.append(None, {"id": "8", "reason": "not a video"})
            writer.commit()
            writer.finish(attrs)

    What was committed outlives the process: a writer opened on the same path continues after the last commit
    (`rows` tells what it holds) and cuts off what came later. `finish` gives the same bytes however often
    the work was interrupted. Beside the store lies its journal `<name>.journal`, which is not part of it.
    """

    def __init__(self, path: Path, *, arrays: Mapping[str, int] | None = None) -> None:
        """Open `path` (`….zarr`); `arrays` maps optional per-frame arrays to their widths."""
        self.path = path
        widths = dict(arrays or {})
        self.journal = _Journal(path.with_suffix(".journal"), {"schema": SCHEMA, "arrays": widths})
        self.lengths: list[int] = []
        self.count = 0
        for row in self.journal.rows():
            self.count += 1
            if row["status"] == "ok":
                self.lengths.append(row["frames"])
        for leftover in path.parent.rglob(".*.partial"):
            leftover.unlink()
        items = sum(self.lengths)
        self._frames = _Column(path / "frames", FRAMES, items)
        self._arrays = {name: _Column(path / name, per_frame(width), items) for name, width in widths.items()}
        self._pending: list[dict[str, Any]] = []

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def frames(self) -> int:
        """Frames appended so far."""
        return self._frames.items

    def rows(self) -> Iterator[dict[str, Any]]:
        """The committed rows of the index in order, read from the journal."""
        return self.journal.rows()

    def append(self, frames: Frames | None, row: Row, **arrays: npt.NDArray[np.float32]) -> int | None:
        """Add a clip, and return its first frame's number in the store.

        `frames` is uint8 (n, 64, 64, 3) with n >= 1, each of `arrays` float32 (n, D). None stands for a bad
        clip: then `row` gives the `reason`, the store gets nothing, None is returned. `row` holds columns of
        `INDEX_SCHEMA`; `frames`, `start` and `status` are filled in. What is not printable in it is escaped,
        and a clip with a value that the index cannot hold is bad.
        """
        entry, beyond = _checked_row(row), misfit(row)
        if beyond and not entry.get("reason"):
            frames, entry["reason"] = None, beyond
        if frames is None:
            if not entry.get("reason"):
                raise ValueError(f"clip {entry['id']}: a bad clip needs a reason")
            entry.setdefault("frames", 0)
            self._pending.append({**entry, "status": "bad"})
            return None
        if len(frames) < 1 or set(arrays) != set(self._arrays) or entry.get("reason"):
            raise ValueError(
                f"clip {entry['id']}: {len(frames)} frames, arrays {sorted(arrays)}; a good clip has frames, "
                f"no reason and the arrays {sorted(self._arrays)}"
            )
        if any(len(values) != len(frames) for values in arrays.values()):
            raise ValueError(f"clip {entry['id']}: its arrays differ in length from its {len(frames)} frames")
        start = self._frames.items
        self._frames.append(frames)
        for name, values in arrays.items():
            self._arrays[name].append(values)
        self._pending.append({**entry, "frames": len(frames), "start": start, "status": "ok"})
        return start

    def commit(self) -> None:
        """Make everything appended so far survive a crash."""
        if not self._pending:
            return
        for column in (self._frames, *self._arrays.values()):
            column.sync()
        self.journal.append(self._pending)
        self.lengths += [row["frames"] for row in self._pending if row["status"] == "ok"]
        self.count += len(self._pending)
        self._pending = []

    def close(self) -> None:
        """Let go of the files; what was not committed is lost."""
        for column in (self._frames, *self._arrays.values()):
            column.close()

    def finish(self, attrs: Mapping[str, Any]) -> Store:
        """Commit, complete the store with the given attributes, write the index and open the result."""
        self.commit()
        for column in (self._frames, *self._arrays.values()):
            column.finish()
        lengths = np.array(self.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        for name, layout, values in (
            ("clip_start", CLIPS, starts),
            ("clip_length", CLIPS, lengths),
            ("pairs", PAIRS, pair_index(starts, lengths)),
        ):
            files.remove(self.path / name)
            column = _Column(self.path / name, layout)
            column.append(values)
            column.finish()
        digest = write_index(index_path(self.path), self.journal.rows())
        merged = {"schema": SCHEMA, **attrs, "index_sha256": digest}
        _write_json(self.path / "zarr.json", {"attributes": merged, "zarr_format": 3, "node_type": "group"})
        return Store.open(self.path)


class _Journal:
    """Rows of the index as lines of JSON, a line a commit; a torn last line counts as never written."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        line = json.dumps(header).encode() + b"\n"
        if path.exists():
            with path.open("rb") as handle:
                if handle.read(len(line)) != line:
                    raise UserError(f"{path}: staging of another layout; delete {path.parent} and run again")
        else:
            with files.atomic_file(path) as partial:
                partial.write_bytes(line)
        self._header = len(line)
        self._mend()

    def _mend(self) -> None:
        """Cut off a line that a crash left without its end."""
        size, block = self.path.stat().st_size, 1 << 20
        with self.path.open("rb+") as handle:
            position = size
            while position > self._header:
                begin = max(self._header, position - block)
                handle.seek(begin)
                newline = handle.read(position - begin).rfind(b"\n")
                if newline >= 0:
                    handle.truncate(begin + newline + 1)
                    return
                position = begin
            handle.truncate(self._header)

    def append(self, rows: Sequence[Row]) -> None:
        """Add one commit durably."""
        with self.path.open("ab") as handle:
            handle.write(json.dumps(rows).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in order."""
        with self.path.open("rb") as handle:
            handle.seek(self._header)
            for line in handle:
                yield from json.loads(line)


def _checked_row(row: Row) -> dict[str, Any]:
    """A row as the index can hold it: texts are printable, and a value that has no place has none."""
    unknown = set(row) - set(INDEX_SCHEMA.names)
    if unknown or not row.get("id") or {"start", "status"} & set(row):
        raise ValueError(f"row {dict(row)}: an id is needed, start and status are filled in, no other keys")
    return {
        key: printable(value) if isinstance(value, str) else value
        for key, value in row.items()
        if value is not None and not _beyond(key, value)
    }


def misfit(row: Row) -> str | None:
    """What of a row the index cannot hold, in words; None where it can hold all."""
    for key, value in row.items():
        if value is not None and _beyond(key, value):
            return f"its {key}, {printable(str(value), 100)}, is more than the index holds"
    return None


def _beyond(key: str, value: Any) -> bool:
    kind = INDEX_SCHEMA.field(key).type
    return pa.types.is_integer(kind) and not -(1 << kind.bit_width - 1) <= value < 1 << kind.bit_width - 1


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2))


def pair_index(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """t of every pair of frames (t, t+1) within one clip, ascending, int64 (sum(length - 1),)."""
    shorter = np.maximum(lengths - 1, 0)
    before = np.cumsum(shorter) - shorter
    return np.arange(int(shorter.sum()), dtype=np.int64) + np.repeat(starts - before, shorter)


# --- The index ----------------------------------------------------------------------------------------------


def write_index(path: Path, rows: Iterable[Row], batch: int = 10_000) -> str:
    """Write the index atomically, `batch` rows at a time, and return the file's sha256."""
    with files.atomic_file(path) as partial:
        with pq.ParquetWriter(partial, INDEX_SCHEMA, compression="zstd") as writer:
            held: list[Row] = []
            for row in rows:
                held.append(row)
                if len(held) == batch:
                    writer.write_table(pa.Table.from_pylist(held, schema=INDEX_SCHEMA))
                    held = []
            if held:
                writer.write_table(pa.Table.from_pylist(held, schema=INDEX_SCHEMA))
        with partial.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


def _parse_index(path: object, content: bytes) -> pa.Table:
    try:
        table = read_parquet(content, INDEX_SCHEMA)
    except ValueError as error:
        raise UserError(f"{path}: not an index ({error}); build it again") from None
    if not pc.all(pc.is_in(table["status"], pa.array(["ok", "bad"]))).as_py():
        raise UserError(f"{path}: not an index (a status is neither ok nor bad); build it again")
    return table


# --- Reading ------------------------------------------------------------------------------------------------


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
            raise UserError(f"{path}: no such store; run `dvc repro {path.stem}`")
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


class _Held(_Items):
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
        if not is_url and (found := joined.follow(Path(path))):
            return cls._of_members(Path(path), *found)
        published = Published(str(path)) if is_url else follow(Path(path))
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
        pairs = len(lengths), int(lengths.sum()) - len(lengths)
        readers: dict[str, _Items] = {
            "clip_start": _Held(CLIPS, pairs[0], lambda: starts),
            "clip_length": _Held(CLIPS, pairs[0], lambda: lengths),
            "pairs": _Held(PAIRS, pairs[1], lambda: pair_index(starts, lengths)),
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


def _check_schema(place: _Place, schema: object) -> None:
    """Raise `UserError` where a store is of another schema than the one known here."""
    if type(schema) is not int:
        raise UserError(f"{place}: schema {shown(schema)}, so not a store; build the store again")
    if schema == SCHEMA:
        return
    if schema > SCHEMA:
        raise UserError(
            f"{place}: schema {schema} is newer than {SCHEMA}, the newest known here; update prelar"
        )
    raise UserError(
        f"{place}: schema {schema} is older than {SCHEMA}; build the store again with this prelar"
    )


def _open_array(place: _Place, name: str) -> _Reader:
    """A reader of one array; it must lie exactly as this module lays it."""
    metadata = _parsed(place, f"{name}/zarr.json")
    fixed = {"frames": FRAMES, "clip_start": CLIPS, "clip_length": CLIPS, "pairs": PAIRS}
    shape = metadata.get("shape")
    if not (
        isinstance(shape, list) and shape and all(type(size) is int and 0 <= size < LONGEST for size in shape)
    ):
        raise UserError(f"{place}/{name}: not an array of a store; build the store again")
    items, *rest = shape
    if name not in fixed and (len(rest) != 1 or rest[0] > WIDEST):
        raise UserError(f"{place}/{name}: not an array of a store; build the store again")
    layout = fixed.get(name) or per_frame(*rest)
    if metadata != layout.metadata(items):
        raise UserError(f"{place}/{name}: laid out by another version or program; build the store again")
    return _Reader(place, name, layout, items)
