"""A folder of anyone's own videos: which files they are, the clips they are cut into, and the splits.

Videos are recognised by their content or their name's ending, in the folder and all below it, folders behind
links included. Photos and sound are none. Matroska, WebM, MP4, QuickTime and AVI are read; videos in other
containers are named as bad. Each is cut into clips of `seconds`, the last one up to half longer, so that a
video of hours needs no more memory than a short one: by the times of the frames that are there, whatever
length its header claims. A clip is named after its file, `holiday/cat.mp4#0002`.

About every tenth video is for validation, chosen by a hash of its name, so that the others keep their split
when videos are added. Where the hash chooses none, the video of the smallest hash is taken; of a single
video, its last tenth.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prelar.utils import files
from prelar.videos.archive import Member, visible_files
from prelar.videos.decode import MAX_FRAMES, Decoder
from prelar.videos.labels import Label, Labels
from prelar.videos.sequential import Part, Times

REORDERED = 2
ENDINGS = {
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv"),
    *(".ogv", ".3gp"),
}
BRANDS_WITHOUT_VIDEO = {
    *(b"heic", b"heix", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1", b"avif", b"crx "),
    *(b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ", b"jpx ", b"jp2 "),
}
"""The kinds (ISO 14496-12, brands) of files of photos and of sound."""
HELD_OUT = 10
PROBES = 4


def find_videos(folder: Path) -> list[Path]:
    """The video files in a folder and below it, hidden ones left out, in the order of their names."""
    return sorted(
        path
        for path in visible_files(folder)
        if path.is_file() and (path.suffix.lower() in ENDINGS or _is_video(path))
    )


def _is_video(path: Path) -> bool:
    """Whether a file begins as Matroska, WebM, MP4, QuickTime or AVI do, and not as a photo or sound does."""
    try:
        with path.open("rb") as handle:
            begin = handle.read(12)
    except OSError:
        return False
    if begin[4:8] == b"ftyp":
        return begin[8:] not in BRANDS_WITHOUT_VIDEO
    return (
        begin.startswith(b"\x1aE\xdf\xa3")
        or begin[4:8] == b"moov"
        or (begin[:4] == b"RIFF" and begin[8:] == b"AVI ")
    )


def plan(
    folder: Path,
    videos: Sequence[Path],
    decoder: Decoder,
    seconds: float,
    progress: Callable[[int], object] = lambda count: None,
    fewest: int = 1,
) -> tuple[list[Member], Labels]:
    """The clips of all videos in order, and their splits; no clip has a label.

    What only its content makes a video is passed over where it turns out to hold no moving pictures.
    """
    names: list[str] = []
    clips: list[list[Member]] = []
    pool = ThreadPoolExecutor(PROBES)
    try:
        for path, times in zip(videos, pool.map(decoder.seconds, videos), strict=True):
            progress(1)
            if path.suffix.lower() in ENDINGS or times is None or len(times) > 1:
                names.append(_printable(path.relative_to(folder)))
                clips.append(cut(names[-1], path, times, seconds, fewest))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    splits = _splits(names, [len(members) for members in clips])
    labels = {
        member.id: Label(split, None, None)
        for members, chosen in zip(clips, splits, strict=True)
        for member, split in zip(members, chosen, strict=True)
    }
    return [member for members in clips for member in members], Labels(labels, {})


def cut(name: str, path: Path, times: Times | None, seconds: float, fewest: int = 1) -> list[Member]:
    """The clips of one video whose frames have these times, in order; one where they are not known.

    Clips without a frame are none; one that may come out with less than `fewest` joins a neighbour. The
    times of packets without a time of presentation, as in AVI, may be off by `REORDERED` frames.
    """
    if times is None or not len(times):
        return [Member(f"{name}#0000", None, part=Part(path))]
    starts = _starts(times - times[0], seconds, fewest + (REORDERED if fewest > 1 else 0))
    borders = [-math.inf, *((times[starts[1:] - 1] + times[starts[1:]]) / 2).tolist(), math.inf]
    counts = np.diff(starts, append=len(times)).tolist()
    return [
        Member(f"{name}#{number:04d}", None, part=Part(path, begin, end, count))
        for number, ((begin, end), count) in enumerate(zip(itertools.pairwise(borders), counts, strict=True))
    ]


def _starts(times: Times, seconds: float, fewest: int) -> npt.NDArray[np.int64]:
    """The numbers of the frames that clips begin with, given all frames' times from the first on."""
    length = times[-1] * len(times) / max(len(times) - 1, 1)
    cells = np.minimum(np.floor(times / seconds), max(1.0, np.round(length / seconds)) - 1)
    starts = [0]
    for start in (np.flatnonzero(np.diff(cells)) + 1).tolist():
        if start - starts[-1] >= fewest:
            starts.append(start)
    if len(starts) > 1 and len(times) - starts[-1] < fewest:
        del starts[-1]
    ends = [*starts[1:], len(times)]
    pieces = [range(start, end, MAX_FRAMES) for start, end in zip(starts, ends, strict=True)]
    return np.array([number for piece in pieces for number in piece])


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
    if len(names) == 1:
        held_out = -(-counts[0] // HELD_OUT) if counts[0] > 1 else 0
        return [["train"] * (counts[0] - held_out) + ["validation"] * held_out]
    splits = hashed_splits(names)
    return [[splits[name]] * count for name, count in zip(names, counts, strict=True)]


def hashed_splits(names: Sequence[str]) -> dict[str, str]:
    """The split of each name: about every tenth is for validation, at least one, but no single one."""
    drawn = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names}
    chosen = {name for name, value in drawn.items() if value % HELD_OUT == 0}
    if not 0 < len(chosen) < len(drawn):
        chosen = {min(drawn, key=drawn.__getitem__)} if len(drawn) > 1 else set()
    return {name: "validation" if name in chosen else "train" for name in drawn}


def _printable(path: Path) -> str:
    """A name as the index has it: whatever cannot be printed is escaped."""
    name = path.as_posix()
    return name if name.isprintable() else ascii(name)[1:-1]
