"""A folder of anyone's own videos: which files they are, the clips they are cut into, and the splits.

Videos are recognised by their content or their name's ending, in the folder and all below it. Matroska, WebM,
MP4, QuickTime and AVI can be cut without losing a frame; videos in other containers are named as bad. Each
is cut into clips of `seconds`, the last one up to half longer, so that a video of hours needs no more memory
than a short one. A clip is named after its file, `holiday/cat.mp4#0002`.

About every tenth video is for validation, chosen by a hash of its name, so that the others keep their split
when videos are added. Where the hash chooses none, the video of the smallest hash is taken; of a single
video, its last tenth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prelar import files
from prelar.data.archive import Member
from prelar.data.labels import Label, Labels
from prelar.data.video import Decoder, Part

ENDINGS = {
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv"),
    *(".ogv", ".3gp"),
}
HELD_OUT = 10
PROBES = 4


def find_videos(folder: Path) -> list[Path]:
    """The video files in a folder and below it, hidden ones left out, in the order of their names."""
    found = (path for path in folder.rglob("*") if path.is_file())
    shown = (
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(path for path in shown if path.suffix.lower() in ENDINGS or _is_video(path))


def _is_video(path: Path) -> bool:
    """Whether a file begins as Matroska, WebM, MP4, QuickTime or AVI do."""
    try:
        with path.open("rb") as handle:
            begin = handle.read(12)
    except OSError:
        return False
    return (
        begin.startswith(b"\x1aE\xdf\xa3")
        or begin[4:8] in (b"ftyp", b"moov")
        or (begin[:4] == b"RIFF" and begin[8:] == b"AVI ")
    )


def plan(
    folder: Path,
    videos: Sequence[Path],
    decoder: Decoder,
    seconds: float,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[list[Member], Labels]:
    """The clips of all videos in order, and their splits; no clip has a label."""
    names = [_shown(path.relative_to(folder)) for path in videos]
    clips: list[list[Member]] = []
    with ThreadPoolExecutor(PROBES) as pool:
        for name, path, length in zip(names, videos, pool.map(decoder.seconds, videos), strict=True):
            clips.append(cut(name, path, length, seconds))
            progress(1)
    splits = _splits(names, [len(members) for members in clips])
    labels = {
        member.id: Label(split, None, None)
        for members, chosen in zip(clips, splits, strict=True)
        for member, split in zip(members, chosen, strict=True)
    }
    return [member for members in clips for member in members], Labels(labels, {})


def cut(name: str, path: Path, length: float | None, seconds: float) -> list[Member]:
    """The clips of one video of `length` seconds, one where that is not known."""
    count = max(1, round(length / seconds)) if length else 1
    return [
        Member(
            f"{name}#{number:04d}",
            None,
            part=Part(path, number * seconds, seconds if number + 1 < count else None),
        )
        for number in range(count)
    ]


def with_digests(members: Sequence[Member]) -> Iterator[Member]:
    """The members with the sha256 of their file; one that cannot be read gets a reason."""
    held: tuple[Path, str] | None = None
    for member in members:
        assert member.part is not None
        path = member.part.path
        try:
            if held is None or held[0] != path:
                held = path, files.digest(path)
            yield Member(member.id, None, part=member.part, sha256=held[1])
        except OSError as error:
            yield Member(member.id, None, f"cannot be read: {error.strerror}")


def _splits(names: Sequence[str], counts: Sequence[int]) -> list[list[str]]:
    """The split of every clip of every video, given the videos' names and numbers of clips."""
    drawn = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names]
    if len(names) == 1:
        held_out = -(-counts[0] // HELD_OUT) if counts[0] > 1 else 0
        return [["train"] * (counts[0] - held_out) + ["validation"] * held_out]
    chosen = {number for number, value in enumerate(drawn) if value % HELD_OUT == 0}
    chosen = chosen or {drawn.index(min(drawn))}
    chosen = chosen if len(chosen) < len(names) else {drawn.index(min(drawn))}
    return [["validation" if number in chosen else "train"] * count for number, count in enumerate(counts)]


def _shown(path: Path) -> str:
    """A name as the index has it: whatever cannot be printed is escaped."""
    name = path.as_posix()
    return name if name.isprintable() else ascii(name)[1:-1]
