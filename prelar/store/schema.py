"""The schema of a store and of its index.

`data/<name>.zarr` is a Zarr v3 group that zarr-python and tensorstore read:

    frames       uint8   (N, 64, 64, 3)   every frame once, RGB, upright, clip after clip
    clip_start   int64   (C,)             first frame of each clip
    clip_length  int64   (C,)             frames of each clip
    pairs        int64   (P,)             t of every pair (t, t+1) within one clip, P = sum(length - 1)
    <name>       float32 (N, D)           optional, one row a frame, such as the actions of demonstrations

Nothing is compressed, so a shard file is its items in order with Zarr's shard index at the end.

`data/<name>.parquet` is the index, one row a clip in the order of ingest; its rows with status "ok" are the
clips of the store in order, the others name what is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from prelar.utils.errors import printable
from prelar.utils.frames import FRAME

SCHEMA = 1
"""The schema's version."""
ABSENT = 2**64 - 1

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


def pair_index(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """t of every pair of frames (t, t+1) within one clip, ascending, int64 (sum(length - 1),)."""
    shorter = np.maximum(lengths - 1, 0)
    before = np.cumsum(shorter) - shorter
    return np.arange(int(shorter.sum()), dtype=np.int64) + np.repeat(starts - before, shorter)


def misfit(row: Row) -> str | None:
    """What of a row the index cannot hold, in words; None where it can hold all."""
    for key, value in row.items():
        if value is not None and exceeds(key, value):
            return f"its {key}, {printable(str(value), 100)}, is more than the index holds"
    return None


def exceeds(key: str, value: Any) -> bool:
    """Whether a value is a number too large for its column of the index."""
    kind = INDEX_SCHEMA.field(key).type
    return pa.types.is_integer(kind) and not -(1 << kind.bit_width - 1) <= value < 1 << kind.bit_width - 1
