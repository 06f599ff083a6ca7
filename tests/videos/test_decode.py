"""Decoding: every frame in order, quirks of containers and codecs, bad clips that harm no neighbour."""

from __future__ import annotations

import dataclasses
import io
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.utils.errors import UserError
from prelar.utils.frames import Frames
from prelar.videos import decode, webm
from prelar.videos.decode import SCALE, Decoder, command, frames_each, joined_command
from prelar.videos.ffmpeg_log import errors, stream
from tests import archives
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


def second_decoder(content: bytes) -> np.ndarray:
    """All frames by PyAV, resized by its own swscale with the same kernel."""
    with av.open(io.BytesIO(content)) as container:
        frames = [
            frame.reformat(64, 64, "rgb24", interpolation="BICUBIC").to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)


QUIRKS = {
    "plain": {},
    "odd width": {"filters": "scale=427:239"},
    "tiny": {"filters": "scale=17:33"},
    "variable rate": {"filters": "setpts=(N+N*N/7)/12/TB", "options": ("-fps_mode", "vfr")},
    "jumping time": {"filters": "setpts=if(lt(N\\,6)\\,N\\,N+900)/12/TB", "options": ("-fps_mode", "vfr")},
    "bursts": {
        "filters": "setpts=(floor(N/3)/2+mod(N\\,3)/500)/TB",
        "options": ("-fps_mode", "vfr", "-enc_time_base", "1:1000"),
    },
    "single frame": {"frames": 1},
    "10 bit": {"options": ("-pix_fmt", "yuv420p10le", "-profile:v", "2")},
    "alpha": {"filters": "format=rgba", "options": ("-pix_fmt", "yuva420p", "-auto-alt-ref", "0")},
    "4:4:4": {"options": ("-pix_fmt", "yuv444p", "-profile:v", "1")},
    "audio": {
        "inputs": ("-f", "lavfi", "-i", "sine=duration=2"),
        "options": ("-map", "0:v", "-map", "1:a", "-c:a", "libopus"),
    },
    "audio first": {
        "inputs": ("-f", "lavfi", "-i", "sine=duration=2"),
        "options": ("-map", "1:a", "-map", "0:v", "-c:a", "libopus"),
    },
    "vp8": {"options": ("-c:v", "libvpx")},
    "hidden frames": {"frames": 30, "options": ("-auto-alt-ref", "1", "-lag-in-frames", "16")},
    "high rate": {"rate": "30000/1001"},
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_frames_are_those_of_a_second_decoder(decoder: Decoder, quirk: str) -> None:
    content = archives.clip(**QUIRKS[quirk])
    (clip,) = decoder.decode([content])
    wanted = second_decoder(content)
    assert clip.reason is None
    assert clip.frames is not None
    assert clip.frames.shape == wanted.shape
    difference = np.abs(clip.frames.astype(int) - wanted.astype(int)).mean()
    assert difference <= 2


@pytest.mark.parametrize("line", ["X", "Y", "X+Y"])
def test_fine_stripes_become_grey(decoder: Decoder, line: str) -> None:
    stripes = f"geq=lum='16+219*mod({line}\\,2)':cb=128:cr=128"
    lossless = ("-c:v", "libx264", "-qp", "0")
    content = archives.clip(2, 320, 240, filters=stripes, options=lossless, suffix=".mp4")
    (clip,) = decoder.decode([content])
    assert clip.frames is not None
    grey = clip.frames[:, 2:-2, 2:-2]
    assert np.ptp(grey) <= 30 and abs(grey.mean() - 127.5) <= 3


def numbered(frames: int, **more: object) -> bytes:
    """A clip whose frames get brighter, so that order and repetition show."""
    filters = f"geq=lum='16+N*200/{frames}':cb=128:cr=128"
    return archives.clip(frames=frames, filters=filters, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", ["12", "5", "60"])
def test_order_and_number_are_exact(decoder: Decoder, rate: str) -> None:
    (clip,) = decoder.decode([numbered(25, rate=rate)])
    assert clip.frames is not None
    assert len(clip.frames) == 25
    assert (np.diff(clip.frames.mean(axis=(1, 2, 3))) > 3).all()


def test_rotated_clips_come_out_upright(decoder: Decoder, tmp_path: Path) -> None:
    half = archives.clip(width=64, height=96, filters="geq=lum='if(lt(Y,H/2),235,16)':cb=128:cr=128")
    (tmp_path / "a.webm").write_bytes(half)
    for name in ("b.mp4", "b.webm"):
        turned = [
            "-display_rotation",
            "90",
            "-i",
            str(tmp_path / "a.webm"),
            "-c",
            "copy",
            str(tmp_path / name),
        ]
        subprocess.run([decoder.path, "-v", "error", *turned], check=True)
    upright, mp4, webm = decoder.decode(
        [half, (tmp_path / "b.mp4").read_bytes(), (tmp_path / "b.webm").read_bytes()]
    )
    assert upright.frames is not None
    assert mp4.frames is not None
    assert webm.frames is not None
    assert upright.frames[0, :20].mean() > 200 > 60 > upright.frames[0, -20:].mean()
    left, right = mp4.frames[0][:, :20].mean(), mp4.frames[0][:, -20:].mean()
    assert abs(left - right) > 150
    assert len(mp4.frames) == len(webm.frames) == 12
    assert np.array_equal(webm.frames, mp4.frames)


def test_missing_timestamps(decoder: Decoder, tmp_path: Path) -> None:
    """An AVI of MPEG-4 pictures carries no presentation times."""
    content = archives.clip(
        options=("-c:v", "mpeg4", "-b:v", "2M", "-bf", "0"), suffix=".avi", filters="null"
    )
    (clip,) = decoder.decode([content])
    assert clip.frames is not None
    assert len(clip.frames) == 12


def test_size_and_rate_of_the_file(decoder: Decoder) -> None:
    clips = decoder.decode(
        [
            archives.clip(**QUIRKS["odd width"]),
            archives.clip(rate="30000/1001"),
            archives.clip(**QUIRKS["audio first"]),
        ]
    )
    assert [(clip.width, clip.height, clip.fps) for clip in clips] == [
        (427, 239, 12.0),
        (96, 64, 29.97),
        (96, 64, 12.0),
    ]


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"not a video at all\n" * 50, "Invalid data"),
    "noise": (bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)), "Invalid data"),
    "cut short": (archives.clip(frames=30)[:-2000], "ended prematurely"),
    "header only": (archives.clip()[:400], "ffmpeg: "),
    "playlist": (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n", "Invalid data"),
    "list of files": (b"ffconcat version 1.0\nfile /etc/hostname\n", "not on whitelist"),
    "sound only": (
        archives.clip(
            inputs=("-f", "lavfi", "-i", "sine=duration=1"), options=("-map", "1:a", "-c:a", "libopus")
        ),
        "no video in it",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_clips_have_a_reason_and_harm_no_neighbour(decoder: Decoder, kind: str) -> None:
    content, reason = BAD[kind]
    good = [archives.clip(), archives.clip(width=85)]
    first, bad, second = decoder.decode([good[0], content, good[1]])
    assert bad.frames is None
    assert bad.reason is not None
    assert reason in bad.reason
    assert "/proc" not in bad.reason
    assert "0x5" not in bad.reason
    for clip, alone in ((first, good[0]), (second, good[1])):
        assert clip.frames is not None
        assert np.array_equal(clip.frames, decoder.decode([alone])[0].frames)
    assert decoder.decode([content])[0].reason == bad.reason


def test_a_damaged_picture_is_bad(decoder: Decoder) -> None:
    content = bytearray(archives.clip(frames=30, width=320, height=240))
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    (clip,) = decoder.decode([bytes(content)])
    assert clip.frames is None
    assert clip.reason


def test_grouping_changes_nothing(decoder: Decoder) -> None:
    contents = [*archives.clips(7).values(), b"", b"no video"]
    together = decoder.decode(contents)
    for size in (1, 2, 4):
        apart = [
            clip for i in range(0, len(contents), size) for clip in decoder.decode(contents[i : i + size])
        ]
        for one, other in zip(together, apart, strict=True):
            assert one.reason == other.reason
            assert (one.width, one.height, one.fps) == (other.width, other.height, other.fps)
            assert (one.frames is None) == (other.frames is None)
            assert one.frames is None or np.array_equal(one.frames, other.frames)


def test_too_many_frames_are_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_FRAMES", 10)
    good, long = decoder.decode([archives.clip(frames=10), archives.clip(frames=11)])
    assert good.frames is not None
    assert long.reason == "more than 10 frames"


def test_too_large_pictures_are_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64)
    (clip,) = decoder.decode([archives.clip(width=320, height=240)])
    assert clip.frames is None
    assert clip.reason


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_ffmpeg_is_not_the_clips_fault(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    wait = decode._wait

    def kill_first(process: subprocess.Popen[bytes]) -> int:
        time.sleep(0.05)
        process.send_signal(how)
        return wait(process)

    long = archives.clip(frames=600, width=320, height=240)
    with monkeypatch.context() as context, pytest.raises(RuntimeError, match="ffmpeg was killed"):
        context.setattr(decode, "_wait", kill_first)
        decoder.decode([long, long])
    assert [len(clip.frames) for clip in decoder.decode([long, long]) if clip.frames is not None] == [
        600,
        600,
    ]


def test_ffmpeg_ends_although_its_parent_was_killed(tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(archives.clip(frames=600, width=320, height=240))
    code = "import sys, pathlib; from prelar.videos.decode import Decoder; "
    code += "Decoder().decode([pathlib.Path(sys.argv[1]).read_bytes()] * 8)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "clip")], cwd=ROOT)
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    left: list[int] = []
    while not left:
        assert parent.poll() is None
        left = [pid for pid in map(int, listed.read_text().split()) if decodes(pid)]
    parent.kill()
    parent.wait()
    end = time.monotonic() + 120
    while any(decodes(pid) for pid in left):
        assert time.monotonic() < end, "ffmpeg lives on"
        time.sleep(0.05)


def decodes(pid: int) -> bool:
    """Whether a process is an ffmpeg at work on clips."""
    try:
        return b"rawvideo" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_what_the_header_does_not_tell_is_found_out(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    judged = decoder._decode_once

    def header_fails(content: bytes, thorough: bool) -> decode.Clip:
        asked.append(thorough)
        return judged(content, thorough) if thorough else decode.Clip(None, "no")

    (plain,) = decoder.decode([archives.clip()])
    monkeypatch.setattr(decoder, "_decode_once", header_fails)
    (found,) = decoder.decode([archives.clip()])
    assert asked == [False, True]
    assert plain.frames is not None and found.frames is not None
    assert (plain.frames == found.frames).all()
    assert (plain.width, plain.height, plain.fps) == (found.width, found.height, found.fps)


PLAIN = [name for name in QUIRKS if webm.header(archives.clip(**QUIRKS[name]))]


def attempts(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Every joined process from here on: how many clips it had, and whether it was well."""
    seen: list[tuple[int, bool]] = []
    attempt = decoder._decode_joined

    def watched(clips: Sequence[bytes]) -> list[Frames] | None:
        frames = attempt(clips)
        seen.append((len(clips), frames is not None))
        return frames

    monkeypatch.setattr(decoder, "_decode_joined", watched)
    return seen


def test_plain_clips_are_joined(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"plain", "odd width", "variable rate", "jumping time", "hidden frames"} <= set(PLAIN)
    seen = attempts(decoder, monkeypatch)
    contents = [archives.clip(**QUIRKS[name]) for name in PLAIN]
    for clip, content in zip(decoder.decode(contents), contents, strict=True):
        alone = decoder._decode_alone(content)
        assert clip.frames is not None
        assert alone.frames is not None
        assert np.array_equal(clip.frames, alone.frames)
        assert (clip.width, clip.height, clip.fps) == (alone.width, alone.height, alone.fps)
    assert seen == [(len(PLAIN), True)]


def test_two_frames_of_one_time_are_two(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempts(decoder, monkeypatch)
    same = "setts=ts=if(eq(N\\,7)\\,PREV_OUTPTS\\,PTS)"
    twice, mp4 = (archives.clip(frames=30, options=("-bsf:v", same), suffix=s) for s in (".webm", ".mkv"))
    clips = decoder.decode([twice, archives.clip(), mp4, archives.clip(frames=30)])
    assert [clip.reason for clip in clips] == [None] * 4 and seen[0] == (4, True)
    for clip in (clips[0], clips[2]):
        assert clip.frames is not None and clips[3].frames is not None
        assert np.array_equal(clip.frames, clips[3].frames)


def test_clips_that_are_joined_are_bounded_by_their_frames(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "JOINED_FRAMES", 50)
    seen = attempts(decoder, monkeypatch)
    clips = decoder.decode([archives.clip(frames=n) for n in (20, 20, 20, 30, 60, 12)])
    assert [len(clip.frames) for clip in clips if clip.frames is not None] == [20, 20, 20, 30, 60, 12]
    assert seen == [(2, True), (2, True)]


def test_a_closed_decoder_ends_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, long = Decoder(), archives.clip(frames=600, width=320, height=240)
    closing = threading.Timer(0.2, decoder.close)
    monkeypatch.setattr(decode, "_groups", lambda headers: [])
    closing.start()
    with pytest.raises(RuntimeError, match=r"ffmpeg was killed|the decoder is closed"):
        decoder.decode([long] * 50)
    with pytest.raises(RuntimeError, match="the decoder is closed"):
        decoder.decode([long])
    closing.join()


def test_a_bad_clip_is_found_by_halves(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempts(decoder, monkeypatch)
    damaged = bytearray(archives.clip(frames=30, width=320, height=240))
    first = damaged.index(webm.SYNC)
    damaged[first + 7 : first + 47] = bytes(40)
    assert webm.header(bytes(damaged))
    decoded = decoder.decode([archives.clip(frames=n) for n in (8, 9, 10)] + [bytes(damaged)])
    assert [clip.frames is None for clip in decoded] == [False, False, False, True]
    assert seen == [(4, False), (2, True), (2, False)]


def test_an_old_ffmpeg_joins_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempts(decoder, monkeypatch)
    contents = list(archives.clips(3).values())
    together = decoder.decode(contents)
    monkeypatch.setattr(decoder, "_times", False)
    for one, other in zip(together, decoder.decode(contents), strict=True):
        assert one.frames is not None
        assert np.array_equal(one.frames, other.frames)
        assert dataclasses.replace(one, frames=None) == dataclasses.replace(other, frames=None)
    assert seen == [(3, True)]


@pytest.mark.parametrize("count", [2, 40])
def test_open_files_do_not_grow_with_the_clips(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A process may have only some 1,000, and many threads decode at once."""
    before, during = open_files(), []
    wait = decode._wait
    monkeypatch.setattr(decode, "_wait", lambda process: during.append(open_files()) or wait(process))
    clips = decoder.decode([archives.clip(frames=8 + number) for number in range(count)])
    assert [len(clip.frames) for clip in clips if clip.frames is not None] == list(range(8, 8 + count))
    assert len(during) == 1 and during[0] - before <= 8


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_files_stay_open(decoder: Decoder) -> None:
    before = open_files()
    decoder.decode([archives.clip(), b"no video"])
    assert open_files() == before


def test_the_ffmpeg_binary_is_checked(tmp_path: Path, decoder: Decoder) -> None:
    assert decoder.version
    with pytest.raises(UserError, match=r"ssv2\.ffmpeg"):
        Decoder(str(tmp_path / "none"))
    with pytest.raises(UserError, match="is not ffmpeg"):
        Decoder(shutil.which("true"))


def test_the_commands() -> None:
    alone, joined = command("ffmpeg", 3, 4), joined_command("ffmpeg", 3, 4, 5, 2)
    for arguments in (alone, joined):
        assert arguments[arguments.index("-map") + 1] == "0:V:0"
        assert arguments[arguments.index("-vf") + 1].startswith(SCALE)
    assert "concat" not in " ".join(alone)
    assert "accurate_rnd+bitexact" in SCALE


def test_frames_are_given_to_the_clips_of_their_time() -> None:
    two = b"0 1/1000\n83 1/1000\n10000000 1/1000\n"
    counts = frames_each(two, 2)
    assert counts is not None
    assert counts.tolist() == [2, 1]
    for wrong in (b"", b"nan 1/1000\n", b"0 1/1000\n83\n", b"0 1/0\n", b"-83 1/1000\n", two[::-1]):
        assert frames_each(wrong, 1) is None
    for clips in (1, 3):
        assert frames_each(two, clips) is None
    assert frames_each(b"0 1/1000\n20000000 1/1000\n", 3) is None


LOG = """[info] Input #0, matroska,webm, from 'x':
[info]   Metadata:
[info]     title           : Stream #0:0: Video: vp9, 1x1, 1 fps
[info]   Stream #0:0(eng): Audio: opus, 48000 Hz, stereo
[info]   Stream #0:1[0x2]: Video: h264 (High) (avc1 / 0x31637661), yuv420p, 426x240 [SAR 1:1], 12.50 fps
[info]   Stream #0:2: Video: vp9 (Profile 0), yuv420p(tv), 9x9, 7 fps
[info] Stream mapping:
[info]   Stream #0:0: Video: rawvideo, rgb24, 64x64, 12 fps
[matroska,webm @ 0x55aa] [error] File ended prematurely at /proc/self/fd/7.
[vist#0:0/vp9 @ 0x55ab] [dec:vp9 @ 0x66] [error] Decoding error
[in#0 @ 0x1] [warning] a warning
"""


def test_the_log_is_understood() -> None:
    assert stream(LOG) == (426, 240, 12.5)
    assert stream("[info]   Stream #0:0: Video: vp9, yuv420p(tv), 240x320, 1k fps, 1k tbr") == (
        240,
        320,
        1000.0,
    )
    assert stream("[info]   Stream #0:0: Video: none, none") == (None, None, None)
    assert stream("[info] Stream mapping:\n[info]   Stream #0:0: Video: vp9, 9x9") == (None, None, None)
    assert errors(LOG) == "Decoding error; File ended prematurely at the clip"


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_any_log_is_read(log: str) -> None:
    stream(log)
    stream(f"[info]   Stream #0:0: Video: {log}")
    assert len(errors(f"[error] {log}")) <= 200


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_bytes_flipped_anywhere_never_raise(data: st.DataObject) -> None:
    content = bytearray(archives.clip())
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    decoder, neighbour = Decoder(), archives.clip(width=86)
    clip, good = decoder.decode([bytes(content), neighbour])
    assert (clip.frames is None) == (clip.reason is not None)
    alone = decoder._decode_alone(neighbour).frames
    assert good.frames is not None and alone is not None
    assert np.array_equal(good.frames, alone)
