"""Building a store and its index: appended straight to shard files, whole after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from prelar.store import schema
from prelar.store.schema import (
    INDEX_SCHEMA,
    SCHEMA,
    Layout,
    Row,
    exceeds,
    index_path,
    misfit,
    pair_index,
)
from prelar.store.store import Store
from prelar.utils import files
from prelar.utils.errors import UserError, printable
from prelar.utils.frames import Frames


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
        self._frames = _Column(path / "frames", schema.FRAMES, items)
        self._arrays = {
            name: _Column(path / name, schema.per_frame(width), items) for name, width in widths.items()
        }
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
            ("clip_start", schema.CLIPS, starts),
            ("clip_length", schema.CLIPS, lengths),
            ("pairs", schema.PAIRS, pair_index(starts, lengths)),
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
        return files.digest(partial)


def _checked_row(row: Row) -> dict[str, Any]:
    """A row as the index can hold it: texts are printable, and a value that has no place has none."""
    unknown = set(row) - set(INDEX_SCHEMA.names)
    if unknown or not row.get("id") or {"start", "status"} & set(row):
        raise ValueError(f"row {dict(row)}: an id is needed, start and status are filled in, no other keys")
    return {
        key: printable(value) if isinstance(value, str) else value
        for key, value in row.items()
        if value is not None and not exceeds(key, value)
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2))
