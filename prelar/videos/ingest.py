"""From a source of clips to rows and frames: what the flow wires together.

A source is a folder of archive parts, downloaded parts, or a folder of extracted clips, with its labels, or a
folder of anyone's own videos, without. Everything here is a function of the source's content and of the
settings that say what a clip is; how clips are batched and who decodes them changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prelar.store import schema, writer
from prelar.store.writer import StoreWriter
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.frames import Frames
from prelar.videos import archive, decode, ffmpeg_log, labels, sequential, webm
from prelar.videos.archive import Member, Piece
from prelar.videos.decode import Decoder
from prelar.videos.labels import Labels
from prelar.videos.own_videos import find_videos, plan, with_digests
from prelar.videos.sequential import Clip

NAME, OWN = "something-something-v2", "videos"
MAX_BATCH_BYTES = 64 << 20
BYTES_PER_FRAME = 512
"""Bytes of a clip's file for each of its frames, if their number is not known: rather few than many."""
BEGINNING = 1 << 12


@dataclasses.dataclass(frozen=True)
class Source:
    """Where clips come from: the archive's pieces, files of extracted clips, or parts of someone's videos.

    `labels` is where the labels are; a folder of videos has none.
    """

    pieces: tuple[Piece, ...]
    clips: tuple[Path, ...]
    labels: Path | None
    parts: tuple[Member, ...] = ()

    @property
    def size(self) -> int:
        """Bytes to read: of the pieces, or 0 for extracted clips."""
        return sum(piece.size for piece in self.pieces)

    def members(self, progress: Callable[[int], object] = lambda count: None) -> Iterator[Member]:
        """All clips in order; `progress(n)` hears of every n bytes read of the pieces."""
        if self.pieces:
            return archive.archive_members(self.pieces, progress)
        if self.parts:
            return with_digests(self.parts)
        return archive.folder_members(self.clips)


@dataclasses.dataclass(frozen=True)
class Ingested:
    """One clip on its way into the store: its frames, or None, and its row of the index.

    One that there was no room for has neither yet: it is `left` as it came.
    """

    frames: Frames | None
    row: dict[str, Any]
    left: Member | None = None


def folder_source(folder: Path, labels_path: Path | None) -> Source:
    """The source in a folder, recognised by content. Raises `UserError` where it holds none.

    An archive goes before clips beside it, which may be some that were taken out of it.
    """
    if not folder.is_dir():
        raise UserError(f"ssv2.source = {folder}: no such folder; name the folder with the archive's parts")
    entries = sorted(folder.iterdir())
    begin = archive.first_piece(entries)
    found = labels_path or labels.find_labels([*entries, folder], begin)
    if begin is None and (clips := archive.find_clips(folder) or archive.find_clips(folder, archive.ENDINGS)):
        return Source((), tuple(clips), found)
    return Source(tuple(archive.find_pieces([path for path in entries if path != found])), (), found)


def own_videos(folder: Path, labels_path: Path | None) -> list[Path]:
    """The videos of a folder without labels and without an archive of clips: someone's own. Else empty."""
    if labels_path is not None or not folder.is_dir():
        return []
    entries = sorted(folder.iterdir())
    if labels.seek_labels([*entries, folder]) is not None or archive.first_piece(entries) is not None:
        return []
    return find_videos(folder)


def videos_source(
    folder: Path,
    found: Sequence[Path],
    decoder: Decoder,
    seconds: float,
    progress: Callable[[int], object] = lambda count: None,
    fewest: int = 1,
) -> tuple[Source, Labels]:
    """The source of someone's own videos, cut into clips of `seconds`, and the clips' splits.

    No clip has less than `fewest` frames unless its video has.
    """
    members, known = plan(folder, found, decoder, seconds, progress, fewest)
    return Source((), (), None, tuple(members)), known


def files_source(paths: Sequence[Path], labels_path: Path | None) -> Source:
    """The source in the given (downloaded) files."""
    found = labels_path or labels.find_labels(paths)
    return Source(tuple(archive.find_pieces([path for path in paths if path != found])), (), found)


def staging_key(source: Source, known: Labels, version: str, min_frames: int) -> str:
    """A name for all that decides the result, so that only work towards the same result is continued."""
    parts = [member.part for member in source.parts if member.part is not None]
    read = [piece.path for piece in source.pieces] or list(source.clips)
    read = read or sorted({part.path for part in parts})
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in read]
    code = [
        module.__name__ for module in (archive, ffmpeg_log, labels, schema, writer, sequential, decode, webm)
    ]
    decides = {
        "schema": schema.SCHEMA,
        "scale": decode.SCALE,
        "ffmpeg": version,
        "min_frames": min_frames,
        "files": stamps,
        "parts": [(part.begin, part.end) for part in parts],
        "code": files.code_digests(*code, plan.__module__, __name__),
        "labels": [sorted(known.names.items()), [(i, c.split, c.label) for i, c in known.clips.items()]],
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def batches(members: Iterable[Member], size: int) -> Iterator[list[Member]]:
    """Members in lists of `size`, shorter where they and their frames together pass `MAX_BATCH_BYTES`."""
    held: list[Member] = []
    weight = 0
    for member in members:
        more = _weight(member)
        if held and (len(held) == size or weight + more > MAX_BATCH_BYTES):
            yield held
            held, weight = [], 0
        held.append(member)
        weight += more
    if held:
        yield held


def _weight(member: Member) -> int:
    """Bytes that a member takes in memory, its frames included, so far as that is known beforehand."""
    content = member.content or b""
    if member.part is not None:
        frames = member.part.frames or decode.MAX_FRAMES
    else:
        frames = webm.packets(content) or max(_claimed_frames(content), len(content) // BYTES_PER_FRAME)
    return len(content) + min(frames, decode.MAX_FRAMES) * schema.FRAMES.item_bytes


def _claimed_frames(content: bytes) -> int:
    """How many frames or packets an MP4, QuickTime or AVI file says that it has."""
    sizes, runs = (re.findall(kind, content, re.DOTALL) for kind in (rb"stsz.{8}(.{4})", rb"trun.{4}(.{4})"))
    in_avi = re.findall(rb"avih.{20}(.{4})", content[:BEGINNING], re.DOTALL)
    return sum(map(int.from_bytes, sizes + runs)) + sum(int.from_bytes(each, "little") for each in in_avi)


def labels_of(known: Labels, members: Iterable[Member]) -> Labels:
    """The part of the labels that concerns the given members."""
    clips = {member.id: known.clips[member.id] for member in members if member.id in known.clips}
    return dataclasses.replace(known, clips=clips)


def after_committed(members: Iterator[Member], writer: StoreWriter) -> Iterator[Member]:
    """The members that the staged store lacks. Raises `UserError` where it holds clips of other files."""
    for row in itertools.islice(writer.rows(), writer.count):
        member = next(members, None)
        if member is None:
            break
        if member.id != row["id"] or (not member.reason and _digest(member) != row.get("sha256")):
            staged = writer.path.parent
            raise UserError(
                f"clip {row['id']}: the source changed since {staged} was begun; delete that folder"
            )
    yield from members


def ingest(decoder: Decoder, members: Sequence[Member], known: Labels, min_frames: int) -> list[Ingested]:
    """Decode a batch and give every clip its row: good ones with frames, others with a reason.

    Where their frames turn out to be more than a batch may hold, the last clips are left for `completed`.
    """
    named = [member for member in members if member.id in known.clips]
    decoded = decoder.decode_each([member.content for member in named if member.content is not None])
    parts = iter(decoder.decode_parts([member.part for member in named if member.part is not None]))
    done, held = [], 0
    for member in members:
        row: dict[str, Any] = {"id": member.id}
        label = known.clips.get(member.id)
        if label is not None:
            row.update(split=label.split, label=label.label, label_id=label.label_id)
        if member.content is None and member.part is None:
            done.append(Ingested(None, {**row, "reason": member.reason}))
            continue
        row["sha256"] = _digest(member)
        if label is None:
            done.append(Ingested(None, {**row, "reason": "the labels files do not name this clip"}))
        elif held > MAX_BATCH_BYTES and member.part is None:
            done.append(Ingested(None, row, left=member))
        else:
            done.append(_with_frames(next(parts if member.part else decoded), row, min_frames))
            held += done[-1].frames.nbytes if done[-1].frames is not None else 0
    return done


def _with_frames(clip: Clip, row: dict[str, Any], min_frames: int) -> Ingested:
    """A decoded clip with its row, which so far says whose it is."""
    row.update(width=clip.width, height=clip.height, fps=clip.fps)
    count = len(clip.frames) if clip.frames is not None else 0
    if clip.frames is None:
        return Ingested(None, {**row, "reason": clip.reason})
    if count < min_frames:
        reason = f"{count} frame{'s' * (count != 1)}, fewer than {min_frames}"
        return Ingested(None, {**row, "frames": count, "reason": reason})
    return Ingested(clip.frames, row)


def completed(
    decoder: Decoder, done: Iterable[Ingested], known: Labels, min_frames: int
) -> Iterator[Ingested]:
    """A batch with the clips that were left, each decoded when it is asked for."""
    for clip in done:
        if clip.left is None:
            yield clip
        else:
            yield from ingest(decoder, [clip.left], known, min_frames)


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


def attributes(writer: StoreWriter, version: str, min_frames: int, name: str = NAME) -> dict[str, Any]:
    """The store's attributes: what it was made from, by content, and how."""
    digest, clips = hashlib.sha256(), 0
    for row in writer.rows():
        if row.get("sha256"):
            digest.update(f"{row['id']} {row['sha256']}\n".encode())
            clips += 1
    source = {"name": name, "clips": clips, "sha256": digest.hexdigest()}
    return {"source": source, "resize": decode.SCALE, "ffmpeg": version, "min_frames": min_frames}


def _digest(member: Member) -> str:
    """sha256 of a member's file."""
    return member.sha256 or hashlib.sha256(member.content or b"").hexdigest()
