"""Clips to frames: ffmpeg decodes and resizes, this module asks it and judges the answer.

Plain WebM clips, which is what Something-Something V2 has, are joined: one ffmpeg process decodes many, one
after the other, and tells the time of every frame, which says whose it is. Everything else gets a process of
its own. Clips travel through anonymous files in memory: they can be sought in, nothing is left behind by a
crash, and no clip's name reaches a command line. Frames are exactly the decoded ones in order: none is
dropped or doubled for the sake of a frame rate. Bytes depend neither on the processor (`SCALE`) nor on which
clips share a process. A clip's trouble is its own; a process that was killed from outside is not, and raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
import numpy.typing as npt

from prelar.data import webm
from prelar.data.store import FRAME, SIZE, Frames
from prelar.errors import UserError
from prelar.ffmpeg_binary import ffmpeg_binary

SCALE = f"scale={SIZE}:{SIZE}:flags=bicubic+accurate_rnd+bitexact"
FRAME_BYTES = FRAME[0] * FRAME[1] * FRAME[2]
MAX_FRAMES = 10_000
MAX_PIXELS = 4096 * 4096
MAX_SECONDS = 600
MAX_CPU_SECONDS = 300
MAX_LOG = 1 << 20
JOINED = 64
APART = 10_000  # seconds from the beginning of one joined clip to the next
JOINS = 6  # the first ffmpeg that tells the time of every frame
FORMATS = "matroska,webm,mov,mp4,avi"

_STREAM = re.compile(r"^\[info\]\s+Stream #0:\d+.*?: Video: (.*)$")
_SIZE = re.compile(r"(?:^|, )(\d{1,5})x(\d{1,5})(?=[ ,]|$)")
_DURATION = re.compile(r"(?:Duration: |time=)(\d+):(\d\d):(\d\d\.\d+)")
_FPS = re.compile(r", ([\d.]+)(k?) fps")
_CONSEQUENCE = re.compile(
    r"Error opening (input|output) files?\b|Error while|Nothing was written|Could not open encoder|"
    r"Cannot determine format|Conversion failed|Task finished|Terminating thread"
)
_KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
_TOLD_TO_END = "Exiting normally, received signal"
_TROUBLE = re.compile(r"^(?:\[[^\]]*@[^\]]*\] )*\[(?:error|fatal|panic)\] (.*)$")


@dataclasses.dataclass(frozen=True)
class Part:
    """The frames of a video file from second `begin` on, for `seconds`; None: to its end."""

    path: Path
    begin: float = 0.0
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
    """One decoded clip: frames uint8 (n, 64, 64, 3), or None and the reason.

    `width`, `height` (pixels) and `fps` are those of the file, None where it does not tell.
    """

    frames: Frames | None
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None


class Decoder:
    """Decodes clips with one ffmpeg binary: `path`, or the static one of imageio-ffmpeg."""

    def __init__(self, path: str | None = None) -> None:
        """Raises `UserError` where the binary does not run."""
        self.path = path or ffmpeg_binary()
        try:
            answer = subprocess.run([self.path, "-version"], capture_output=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(
                f"ssv2.ffmpeg = {self.path}: does not run ({error}); name another, or null"
            ) from None
        found = re.match(rb"ffmpeg version (\S+)", answer.stdout)
        if not found:
            raise UserError(f"ssv2.ffmpeg = {self.path}: is not ffmpeg; name another, or null")
        self.version = found[1].decode()
        release = re.match(r"n?(\d+)\.", self.version)
        self._joins = release is None or int(release[1]) >= JOINS

    def decode(self, clips: Sequence[bytes]) -> list[Clip]:
        """Decode clips, each given as the bytes of its file.

        Where anything goes wrong with joined clips, halves of them are joined, and so on, so that a bad clip
        names its own trouble and its neighbours are as if it had not been there. Raises `RuntimeError`
        where ffmpeg was killed.
        """
        headers = [webm.header(content) if self._joins else None for content in clips]
        looks: dict[object, list[int]] = {}
        for number, header in enumerate(headers):
            if header and header.packets <= MAX_FRAMES:
                looks.setdefault(header.look, []).append(number)
        done: dict[int, Clip] = {}
        for numbers in looks.values():
            for begin in range(0, len(numbers), JOINED):
                done |= self._joined({number: clips[number] for number in numbers[begin : begin + JOINED]})
        return [
            _described(done.get(number) or self._alone(content), header)
            for number, (content, header) in enumerate(zip(clips, headers, strict=True))
        ]

    def _joined(self, clips: dict[int, bytes]) -> dict[int, Clip]:
        """Plain clips of one look, by number; those that only go alone are left out."""
        if len(clips) < 2:
            return {}
        frames = self._attempt(list(clips.values()))
        if frames is not None:
            return {number: Clip(part) for number, part in zip(clips, frames, strict=True)}
        numbers = list(clips)
        halves = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        first, second = (self._joined({number: clips[number] for number in half}) for half in halves)
        return first | second

    def _attempt(self, clips: Sequence[bytes]) -> list[Frames] | None:
        """The frames of each clip from one process, or None if there was any trouble."""
        with _memory(len(clips) + 3) as (playlist, output, times, *inputs):
            for handle, content in zip(inputs, clips, strict=True):
                _write(handle, content)
            _write(playlist, _playlist(inputs))
            try:
                words = joined_command(self.path, playlist, output, times, len(clips))
                log, status = self._run(words, [playlist, output, times, *inputs])
            except subprocess.TimeoutExpired:
                return None
            frames = _frames(output)
            counts = frames_each(os.pread(times, os.fstat(times).st_size, 0), len(clips))
        if status or troubles(log) or counts is None or counts.sum() != len(frames):
            return None
        return np.split(frames, counts.cumsum()[:-1])

    def decode_part(self, part: Part) -> Clip:
        """Decode a part of a file. Parts that adjoin have every frame of the file once."""
        try:
            return self._alone(part)
        except OSError as error:
            return Clip(None, f"cannot be read: {error.strerror}")

    def seconds(self, path: Path) -> float | None:
        """How long a video file is, as its header tells or else its last frame; None where neither does."""
        for options in ([], ["-map", "0:V:0", "-c", "copy", "-f", "null", "-"]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired), path.open("rb") as handle:
                done = subprocess.run(
                    probe(self.path, handle.fileno(), options),
                    pass_fds=[handle.fileno()],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=MAX_SECONDS,
                    check=False,
                )
                told = _DURATION.findall(done.stderr[-MAX_LOG:].decode("utf-8", "replace"))
                if told:
                    hours, minutes, seconds = told[-1]
                    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        return None

    def _alone(self, content: bytes | Part) -> Clip:
        """One clip by what its header tells, or, where that does not do, by what ffmpeg finds out."""
        if content == b"":
            return Clip(None, "the file is empty")
        if isinstance(content, bytes):
            clip = self._judged(content, thorough=False)
            if clip.frames is not None:
                return clip
        return self._judged(content, thorough=True)

    def _judged(self, content: bytes | Part, thorough: bool) -> Clip:
        with _memory(2) as (source, output), contextlib.ExitStack() as opened:
            part = content if isinstance(content, Part) else None
            if isinstance(content, bytes):
                _write(source, content)
            else:
                source = opened.enter_context(content.path.open("rb")).fileno()
            try:
                log, status = self._run(command(self.path, source, output, part, thorough), [source, output])
            except subprocess.TimeoutExpired:
                return Clip(None, f"decoding took more than {MAX_SECONDS} s")
            frames = _frames(output)
        about = stream(log)
        trouble = troubles(log)
        if len(frames) > MAX_FRAMES:
            return Clip(None, f"more than {MAX_FRAMES} frames", *about)
        if trouble or status:
            return Clip(None, f"ffmpeg: {trouble or f'exit status {status}'}", *about)
        if not len(frames):
            return Clip(None, "no video frame", *about)
        return Clip(frames, None, *about)

    def _run(self, words: list[str], handles: Sequence[int]) -> tuple[str, int]:
        """What ffmpeg said, and its exit status; it is given the open files `handles`."""
        with _memory(1) as (log,):
            with subprocess.Popen(
                words,
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            ) as process:
                status = _wait(process)
            said = os.pread(log, MAX_LOG, 0).decode("utf-8", "replace")
            if status in _KILLED or _TOLD_TO_END in said:
                raise RuntimeError(f"ffmpeg was killed (status {status})")
            if os.fstat(log).st_size > MAX_LOG:
                said += f"\n[error] more than {MAX_LOG} bytes of messages"
            return said, status


def probe(binary: str, handle: int, options: Sequence[str]) -> list[str]:
    """The arguments that make ffmpeg tell of an open file, and do what `options` say."""
    guarded = ["-format_whitelist", FORMATS, "-protocol_whitelist", "file"]
    arguments = [binary, "-nostdin", "-hide_banner", "-nostats", *guarded, "-i", f"/proc/self/fd/{handle}"]
    return [*arguments, *options]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status, as soon as there is one. Raises `TimeoutExpired` after `MAX_SECONDS`."""
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(MAX_SECONDS * 1000):
            raise subprocess.TimeoutExpired(process.args, MAX_SECONDS)
        return process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        os.close(handle)


def command(
    binary: str, source: int, output: int, part: Part | None = None, thorough: bool = False
) -> list[str]:
    """The arguments that decode open file `source`, or a part of it, into raw RGB frames in `output`.

    Only container formats that hold video are tried, so that a playlist posing as a clip opens nothing.
    Unless `thorough`, a clip's header is believed, which saves decoding its first frame twice.
    """
    header = {} if thorough else {"nofind_stream_info": None}
    return _command(binary, source, output, {"format_whitelist": FORMATS, **_stretch(part), **header}, {})


def joined_command(binary: str, playlist: int, output: int, times: int, clips: int) -> list[str]:
    """The arguments that decode the clips of a playlist in turn; `times` is what `frames_each` reads."""
    one_video = {"format": "concat", "safe": 0, "format_whitelist": f"concat,{FORMATS}"}
    told = {"stats_enc_pre": f"/proc/self/fd/{times}", "stats_enc_pre_fmt": "{ptsi} {tbi}"}
    return _command(binary, playlist, output, one_video, told, clips)


def _command(
    binary: str, source: int, output: int, reading: dict[str, Any], writing: dict[str, Any], clips: int = 1
) -> list[str]:
    """The filter chain ends in RGB: left to the encoder, frames lose colours after a change of size."""
    opened = ffmpeg.input(
        f"/proc/self/fd/{source}",
        threads=1,
        an=None,
        sn=None,
        dn=None,
        protocol_whitelist="file",
        max_pixels=MAX_PIXELS,
        **reading,
    )
    written = opened["V:0"].output(
        f"/proc/self/fd/{output}",
        vf=f"{SCALE},format=rgb24",
        fps_mode="passthrough",
        enc_time_base="1:1000000",
        format="rawvideo",
        **{"frames:v": clips * MAX_FRAMES + 1},
        **writing,
    )
    limit = ["-filter_threads", "1", "-timelimit", str(MAX_CPU_SECONDS), "-y"]
    arguments: list[str] = written.global_args(
        "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", *limit
    ).compile(cmd=binary)
    return arguments


def _playlist(inputs: Sequence[int]) -> bytes:
    """The concat demuxer's list of open files, whose frames' times begin `APART` seconds apart."""
    files = "".join(f"file /proc/self/fd/{handle}\nduration {APART}\n" for handle in inputs)
    return f"ffconcat version 1.0\n{files}".encode()


def frames_each(times: bytes, clips: int) -> npt.NDArray[np.int64] | None:
    """How many frames each clip of a playlist has, given a line a frame of its time and unit (`83 1/1000`).

    None where that is not told, or is not as it should be: every clip with 1 to `MAX_FRAMES`, one by one.
    """
    try:
        words = np.array(times.replace(b"/", b" ").split(), dtype=np.int64)
        ticks, numerator, denominator = words.reshape(-1, 3).T
    except ValueError:
        return None
    if not len(ticks) or denominator.min() < 1:
        return None
    owner = ticks * numerator // (denominator * APART)
    if owner[0] != 0 or owner[-1] != clips - 1 or not np.isin(np.diff(owner), (0, 1)).all():
        return None
    counts = np.bincount(owner)
    return counts if counts.max() <= MAX_FRAMES else None


def _stretch(part: Part | None) -> dict[str, float]:
    """The input options of a part; from the beginning there is nothing to seek."""
    found: dict[str, float] = {}
    if part is not None and part.begin:
        found["ss"] = part.begin
    if part is not None and part.seconds is not None:
        found["t"] = part.seconds
    return found


@contextlib.contextmanager
def _memory(count: int) -> Iterator[list[int]]:
    """Open files in memory."""
    handles: list[int] = []
    try:
        for _ in range(count):
            handles.append(os.memfd_create("clip"))
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def _write(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while len(view):
        view = view[os.write(handle, view) :]


def _frames(handle: int) -> Frames:
    """The whole frames in an open file, uint8 (n, 64, 64, 3), which stay when it is closed."""
    count = os.fstat(handle).st_size // FRAME_BYTES
    if not count:
        return np.empty((0, *FRAME), dtype=np.uint8)
    held = mmap.mmap(handle, count * FRAME_BYTES, access=mmap.ACCESS_COPY)
    return np.frombuffer(held, dtype=np.uint8).reshape(count, *FRAME)


def _described(clip: Clip, header: webm.Header | None) -> Clip:
    """The clip with what its header tells, if that was read."""
    if header is None:
        return clip
    return dataclasses.replace(clip, width=header.width, height=header.height, fps=header.fps)


def stream(log: str) -> tuple[int | None, int | None, float | None]:
    """Width, height (pixels) and frames a second of the first video stream, as ffmpeg tells."""
    for line in log.partition("Stream mapping:")[0].splitlines():
        found = _STREAM.match(line)
        if found:
            size, rate = _SIZE.search(found[1]), _FPS.search(found[1])
            fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else None
            return (int(size[1]), int(size[2]), fps) if size else (None, None, fps)
    return None, None, None


def troubles(log: str) -> str:
    """What ffmpeg complained of, in words that do not change from run to run; empty if it did not."""
    found = set()
    for line in log.splitlines():
        match = _TROUBLE.match(line)
        if match:
            found.add(re.sub(r"/proc/self/fd/\d+", "the clip", match[1]).strip().rstrip("."))
    causes = {message for message in found if not _CONSEQUENCE.match(message)}
    return "; ".join(sorted(causes or found))[:200]
