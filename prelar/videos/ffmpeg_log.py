"""What ffmpeg logs: facts about a stream, and errors, with the frames that they are about."""

from __future__ import annotations

import collections
import dataclasses
import re
import signal

MAX_HEAD = 1 << 16
MAX_LINES = 50
REORDER = 17
"""More frames than any codec holds back to bring them in order."""

_STREAM = re.compile(r"^\[info\]\s+Stream #0:\d+.*?: Video: (.*)$")
_SIZE = re.compile(r"(?:^|, )(\d{1,5})x(\d{1,5})(?=[ ,]|$)")
_FPS = re.compile(r", ([\d.]+)(k?) fps")
_CONSEQUENCE = re.compile(
    r"Error opening (input|output) files?\b|Error while|Nothing was written|Could not open encoder|"
    r"Cannot determine format|Conversion failed|Task finished|Terminating thread"
)
_ERROR = re.compile(r"^(?:\[[^\]]*@[^\]]*\] )*\[(?:error|fatal|panic)\] (.*)$")
_DEMUXER = re.compile(r"^\[(?:in#|matroska|mov,|avi @)")
_TIME = re.compile(r"pts_time:(-?\d+(?:\.\d+)?)")
_PACKET_TIME = re.compile(r"pkt_(?:pts|dts)_time:(-?\d+(?:\.\d+)?)")
_NO_VIDEO = "matches no streams"
_KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
_TOLD_TO_END = re.compile(r"^(?:\[\w+\] )?Exiting normally, received signal", re.MULTILINE)
NO_VIDEO = "no video in it"


def stream(log: str) -> tuple[int | None, int | None, float | None]:
    """Width, height (pixels) and frames a second of the first video stream, as ffmpeg tells."""
    for line in log.partition("Stream mapping:")[0].splitlines():
        found = _STREAM.match(line)
        if found:
            size, rate = _SIZE.search(found[1]), _FPS.search(found[1])
            fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else None
            return (int(size[1]), int(size[2]), fps) if size else (None, None, fps)
    return None, None, None


def errors(log: str) -> str:
    """The errors in a log, in words that do not change from run to run; empty where there is none."""
    found = set()
    for line in log.splitlines():
        match = _ERROR.match(line)
        if match:
            found.add(re.sub(r"/proc/self/fd/\d+", "the clip", match[1]).strip().rstrip("."))
    causes = {message for message in found if not _CONSEQUENCE.match(message)}
    return "; ".join(sorted(causes or found))[:200]


def check_not_killed(log: str, status: int) -> None:
    """Raises `RuntimeError` where a process of this log and exit status was ended from outside."""
    if status in _KILLED or _TOLD_TO_END.search(log):
        raise RuntimeError(f"ffmpeg was killed (status {status})")


def reason(log: str, status: int) -> str | None:
    """Why a process of this log and exit status gave no good clip; None where it is well."""
    if _NO_VIDEO in log:
        return NO_VIDEO
    found = errors(log)
    return f"ffmpeg: {found or f'exit status {status}'}" if found or status else None


@dataclasses.dataclass
class Damage:
    """Frames that errors are about, from number `first` up to `end`, and the errors' `lines` in the log.

    An error of the demuxer is placed by `time` (seconds): `first` is None until a frame of that time, or a
    later one, was decoded. `last` is where the latest error came. `end` is None until a key frame is there
    that depends on nothing damaged.
    """

    first: int | None
    last: int
    time: float
    lines: list[str]
    end: int | None = None


class Log:
    """The log of a process as it grows: what it begins with, and which frames its errors are about.

    Frames are counted where the log traces them (`-debug_ts`). Without, every error is about all frames.
    """

    def __init__(self) -> None:
        self.head = ""
        self.told_to_end = ""
        self.damage: list[Damage] = []
        self._partial = b""
        self._begun = False
        self._frames = 0
        self._time = 0.0
        self._packets: collections.deque[float] = collections.deque(maxlen=REORDER)

    def feed(self, text: bytes) -> None:
        """Take what was written next."""
        *lines, self._partial = (self._partial + text).split(b"\n")
        self._partial = self._partial[:MAX_HEAD]
        for line in lines:
            self._line(line.decode("utf-8", "replace"))

    def errors(self, first: int, end: int) -> str:
        """The lines with errors of frames `first` to `end` - 1."""
        lines = []
        for one in self.damage:
            begin = max(self._frames - 1, 0) if one.first is None else one.first
            if begin < end and (one.end is None or first < one.end):
                lines += one.lines
        return "\n".join(lines)

    def _line(self, line: str) -> None:
        if not self._begun:
            self._begun = line.startswith("[info] Stream mapping:") or len(self.head) > MAX_HEAD
            self.head += f"{line}\n"
        elif _TOLD_TO_END.match(line):
            self.told_to_end = line
        if " decoder -> " in line:
            self._decoded(line)
        elif "demuxer+ffmpeg -> " in line:
            match = _PACKET_TIME.search(line)
            if match:
                self._packets.append(float(match[1]))
        elif _ERROR.match(line):
            self._error(line)

    def _decoded(self, line: str) -> None:
        match = _TIME.search(line)
        self._time = float(match[1]) if match else self._time
        for one in self.damage:
            if one.first is None and self._time >= one.time:
                one.first = self._frames
                one.last = max(one.last, one.first)
            past = one.first is not None and self._frames >= one.last + REORDER
            if one.end is None and past and "keyframe:1" in line:
                one.end = self._frames
        self._frames += 1

    def _error(self, line: str) -> None:
        """A decoder logs errors in turn with the frames that it gives, a demuxer ahead of them.

        What is damaged lies behind the last frame given, or the earliest of the packets read of late.
        """
        open_one = self.damage[-1] if self.damage and self.damage[-1].end is None else None
        demuxer = bool(_DEMUXER.match(line)) and bool(self._packets)
        if open_one and (open_one.first is not None or demuxer):
            open_one.last = self._frames
            if len(open_one.lines) < MAX_LINES and line not in open_one.lines:
                open_one.lines.append(line)
            return
        first = None if demuxer else self._frames
        earliest = min(self._packets, default=0.0)
        self.damage.append(Damage(first, self._frames, earliest, [line]))
