"""Latent actions of videos, or of a store, as a Parquet file.

One row for each pair of frames, as far apart as in the model's pre-training, neighbours by default: `clip`
(the file's name, or the clip's id in the store), `frame` and `next` (their numbers within the clip) and
`action`, a fixed-size list of float32. The schema's metadata say which model inferred them.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from prelar import api
from prelar.store.store import Store
from prelar.utils.errors import UserError, printable
from prelar.utils.files import atomic_file, digest
from prelar.utils.frames import FRAME, Frames
from prelar.videos import own_videos
from prelar.videos.decode import Decoder

GROUP = 65_536
SECONDS = 30.0
"""Of a video, so much is in memory at a time."""


class UnreadableError(Exception):
    """A video whose actions cannot be inferred; says why."""


def run(
    sources: Sequence[Path], output: Path, *, checkpoint: Path, device: str = "cpu", ffmpeg: str | None = None
) -> None:
    """Write the latent actions of video files, or of one store (`….zarr`), to `output`.

    A video that cannot be decoded, or tells no rate where the model needs one, is named and left out; one
    without a pair has no rows. Raises `UserError` where nothing is left, and where the checkpoint infers no
    actions.
    """
    stored = [path for path in sources if path.suffix == ".zarr"]
    if stored and len(sources) > 1:
        raise UserError(f"{stored[0]}: a store is read by itself; name no other source beside it")
    for path in () if stored else sources:  # before any is decoded, which takes long
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; name video files, or a store") from None
    model = api.load(checkpoint, device)
    if stored:
        store = Store.open(stored[0])
        clips, total = read_store(store, model), store.num_clips
    else:
        decoder = Decoder(ffmpeg, len(os.sched_getaffinity(0)))
        clips, total = read_videos(sources, model, decoder), len(sources)
    schema = make_schema(model, checkpoint)
    written = rows = 0
    with atomic_file(output) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for name, stride, found in tqdm(clips, total=total, desc="actions", unit="clip", disable=None):
            if len(found):
                writer.write_table(as_table(name, stride, found, schema), row_group_size=GROUP)
                written, rows = written + 1, rows + len(found)
        if not written:
            raise UserError(f"{sources[0]}: no clip with a pair of frames could be read; nothing is written")
    print(f"actions: {rows} of {written} clips -> {output}", flush=True)


def make_schema(model: api.Loaded, checkpoint: Path) -> pa.Schema:
    """The columns, and as metadata the model's keywords and the hash of its file of the action part."""
    about = {"prelar.model": json.dumps(asdict(model.spec), sort_keys=True)}
    part = checkpoint / "action.safetensors"
    if part.is_file():
        about["prelar.action_sha256"] = digest(part)
    fields = [
        pa.field("clip", pa.string(), nullable=False),
        pa.field("frame", pa.int64(), nullable=False),
        pa.field("next", pa.int64(), nullable=False),
        pa.field("action", pa.list_(pa.float32(), model.action_dim), nullable=False),
    ]
    return pa.schema(fields, metadata=about)


def as_table(clip: str, stride: int, actions: api.Floats, schema: pa.Schema) -> pa.Table:
    """The rows of one clip, of actions (T - stride, A)."""
    flat = pa.array(np.ascontiguousarray(actions).reshape(-1))
    frames = np.arange(len(actions), dtype=np.int64)
    columns = [
        pa.array([clip] * len(actions), pa.string()),
        pa.array(frames),
        pa.array(frames + stride),
        pa.FixedSizeListArray.from_arrays(flat, actions.shape[1]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def read_store(store: Store, model: api.Loaded) -> Iterator[tuple[str, int, api.Floats]]:
    """The clips of a store in order: id, frames from one of a pair to the next, actions (T - k, A)."""
    names, strides = store.clip_index["id"].to_pylist(), store.strides(model.spec.frame_gap).tolist()
    clips = zip(names, strides, store.clip_start.tolist(), store.clip_length.tolist(), strict=True)
    for name, stride, start, length in clips:
        yield name, stride, model.infer(store.read(start, length), stride=stride)


def read_videos(
    paths: Sequence[Path], model: api.Loaded, decoder: Decoder
) -> Iterator[tuple[str, int, api.Floats]]:
    """The videos: path as given, frames from one of a pair to the next, latent actions (T - k, A).

    There are no actions of a video that fails.
    """
    for path in paths:
        stride, found = 1, [np.empty((0, model.action_dim), np.float32)]
        try:
            pieces = read_video(path, decoder)
            first, fps = next(pieces)
            if fps is None and model.spec.frame_gap is not None:
                raise UnreadableError("tells no rate, which this model needs")
            stride = model.spec.stride(fps or 0.0)
            found += infer_pieces(model, itertools.chain([first], (piece for piece, _ in pieces)), stride)
        except UnreadableError as error:
            print(printable(f"{path}: left out ({error})"), file=sys.stderr, flush=True)
            del found[1:]
        yield str(path), stride, np.concatenate(found)


def read_video(path: Path, decoder: Decoder) -> Iterator[tuple[Frames, float | None]]:
    """A video piece by piece: frames uint8 (n, 64, 64, 3), and their rate. Raises `UnreadableError`."""
    for member in own_videos.cut(path.name, path, decoder.seconds(path), SECONDS):
        assert member.part is not None
        clip = decoder.decode_part(member.part)
        if clip.frames is None:
            raise UnreadableError(clip.reason)
        yield clip.frames, clip.fps


def infer_pieces(model: api.Loaded, pieces: Iterable[Frames], stride: int = 1) -> Iterator[api.Floats]:
    """The latent actions of a video that comes in pieces, as if it came whole.

    A piece is led by the frames before it that the model looks at, which lie `stride` apart.
    """
    lead = (model.spec.action_window - 1) * stride
    before = np.empty((0, *FRAME), np.uint8)
    for piece in pieces:
        frames = np.concatenate([before, piece])
        if len(frames) > stride:
            yield model.infer(frames, stride=stride)[max(len(before) - stride, 0) :]
        before = frames[-lead:]
