"""Reading the structure of WebM: plain clips are told, and whatever might matter makes a clip not plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.videos import webm
from tests import archives
from tests.videos.test_decode import QUIRKS


def test_what_a_header_tells() -> None:
    found = webm.header(archives.clip(frames=30, width=86, rate="30000/1001"))
    assert found is not None
    assert (found.width, found.height, found.fps, found.packets) == (86, 64, 29.97, 30)


@pytest.mark.parametrize("quirk", ["10 bit", "alpha", "4:4:4", "audio", "audio first", "vp8"])
def test_not_plain(quirk: str) -> None:
    assert webm.header(archives.clip(**QUIRKS[quirk])) is None


def element(kind: int, content: bytes) -> bytes:
    return kind.to_bytes((kind.bit_length() + 7) // 8) + (len(content) | 1 << 56).to_bytes(8) + content


KEY = b"\x82\x49\x83\x42\x20"
VIDEO = element(webm.WIDTH, b"\x60") + element(webm.HEIGHT, b"\x40")


def made(
    track: bytes = b"",
    video: bytes = VIDEO,
    block: bytes = b"\x81\x00\x00\x80",
    first: bytes = KEY,
    cluster: bytes = b"",
    segment: bytes = b"",
    time: bytes = b"\x00",
    scale: int = webm.MILLISECOND,
) -> bytes:
    """A clip of two packets, changed in one way."""
    fields = element(webm.NUMBER, b"\x01") + element(webm.KIND, b"\x01") + element(webm.CODEC, b"V_VP9")
    tracks = element(webm.TRACKS, element(webm.TRACK, fields + track + element(webm.VIDEO, video)))
    packets = element(webm.SIMPLE_BLOCK, block + first) + element(
        webm.GROUP, element(webm.BLOCK, b"\x81\x00\x10\x00" + b"\x86")
    )
    content = element(webm.INFO, element(webm.TIMESTAMP_SCALE, scale.to_bytes(4))) + tracks
    content += element(webm.CLUSTER, element(webm.TIMESTAMP, time) + packets + cluster) + segment
    return element(webm.EBML, b"") + element(webm.SEGMENT, content)


def test_a_made_clip_is_plain() -> None:
    assert webm.header(made()) == webm.Header(96, 64, None, 2, (None, None, None, b"\x02"))
    coloured = webm.header(made(video=VIDEO + element(webm.COLOUR, b"x")))
    assert coloured is not None and coloured.look != webm.Header(96, 64, None, 2, ()).look


NOT_PLAIN: dict[str, Callable[[], bytes]] = {
    "laced": lambda: made(block=b"\x81\x00\x00\x86"),
    "another track's packet": lambda: made(block=b"\x82\x00\x00\x80"),
    "time before zero": lambda: made(block=b"\x81\xff\xff\x80"),
    "times out of order": lambda: made(block=b"\x81\x00\x11\x80"),
    "hours": lambda: made(time=b"\x7f\xff\xff\xff"),
    "no key frame": lambda: made(first=b"\x86" + KEY[1:]),
    "a frame shown again": lambda: made(first=b"\x88" + KEY[1:]),
    "profile 1": lambda: made(first=b"\xa2" + KEY[1:]),
    "no sync code": lambda: made(first=KEY[:1] + b"\x00" + KEY[2:]),
    "nothing in the first packet": lambda: made(first=b""),
    "encoded content": lambda: made(track=element(0x6D80, b"")),
    "projection": lambda: made(video=VIDEO + element(0x7670, b"")),
    "cropped": lambda: made(video=VIDEO + element(0x54CC, b"\x01")),
    "two widths": lambda: made(video=VIDEO + VIDEO),
    "no width": lambda: made(video=b""),
    "alpha": lambda: made(cluster=element(webm.GROUP, element(0x75A1, b""))),
    "encrypted": lambda: made(cluster=element(0xAF, b"")),
    "attachments": lambda: made(segment=element(0x1941A469, b"")),
    "two tracks elements": lambda: made(segment=element(webm.TRACKS, element(webm.TRACK, b""))),
    "other ticks": lambda: made(scale=1000),
    "no packets": lambda: element(webm.EBML, b"") + element(webm.SEGMENT, b""),
    "second segment": lambda: made() + element(webm.SEGMENT, b""),
    "cut short": lambda: made()[:-1],
    "empty": lambda: b"",
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_whatever_might_matter_is_not_plain(kind: str) -> None:
    assert webm.header(NOT_PLAIN[kind]()) is None


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read(content: bytes) -> None:
    webm.header(content)
    webm.header(made()[:-1] + content)


@settings(max_examples=100)
@given(st.data())
def test_any_change_is_read(data: st.DataObject) -> None:
    content = bytearray(made())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    webm.header(bytes(content))
