"""Clips to frames: ffmpeg decodes and resizes, this module asks it and judges the answer.

One ffmpeg process takes several clips as inputs and writes each to an output of its own, which costs less
than a process a clip and keeps every clip's frames apart. Clips travel through anonymous files in memory:
they can be sought in, nothing is left behind by a crash, and no clip's name reaches a command line. Frames
are exactly the decoded ones in order: none is dropped or doubled for the sake of a frame rate. Bytes depend
neither on the processor (`SCALE`) nor on which clips share a process. A clip's trouble is its own; a process
that was killed from outside is not, and raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import ffmpeg
import numpy as np

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
SHARED = 32
FORMATS = "matroska,webm,mov,mp4,avi"

_STREAM = re.compile(r"^\[info\]\s+Stream #(\d+):\d+.*?: Video: (.*)$")
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

    def decode(self, clips: Sequence[bytes]) -> list[Clip]:
        """Decode clips, each given as the bytes of its file.

        Where anything in a shared process goes wrong, its clips are decoded one by one, so that a bad clip
        names its own trouble and its neighbours are as if it had not been there. Raises `RuntimeError`
        where ffmpeg was killed.
        """
        usable = [content for content in clips if content]
        groups = [usable[begin : begin + SHARED] for begin in range(0, len(usable), SHARED)]
        each = (clip for group in groups for clip in self._together(group))
        return [next(each) if content else Clip(None, "the file is empty") for content in clips]

    def _together(self, clips: Sequence[bytes]) -> list[Clip]:
        done = self._attempt(clips) if len(clips) > 1 else None
        return done if done is not None else [self._alone(content) for content in clips]

    def _attempt(self, clips: Sequence[bytes]) -> list[Clip] | None:
        """All clips in one process, or None if there was any trouble."""
        try:
            frames, log, status = self._run(clips)
        except subprocess.TimeoutExpired:
            return None
        if status or troubles(log) or any(not 0 < len(part) <= MAX_FRAMES for part in frames):
            return None
        return [Clip(part, None, *stream(log, number)) for number, part in enumerate(frames)]

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
        if isinstance(content, bytes):
            clip = self._judged(content, thorough=False)
            if clip.frames is not None:
                return clip
        return self._judged(content, thorough=True)

    def _judged(self, content: bytes | Part, thorough: bool) -> Clip:
        try:
            (frames,), log, status = self._run([content], thorough)
        except subprocess.TimeoutExpired:
            return Clip(None, f"decoding took more than {MAX_SECONDS} s")
        about = stream(log, 0)
        trouble = troubles(log)
        if len(frames) > MAX_FRAMES:
            return Clip(None, f"more than {MAX_FRAMES} frames", *about)
        if trouble or status:
            return Clip(None, f"ffmpeg: {trouble or f'exit status {status}'}", *about)
        if not len(frames):
            return Clip(None, "no video frame", *about)
        return Clip(frames, None, *about)

    def _run(self, clips: Sequence[bytes | Part], thorough: bool = False) -> tuple[list[Frames], str, int]:
        """Frames of each clip, what ffmpeg said, and its exit status."""
        parts = [clip if isinstance(clip, Part) else None for clip in clips]
        inputs = [
            os.open(part.path, os.O_RDONLY | os.O_CLOEXEC) if part else os.memfd_create("clip")
            for part in parts
        ]
        outputs = [os.memfd_create(f"frames{number}") for number in range(len(clips))]
        log = os.memfd_create("log")
        try:
            for handle, content in zip(inputs, clips, strict=True):
                if isinstance(content, bytes):
                    _write(handle, content)
            with subprocess.Popen(
                command(self.path, inputs, outputs, parts, thorough),
                pass_fds=[*inputs, *outputs],
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
            return [_frames(handle) for handle in outputs], said, status
        finally:
            for handle in (*inputs, *outputs, log):
                os.close(handle)


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
    binary: str,
    inputs: Sequence[int],
    outputs: Sequence[int],
    parts: Sequence[Part | None] = (),
    thorough: bool = False,
) -> list[str]:
    """The arguments that decode open file `inputs[i]` into raw RGB frames in open file `outputs[i]`.

    Of a file that has one of `parts`, only that part is decoded.

    Only container formats that hold video are tried, so that a playlist posing as a clip opens nothing.
    Unless `thorough`, a clip's header is believed, which saves decoding its first frame twice.
    """
    header = {} if thorough else {"nofind_stream_info": None}
    limit = ["-timelimit", str(MAX_CPU_SECONDS)]
    streams = []
    for source, target, part in zip(inputs, outputs, parts or [None] * len(inputs), strict=True):
        opened = ffmpeg.input(
            f"/proc/self/fd/{source}",
            threads=1,
            an=None,
            sn=None,
            dn=None,
            format_whitelist=FORMATS,
            protocol_whitelist="file",
            max_pixels=MAX_PIXELS,
            **_stretch(part),
            **header,
        )
        written = ffmpeg.output(
            opened["V:0"],
            f"/proc/self/fd/{target}",
            vf=SCALE,
            pix_fmt="rgb24",
            fps_mode="passthrough",
            format="rawvideo",
            **{"frames:v": MAX_FRAMES + 1},
        )
        streams.append(written)
    merged = ffmpeg.merge_outputs(*streams).global_args(
        "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-filter_threads", "1", "-y", *limit
    )
    arguments: list[str] = merged.compile(cmd=binary)
    return arguments


def _stretch(part: Part | None) -> dict[str, float]:
    """The input options of a part; from the beginning there is nothing to seek."""
    found: dict[str, float] = {}
    if part is not None and part.begin:
        found["ss"] = part.begin
    if part is not None and part.seconds is not None:
        found["t"] = part.seconds
    return found


def _write(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while len(view):
        view = view[os.write(handle, view) :]


def _frames(handle: int) -> Frames:
    """The whole frames in an open file, uint8 (n, 64, 64, 3)."""
    count = os.fstat(handle).st_size // FRAME_BYTES
    frames = np.empty((count, *FRAME), dtype=np.uint8)
    view, offset = frames.reshape(-1).data, 0
    while offset < len(view):
        offset += os.preadv(handle, [view[offset:]], offset)
    return frames


def stream(log: str, number: int) -> tuple[int | None, int | None, float | None]:
    """Width, height (pixels) and frames a second of input `number`'s first video stream, as ffmpeg tells."""
    for line in log.partition("Stream mapping:")[0].splitlines():
        found = _STREAM.match(line)
        if found and int(found[1]) == number:
            size, rate = _SIZE.search(found[2]), _FPS.search(found[2])
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
