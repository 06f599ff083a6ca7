"""The one law of own videos: the clips of a video, put together, are its frames, each once, in order."""

from __future__ import annotations

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.utils.frames import Frames
from prelar.videos import own_videos, sequential
from prelar.videos.decode import SCALE, Decoder
from prelar.videos.ffmpeg_log import Log
from prelar.videos.sequential import Clip, Part, SequentialDecode

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-x265-params")
SOUND = ("-f", "lavfi", "-i", "sine=duration=12", "-c:a", "aac")
TWICE = "setts=ts=if(eq(mod(N\\,30)\\,7)\\,PREV_OUTPTS\\,PTS)"
SECONDS = 1.0


def ffmpeg(*words: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def film(
    path: Path, *options: object, rate: str = "30", seconds: float = 4.3, before: tuple[str, ...] = ()
) -> Path:
    """A video whose frames all differ; `options` are ffmpeg's for the output, `before` for the pictures."""
    source = f"testsrc2=size=64x64:rate={rate}:duration={seconds}"
    ffmpeg(*before, "-f", "lavfi", "-i", source, *options, path)
    return path


def one_pass(path: Path) -> Frames:
    """All frames of a file, n x 64 x 64 x 3, decoded in one go."""
    options = ("-map", "0:V:0", "-vf", f"{SCALE},format=rgb24", "-fps_mode", "passthrough", "-f", "rawvideo")
    return np.frombuffer(ffmpeg("-i", path, *options, "-"), np.uint8).reshape(-1, 64, 64, 3)


def in_clips(path: Path, seconds: float = SECONDS, decoder: Decoder | None = None) -> list[Clip]:
    decoder = decoder or Decoder(threads=2)
    members = own_videos.cut(path.name, path, decoder.seconds(path), seconds, fewest=8)
    return [decoder.decode_part(member.part) for member in members if member.part]


def holds(path: Path, seconds: float = SECONDS) -> int:
    """Assert the law of a video, none of whose clips is bad; returns how many clips it has."""
    clips, wanted = in_clips(path, seconds), one_pass(path)
    assert [clip.reason for clip in clips if clip.reason] == []
    frames = [clip.frames for clip in clips if clip.frames is not None]
    assert all(len(held) >= min(8, len(wanted)) for held in frames)
    assert np.array_equal(np.concatenate(frames), wanted)
    return len(clips)


def vfr(expression: str) -> tuple[str, ...]:
    return ("-vf", f"setpts={expression}", "-fps_mode", "vfr", "-enc_time_base", "1:1000")


VIDEOS: dict[str, tuple[str, tuple[object, ...]]] = {
    "open groups": ("mp4", (*X264, "-g", "12", "-x264-params", "open-gop=1:bframes=3")),
    "open groups in mkv": ("mkv", (*X264, "-g", "12", "-x264-params", "open-gop=1:bframes=3")),
    "intra refresh": ("mp4", (*X264, "-g", "24", "-x264-params", "intra-refresh=1")),
    "intra refresh in mkv": ("mkv", (*X264, "-g", "24", "-x264-params", "intra-refresh=1")),
    "h264 with b": ("mov", (*X264, "-bf", "3", "-g", "40")),
    "hevc groups of 2": ("mp4", (*X265, "log-level=none", "-g", "2")),
    "hevc groups of 3": ("mp4", (*X265, "log-level=none", "-g", "3")),
    "hevc open groups": ("mkv", (*X265, "log-level=none:open-gop=1:bframes=4", "-g", "15")),
    "mpeg4 with b in avi": ("avi", ("-c:v", "mpeg4", "-vtag", "DIVX", "-bf", "2", "-g", "60")),
    "h264 in avi": ("avi", (*X264, "-bf", "2", "-g", "20")),
    "mpeg2 with b": ("mkv", ("-c:v", "mpeg2video", "-bf", "2", "-g", "15")),
    "vp8 with hidden frames": ("webm", ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16")),
    "mjpeg": ("mov", ("-c:v", "mjpeg")),
    "fragments": ("mp4", (*X264, "-g", "20", "-movflags", "frag_keyframe+empty_moov")),
    "sound goes on": ("mp4", (*SOUND, *X264)),
    "sound goes on in mkv": ("mkv", (*SOUND, *X264)),
    "clock begins late": ("mkv", (*X264, "-output_ts_offset", "95443.7")),
    "clock begins late in mp4": ("mp4", (*X264, "-output_ts_offset", "300")),
    "two of one time": ("webm", ("-c:v", "libvpx", "-bsf:v", TWICE)),
    "two of one time in mkv": ("mkv", (*X264, "-bf", "0", "-bsf:v", TWICE)),
    "variable rate": ("mp4", (*vfr("(N+8*sin(N/9))/24/TB"), *X264)),
    "bursts": ("mkv", (*vfr("(floor(N/10)+mod(N\\,10)/100)/TB"), *X264)),
    "few frames a minute": ("mkv", (*vfr("N*7/TB"), *X264)),
    "a pause of an hour": ("mp4", (*vfr("(N/30+if(gt(N\\,64)\\,3600))/TB"), *X264)),
}  # fmt: skip


@pytest.mark.parametrize("name", VIDEOS)
def test_clips_are_the_frames(tmp_path: Path, name: str) -> None:
    ending, options = VIDEOS[name]
    assert holds(film(tmp_path / f"a.{ending}", *options)) > 1


@settings(max_examples=12, deadline=None)
@given(
    rate=st.sampled_from(["24000/1001", "30000/1001", "60000/1001", "15000/1001", "120000/1001", "7", "25"]),
    ending=st.sampled_from(["mp4", "mkv", "avi", "mov"]),
    group=st.sampled_from([2, 3, 12, 50, 250]),
    b_frames=st.integers(0, 3),
    seconds=st.sampled_from([0.5, 0.7, 1.0, 2.5]),
)
def test_clips_are_the_frames_at_any_rate(
    tmp_path_factory: pytest.TempPathFactory,
    rate: str,
    ending: str,
    group: int,
    b_frames: int,
    seconds: float,
) -> None:
    path = tmp_path_factory.mktemp("rate") / f"a.{ending}"
    assert holds(film(path, *X264, "-g", group, "-bf", b_frames, rate=rate), seconds) > 0


def test_a_video_that_begins_after_its_sound(tmp_path: Path) -> None:
    """An empty edit in MP4, and a later first time elsewhere."""
    for ending in ("mp4", "mkv"):
        before = ("-itsoffset", "1.5")
        assert holds(film(tmp_path / f"a.{ending}", *SOUND, *X264, before=before)) > 1


def test_what_an_edit_list_hides_is_no_frame(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4", *X264, "-g", 250, "-bf", 2)
    ffmpeg("-ss", "1.3", "-i", whole, "-c", "copy", tmp_path / "cut.mp4")
    assert holds(tmp_path / "cut.mp4") == 3 and len(one_pass(tmp_path / "cut.mp4")) < 100


def test_a_recording_of_broadcast_that_was_put_into_another_container(tmp_path: Path) -> None:
    """Clocks that begin late, and first pictures whose references were not recorded."""
    film(tmp_path / "a.ts", "-c:v", "mpeg2video", "-bf", "2", "-g", "15", "-output_ts_offset", "5000")
    for ending in ("mkv", "mp4"):
        ffmpeg("-fflags", "+genpts", "-i", tmp_path / "a.ts", "-c", "copy", tmp_path / f"a.{ending}")
        assert holds(tmp_path / f"a.{ending}") > 1


def test_times_that_go_back_lose_nothing(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", "-c:v", "mjpeg", "-bsf:v", "setts=pts=if(gt(N\\,60)\\,PTS-1500\\,PTS)")
    assert holds(path) > 1


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_what_is_broken_in_the_middle_spoils_only_what_it_touches(tmp_path: Path, ending: str) -> None:
    path = film(tmp_path / f"a.{ending}", *X264, "-g", 15, "-crf", 1, seconds=6)
    good = in_clips(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 900] = bytes(900)
    path.write_bytes(content)
    told = [in_clips(path, decoder=Decoder(threads=threads)) for threads in (1, 4)]
    for one, other in zip(*told, strict=True):
        assert (one.reason, one.frames is None) == (other.reason, other.frames is None)
    bad = [number for number, clip in enumerate(told[0]) if clip.frames is None]
    assert 1 <= len(bad) <= 2 and all("ffmpeg: " in str(told[0][number].reason) for number in bad)
    for number, clip in enumerate(told[0]):
        assert number in bad or np.array_equal(clip.frames, good[number].frames), number


def test_a_video_cut_short_keeps_what_is_there(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", *X264, "-g", 15, "-crf", 1, seconds=6)
    good = in_clips(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    clips = in_clips(path)
    assert len(clips) in (4, 5) and [clip.frames is None for clip in clips] == [False] * (len(clips) - 1) + [
        True
    ]
    assert all(
        np.array_equal(clip.frames, other.frames) for clip, other in zip(clips[:-1], good, strict=False)
    )


def watched(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every sequential decode that is begun from here on: whether it is traced."""
    begun: list[bool] = []
    new = decoder._readers._new.keywords["start"]

    def start(source: int, traced: bool) -> SequentialDecode:
        begun.append(traced)
        return new(source, traced)

    monkeypatch.setitem(decoder._readers._new.keywords, "start", start)
    return begun


def planned(path: Path, decoder: Decoder) -> list[Part]:
    members = own_videos.cut(path.name, path, decoder.seconds(path), SECONDS)
    return [member.part for member in members if member.part]


def test_parts_that_were_announced_take_turns_at_one_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, paths = Decoder(), [film(tmp_path / name, *X264) for name in ("a.mp4", "b.mkv")]
    parts = [part for path in paths for part in planned(path, decoder)]
    begun = watched(decoder, monkeypatch)
    for part in parts:
        decoder.announce([part])
    with ThreadPoolExecutor(len(parts)) as pool:
        late_first = {part: pool.submit(decoder.decode_part, part) for part in reversed(parts)}
    clips = [late_first[part].result().frames for part in parts]
    assert begun == [False, False]
    assert np.array_equal(np.concatenate(clips), np.concatenate([one_pass(path) for path in paths]))


def test_a_decode_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless what is asked for lies behind."""
    decoder, path = Decoder(), film(tmp_path / "a.mp4", *X264)
    parts, wanted = planned(path, decoder), one_pass(path)
    begun = watched(decoder, monkeypatch)
    clips = [decoder.decode_part(parts[number]).frames for number in (0, 2, 1, 3)]
    assert begun == [False, False]
    for clip, first in zip(clips, (0, 60, 30, 90), strict=True):
        assert clip is not None and np.array_equal(clip, wanted[first : first + len(clip)])


def test_a_killed_decode_is_not_the_videos_fault(tmp_path: Path) -> None:
    """A second attempt has all of its frames, and so has who waits behind it."""
    decoder, path = Decoder(), film(tmp_path / "a.mp4", *X264, seconds=40)
    parts = planned(path, decoder)
    for begin, end in ((0, 1), (1, 30), (30, None)):
        decoder.announce(parts[begin:end])
    first = decoder.decode_part(parts[0]).frames
    (process,) = decoder._running
    process.kill()
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(decoder.decode_parts, parts[30:])
        with pytest.raises(RuntimeError, match="ffmpeg was killed"):
            decoder.decode_parts(parts[1:30])
        clips = decoder.decode_parts(parts[1:30]) + rest.result()
    assert first is not None
    assert np.array_equal(np.concatenate([first, *(clip.frames for clip in clips)]), one_pass(path))


def test_who_waits_for_a_turn_ends_with_the_decoder(tmp_path: Path) -> None:
    decoder, path = Decoder(), film(tmp_path / "a.mp4", *X264)
    parts = planned(path, decoder)
    decoder.announce(parts[:1])
    decoder.announce(parts[1:])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(decoder.decode_parts, parts[1:])
        decoder.close()
        with pytest.raises(RuntimeError, match="the decoder is closed"):
            waiting.result()


def test_a_decode_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "MAX_SECONDS", 0.5)
    decoder, path = Decoder(), film(tmp_path / "a.mp4", *X264, seconds=40)
    parts = planned(path, decoder)
    assert decoder.decode_part(parts[0]).frames is not None
    (process,) = decoder._running
    process.send_signal(signal.SIGSTOP)
    reasons = [clip.reason for clip in decoder.decode_parts(parts[1:])]
    assert reasons[-3:] == ["decoding a clip took more than 0.5 s"] * 3
    decoder.close()


TRACE = """[info] Stream mapping:
[vist#0:0/h264 @ 0x1] [info] demuxer+ffmpeg -> type:video pkt_pts:3 pkt_pts_time:0.1 pkt_dts_time:0 off:0
[h264 @ 0x2] [error] error while decoding MB 3 1
[vist#0:0/h264 @ 0x1] [dec:h264 @ 0x3] [info] decoder -> pts:0 pts_time:0 pkt_dts_time:0 keyframe:1
"""


def test_an_error_is_about_frames_up_to_a_key_frame_that_depends_on_none() -> None:
    log = Log()
    log.feed(TRACE.encode())
    for number in range(1, 60):
        key = int(number % 10 == 0)
        line = f"[dec:h264 @ 0x3] [info] decoder -> pts:{number} pts_time:{number / 10} keyframe:{key}\n"
        log.feed(line.encode())
    assert [bool(log.errors(n, n + 1)) for n in range(60)] == [True] * 20 + [False] * 40
    log.feed(b"[matroska,webm @ 0x4] [error] File ended prematurely at pos. 7\n")
    assert "prematurely" in log.errors(59, 60) and not log.errors(20, 59)


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_log_is_read(pieces: list[bytes]) -> None:
    log = Log()
    for piece in pieces:
        log.feed(piece + b"[h264 @ 0x1] [error] decoder -> pts_time:1.2.3 pkt_pts_time:- keyframe:1\n")
    log.errors(0, 1)


def test_clips_of_few_frames_in_a_container_without_presentation_times(tmp_path: Path) -> None:
    video = film(tmp_path / "a.avi", *X264, "-g", 2, "-bf", 1, rate="15000/1001")
    assert holds(video, 0.5) > 0
