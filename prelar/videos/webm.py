"""Plain WebM clips, told by reading their structure: one VP9 track, whole, beginning with a key frame.

Plain clips can be decoded one after the other as if they were one video, which is the fastest way there is:
nothing of a clip reaches into the next. Anything that is not known to be harmless makes a clip not plain, so
hostile bytes cost no more than speed. Facts: RFC 8794 (EBML), RFC 9559 (Matroska), the VP9 bitstream
specification, section 6.2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

EBML, SEGMENT, INFO, TRACKS, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675
TIMESTAMP_SCALE, TRACK, VIDEO, TIMESTAMP = 0x2AD7B1, 0xAE, 0xE0, 0xE7
NUMBER, KIND, CODEC, DURATION = 0xD7, 0x83, 0x86, 0x23E383
WIDTH, HEIGHT, INTERLACED, FIELDS, COLOUR = 0xB0, 0xBA, 0x9A, 0x9D, 0x55B0
LOOK = (INTERLACED, FIELDS, COLOUR)
SIMPLE_BLOCK, GROUP, BLOCK = 0xA3, 0xA0, 0xA1
IGNORED = {
    *(0xEC, 0xBF, 0x114D9B74, 0x1C53BB6B, 0x1254C367),  # void, checksum, seek heads, cues, tags
    # of a track: identity, lacing, languages, name, additions, cache, flags, the codec's name and set-up
    *(0x73C5, 0x9C, 0x22B59C, 0x22B59D, 0x536E, 0x55EE, 0x6DE7, 0xB9, 0x88, 0x55AA, 0x258688, 0x63A2),
    *(0x54B0, 0x54BA, 0x54B2),  # size on display
    *(0xA7, 0xAB, 0x9B, 0xFB),  # a cluster's place and size, a block's duration and reference
}
MILLISECOND = 1_000_000
MAX_MILLISECONDS = 3_600_000
LACED = 0x06
SYNC = b"\x49\x83\x42"


@dataclasses.dataclass(frozen=True)
class Header:
    """A plain clip: size in pixels, frames a second if the file tells, packets, and how colours are meant.

    Clips of equal `look` can follow one another in one video.
    """

    width: int
    height: int
    fps: float | None
    packets: int
    look: tuple[bytes | None, ...]


def header(content: bytes) -> Header | None:
    """What a plain clip's structure tells; None for whatever is not a plain clip."""
    try:
        return _header(content)
    except (ValueError, IndexError, KeyError):
        return None


def packets(content: bytes) -> int:
    """How many packets a Matroska or WebM file holds, as far as its structure can be followed: in haste."""
    count, at, end = 0, 0, len(content)
    try:
        while at < end:
            length = 9 - content[at].bit_length()
            kind = content[at : at + length]
            at += length
            length = 9 - content[at].bit_length()
            if kind in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"):  # what lies in a segment, in a cluster
                at += length
                continue
            count += kind in (b"\xa3", b"\xa0")
            at += length + (int.from_bytes(content[at : at + length]) & ((1 << 7 * length) - 1))
    except IndexError:
        pass
    return count


def _header(content: bytes) -> Header | None:
    (first, _, _), (kind, begin, end), *rest = _elements(content, 0, len(content))
    if first != EBML or kind != SEGMENT or any(other not in IGNORED for other, _, _ in rest):
        return None
    track: dict[int, bytes] = {}
    packets: list[tuple[int, int]] = []
    for kind, inner, until in _elements(content, begin, end):
        if kind == CLUSTER:
            packets += _packets(content, inner, until)
        elif kind == TRACKS:
            if track:
                return None
            track = _track(content, inner, until)
        elif kind == INFO:
            scale = [
                content[i:j] for found, i, j in _elements(content, inner, until) if found == TIMESTAMP_SCALE
            ]
            if any(_number(value) != MILLISECOND for value in scale):
                return None
        elif kind not in IGNORED:
            return None
    return _plain(content, track, packets)


def _plain(content: bytes, track: dict[int, bytes], packets: list[tuple[int, int]]) -> Header | None:
    """The header of a clip of these packets (time in ms, place in the file), if all is plain."""
    times = [time for time, _ in packets]
    key = content[packets[0][1] :][:5]
    video = track[CODEC] == b"V_VP9" and _number(track[KIND]) == 1 and _number(track[NUMBER]) == 1
    in_order = all(one <= other for one, other in itertools.pairwise(times))
    if not video or not in_order or not 0 <= times[0] <= times[-1] <= MAX_MILLISECONDS:
        return None
    if key[0] & 0xFC != 0x80 or key[1:4] != SYNC:
        return None
    lasts = _number(track.get(DURATION, b""))
    fps = round(1e9 / lasts, 2) if lasts else None
    look = (*(track.get(field) for field in LOOK), bytes([key[4] >> 4]))
    return Header(_number(track[WIDTH]), _number(track[HEIGHT]), fps, len(packets), look)


def _track(content: bytes, begin: int, end: int) -> dict[int, bytes]:
    """The fields of the only track and of its video. Raises `ValueError` where there is more."""
    tracks = [element for element in _elements(content, begin, end) if element[0] not in IGNORED]
    if [kind for kind, _, _ in tracks] != [TRACK]:
        raise ValueError("not one track")
    fields: dict[int, bytes] = {}
    places = list(_elements(content, *tracks[0][1:]))
    places += [inner for kind, i, j in places if kind == VIDEO for inner in _elements(content, i, j)]
    for kind, i, j in places:
        if kind in IGNORED or kind == VIDEO:
            continue
        if kind not in (NUMBER, KIND, CODEC, DURATION, WIDTH, HEIGHT, *LOOK) or kind in fields:
            raise ValueError("a field that may matter")
        fields[kind] = content[i:j]
    return fields


def _packets(content: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Time in milliseconds and place of every packet of a cluster."""
    time = -1
    for kind, i, j in _elements(content, begin, end):
        if kind == TIMESTAMP:
            time = _number(content[i:j])
        elif kind == SIMPLE_BLOCK:
            yield _packet(content, time, i)
        elif kind == GROUP:
            for inner, at, _ in _elements(content, i, j):
                if inner == BLOCK:
                    yield _packet(content, time, at)
                elif inner not in IGNORED:
                    raise ValueError("a block with additions")
        elif kind not in IGNORED:
            raise ValueError("an element that may matter")


def _packet(content: bytes, time: int, begin: int) -> tuple[int, int]:
    """Time and place of a block's packet: after the track's number, the time in the cluster, the flags."""
    if content[begin] != 0x81 or content[begin + 3] & LACED or time < 0:
        raise ValueError("not a packet of its own of track 1")
    return time + int.from_bytes(content[begin + 1 : begin + 3], signed=True), begin + 4


def _elements(content: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Every element's identifier and where its content begins and ends. Raises `ValueError` past `end`."""
    while begin < end:
        length = 9 - content[begin].bit_length()
        kind = int.from_bytes(content[begin : begin + length])
        begin += length
        first = content[begin]
        length = 9 - first.bit_length()
        size = int.from_bytes(content[begin : begin + length]) & ((1 << 7 * length) - 1)
        begin += length
        if length > 8 or begin + size > end:
            raise ValueError("not whole")
        yield kind, begin, begin + size
        begin += size


def _number(value: bytes) -> int:
    return int.from_bytes(value)
