"""From a source of clips to rows and frames: what the flow wires together.

A source is a folder of archive parts, downloaded parts, or a folder of extracted clips, with its labels.
Everything here is a function of the source's content and of `min_frames`; how clips are batched and who
decodes them changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prelar import files
from prelar.data import archive, labels, store, video
from prelar.data.archive import Member, Piece
from prelar.data.labels import Labels
from prelar.data.store import Frames, StoreWriter
from prelar.data.video import Decoder
from prelar.errors import UserError

NAME = "something-something-v2"
MAX_BATCH_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """Where clips come from: the archive's pieces, or files of extracted clips; and where the labels are."""

    pieces: tuple[Piece, ...]
    clips: tuple[Path, ...]
    labels: Path

    @property
    def size(self) -> int:
        """Bytes to read: of the pieces, or 0 for extracted clips."""
        return sum(piece.size for piece in self.pieces)

    def members(self, progress: Callable[[int], object] = lambda count: None) -> Iterator[Member]:
        """All clips in order; `progress(n)` hears of every n bytes read of the pieces."""
        if self.pieces:
            return archive.archive_members(self.pieces, progress)
        return archive.folder_members(self.clips)


@dataclasses.dataclass(frozen=True)
class Ingested:
    """One clip on its way into the store: its frames, or None, and its row of the index."""

    frames: Frames | None
    row: dict[str, Any]


def folder_source(folder: Path, labels_path: Path | None) -> Source:
    """The source in a folder, recognised by content. Raises `UserError` where it holds none."""
    if not folder.is_dir():
        raise UserError(f"ssv2.source = {folder}: no such folder; name the folder with the archive's parts")
    entries = sorted(folder.iterdir())
    found = labels_path or labels.find_labels([*entries, folder])
    clips = archive.find_clips(folder)
    if clips:
        return Source((), tuple(clips), found)
    return Source(tuple(archive.find_pieces([path for path in entries if path != found])), (), found)


def files_source(paths: Sequence[Path], labels_path: Path | None) -> Source:
    """The source in the given (downloaded) files."""
    found = labels_path or labels.find_labels(paths)
    return Source(tuple(archive.find_pieces([path for path in paths if path != found])), (), found)


def staging_key(source: Source, known: Labels, version: str, min_frames: int) -> str:
    """A name for all that decides the result, so that only work towards the same result is continued."""
    read = [piece.path for piece in source.pieces] or list(source.clips)
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in read]
    code = (archive.__name__, labels.__name__, store.__name__, video.__name__, __name__)
    decides = {
        "schema": store.SCHEMA,
        "scale": video.SCALE,
        "ffmpeg": version,
        "min_frames": min_frames,
        "files": stamps,
        "code": files.code_digests(*code),
        "labels": [sorted(known.names.items()), [(i, c.split, c.label) for i, c in known.clips.items()]],
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def batches(members: Iterable[Member], size: int) -> Iterator[list[Member]]:
    """Members in lists of `size`, shorter where their files together pass `MAX_BATCH_BYTES`."""
    held: list[Member] = []
    weight = 0
    for member in members:
        held.append(member)
        weight += len(member.content or b"")
        if len(held) == size or weight > MAX_BATCH_BYTES:
            yield held
            held, weight = [], 0
    if held:
        yield held


def after_committed(members: Iterator[Member], writer: StoreWriter) -> Iterator[Member]:
    """The members that the staged store lacks. Raises `UserError` where it holds clips of other files."""
    for row in itertools.islice(writer.rows(), writer.count):
        member = next(members, None)
        if member is None:
            break
        if member.id != row["id"] or (member.content and _sha256(member.content) != row.get("sha256")):
            staged = writer.path.parent
            raise UserError(
                f"clip {row['id']}: the source changed since {staged} was begun; delete that folder"
            )
    yield from members


def ingest(decoder: Decoder, members: Sequence[Member], known: Labels, min_frames: int) -> list[Ingested]:
    """Decode a batch and give every clip its row: good ones with frames, others with a reason."""
    wanted = [member.content for member in members if member.content is not None and member.id in known.clips]
    decoded = iter(decoder.decode(wanted))
    done = []
    for member in members:
        row: dict[str, Any] = {"id": member.id}
        label = known.clips.get(member.id)
        if label is not None:
            row.update(split=label.split, label=label.label, label_id=label.label_id)
        if member.content is None:
            done.append(Ingested(None, {**row, "reason": member.reason}))
            continue
        row["sha256"] = _sha256(member.content)
        if label is None:
            done.append(Ingested(None, {**row, "reason": "the labels files do not name this clip"}))
            continue
        clip = next(decoded)
        row.update(width=clip.width, height=clip.height, fps=clip.fps)
        count = len(clip.frames) if clip.frames is not None else 0
        if clip.frames is None:
            done.append(Ingested(None, {**row, "reason": clip.reason}))
        elif count < min_frames:
            reason = f"{count} frame{'s' * (count != 1)}, fewer than {min_frames}"
            done.append(Ingested(None, {**row, "frames": count, "reason": reason}))
        else:
            done.append(Ingested(clip.frames, row))
    return done


def append(writer: StoreWriter, done: Iterable[Ingested]) -> None:
    """Add a batch to the store and commit it."""
    for clip in done:
        writer.append(clip.frames, clip.row)
    writer.commit()


def append_missing(writer: StoreWriter, known: Labels) -> int:
    """Give every clip that the labels name and the source lacks a row with that reason; returns how many."""
    absent = labels.missing_ids(known, {row["id"] for row in writer.rows()})
    for identity in absent:
        label = known.clips[identity]
        row = {"id": identity, "split": label.split, "label": label.label, "label_id": label.label_id}
        writer.append(None, {**row, "reason": "not in the archive"})
    writer.commit()
    return len(absent)


def attributes(writer: StoreWriter, version: str, min_frames: int) -> dict[str, Any]:
    """The store's attributes: what it was made from, by content, and how."""
    digest, clips = hashlib.sha256(), 0
    for row in writer.rows():
        if row.get("sha256"):
            digest.update(f"{row['id']} {row['sha256']}\n".encode())
            clips += 1
    source = {"name": NAME, "clips": clips, "sha256": digest.hexdigest()}
    return {"source": source, "resize": video.SCALE, "ffmpeg": version, "min_frames": min_frames}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
