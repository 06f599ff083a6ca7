"""One sequential decode of a video file, from its first frame on, read a stretch at a time.

A frame may need any of those before it: groups of pictures may be open, a picture may be refreshed bit by bit
without a key frame, and places to seek to are not always what they say. So nothing is sought: one process
decodes a file once, in order, and waits while what it gave is not taken. Frames are known by their times.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import math
import os
import re
import select
import subprocess
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prelar.utils.frames import FRAME, FRAME_BYTES, Frames
from prelar.videos.ffmpeg_log import Log, check_not_killed, reason, stream

MAX_SECONDS = 600
BLOCK = 64
PIPE = 1 << 20
STEADY = 0.01
NO_TIME, DISCARD = -(1 << 63), 4
"""Of a packet: that it has no time, and the flag of one that is not shown."""
_START_TIME = re.compile(r"Duration: .*?, start: (-?[\d.]+)")
Times = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Part:
    """The frames of a video file whose times (seconds) are from `begin` up to `end`: at first all of them.

    `frames` is about how many those are, 0 where that is not known. `exact`: they are so many by the file's
    own clock, each in its own of so many equal spans of time, most near its middle, or the part is refused.
    `final`: no later part of the file is read.
    """

    path: Path
    begin: float = -math.inf
    end: float = math.inf
    frames: int = 0
    exact: bool = False
    final: bool = False

    def misfit(self, times: Times) -> str | None:
        """Why frames of these times are not those of an exact part; None where they are."""
        if not self.exact:
            return None
        if len(times) != self.frames:
            return f"{len(times)} pictures in the video where {self.frames} are told"
        span = (self.end - self.begin) / self.frames
        off = times - self.begin - span * (np.arange(self.frames) + 0.5)
        worst, between = int(np.abs(off).argmax()), abs(float(np.median(off)))
        if abs(off[worst]) >= span / 2:
            return f"picture {worst} lies {abs(off[worst]):.4f} s beside its time, more than half a frame"
        if between >= span / 4:
            return f"pictures lie {between:.4f} s beside their times, more than a quarter of a frame"
        return None


@dataclasses.dataclass(frozen=True)
class Clip:
    """One decoded clip: frames uint8 (n, 64, 64, 3), or None and the reason.

    `width`, `height` (pixels) and `fps` are those of the file, None where it does not tell. Where the frames
    of a part come at another rate than the file's, `fps` is their mean.
    """

    frames: Frames | None
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None


class SequentialDecode:
    """A process that decodes a video file, and the frames that it gives."""

    def __init__(self, process: subprocess.Popen[bytes], times: int) -> None:
        """`process` writes raw frames to its output, and the time of each as a line to the open file `times`.

        Both belong to this object from here on.
        """
        assert process.stdout is not None and process.stderr is not None
        self.log = Log()
        self.status: int | None = None
        self._process = process
        self._stdout, self._stderr = process.stdout, process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._stdout, fcntl.F_SETPIPE_SZ, PIPE)
        self._times, self._times_read, self._partial = times, 0, b""
        self._known_times: list[float] = []
        self._block = np.empty((BLOCK, *FRAME), np.uint8)
        self._bytes = memoryview(self._block.reshape(-1).data)
        self._filled = self._taken = 0
        self._waiting: Times = np.empty(0)
        self._last = -math.inf
        self.count = 0

    def read(self, begin: float, end: float, most: int) -> tuple[Frames, Times]:
        """The frames of times from `begin` up to `end` (seconds), and the times; no more than `most` + 1.

        What comes before `begin` is dropped. Raises `TimeoutError` where it takes too long.
        """
        found: list[Frames] = []
        times: list[Times] = []
        count, limit = 0, time.monotonic() + MAX_SECONDS
        while count <= most and self._wait_for_frames(limit):
            early = int(np.searchsorted(self._waiting, begin))
            upto = max(int(np.searchsorted(self._waiting, end)), early)
            kept = min(upto, early + most + 1 - count)
            if early:
                limit = time.monotonic() + MAX_SECONDS
            found.append(self._block[self._taken + early : self._taken + kept].copy())
            times.append(self._waiting[early:kept])
            count += kept - early
            stop = upto < len(self._waiting)
            self._drop(kept)
            if stop:
                break
        self._read_log()
        empty = np.empty((0, *FRAME), np.uint8)
        return np.concatenate([empty, *found]), np.concatenate([np.empty(0), *times])

    def start_time(self) -> float:
        """Where the file's own clock begins, in seconds: the times of frames here count from there.

        Raises `TimeoutError` as `read` does.
        """
        self._wait_for_frames(time.monotonic() + MAX_SECONDS)
        self._read_log()
        found = _START_TIME.search(self.log.head)
        return float(found[1]) if found else 0.0

    def close(self) -> None:
        """End the process, and let go of its files."""
        self._process.kill()
        self._process.wait()
        self._stdout.close()
        self._stderr.close()
        if self._times >= 0:
            os.close(self._times)
            self._times = -1

    def _drop(self, frames: int) -> None:
        """Count the next frames of the block as taken."""
        self.count += frames
        self._taken += frames
        self._waiting = self._waiting[frames:]

    def _wait_for_frames(self, limit: float) -> bool:
        """Wait until there is a frame that was not taken; False at the video's end."""
        while not len(self._waiting):
            if self.status is not None:
                return False
            if self._taken == BLOCK:
                self._filled = self._taken = 0
            got = self._read_frames(limit)
            if not got:
                self._finish()
            self._filled += got
            self._read_times(self._filled // FRAME_BYTES - self._taken)
        return True

    def _read_frames(self, limit: float) -> int:
        """Read frames into the block, and the log meanwhile; returns how many bytes, 0 at the end."""
        poll = select.poll()
        for handle in (self._stdout, self._stderr):
            poll.register(handle, select.POLLIN)
        while True:
            left = limit - time.monotonic()
            ready = {handle for handle, _ in poll.poll(max(left, 0) * 1000)}
            if left <= 0 or not ready:
                raise TimeoutError
            if self._stdout.fileno() in ready:
                return os.readv(self._stdout.fileno(), [self._bytes[self._filled :]])
            if not self._read_log():
                poll.unregister(self._stderr)

    def _read_log(self) -> bool:
        """Read what the log has so far; False where there will be no more.

        An error of a frame is logged before the frame is written.
        """
        while True:
            try:
                text = os.read(self._stderr.fileno(), PIPE)
            except BlockingIOError:
                return True
            if not text:
                return False
            self.log.feed(text)

    def _finish(self) -> None:
        """The output has ended: read the rest of the log, and the exit status. `RuntimeError` if killed."""
        os.set_blocking(self._stderr.fileno(), True)
        self._read_log()
        self.log.feed(b"\n")
        self.status = self._process.wait()
        check_not_killed(self.log.told_to_end, self.status)

    def _read_times(self, frames: int) -> None:
        """Read the times of the next `frames` frames in the block; they never go back."""
        while len(self._known_times) < frames:
            text = os.pread(self._times, 1 << 16, self._times_read)
            self._times_read += len(text)
            *lines, self._partial = (self._partial + text).split(b"\n")
            self._known_times += [_seconds(line) for line in lines]
            if not text:
                raise RuntimeError("ffmpeg did not tell the time of a frame")
        waiting = np.maximum.accumulate(np.array([self._last, *self._known_times[:frames]]))
        self._known_times = self._known_times[frames:]
        self._waiting, self._last = waiting[1:], float(waiting[-1])


def _seconds(line: bytes) -> float:
    """The time in a line such as `83 1/1000`."""
    ticks, numerator, denominator = map(int, line.replace(b"/", b" ").split())
    return ticks * numerator / denominator


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """The lines of a process's output. Raises `TimeoutError` where nothing comes for `MAX_SECONDS`."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    partial = b""
    while True:
        if not poll.poll(MAX_SECONDS * 1000):
            raise TimeoutError
        text = os.read(process.stdout.fileno(), PIPE)
        if not text:
            return
        *lines, partial = (partial + text).split(b"\n")
        yield from lines


class Reader:
    """Reads the parts of one video file, in turn, from one sequential decode that goes on from part to part.

    At first it is decoded on several threads. Once ffmpeg logs an error, it is decoded again, on one thread
    and with a trace, from the beginning: the trace tells which frames an error is about. What came before the
    error stays as it was, since an error of a frame is read before the frame is taken.
    """

    def __init__(self, path: Path, start: Callable[[int, bool], SequentialDecode], most: int) -> None:
        """`start` begins to decode an open file, with a trace or without; `most` is frames of a part."""
        self._path, self._start, self._most = path, start, most
        self._decode: SequentialDecode | None = None
        self._traced = False
        self._given_up = ""
        self._until = -math.inf

    def read(self, part: Part) -> Clip:
        """The frames of a part, or why there are none. Raises `RuntimeError` where ffmpeg was killed."""
        if self._given_up:
            return Clip(None, self._given_up)
        try:
            return self._read(part)
        except TimeoutError:
            self._given_up = f"decoding a clip took more than {MAX_SECONDS} s"
            return Clip(None, self._given_up)
        except OSError as error:
            return Clip(None, f"cannot be read: {error.strerror}")

    def close(self) -> None:
        """End the decode, if one is open."""
        if self._decode is not None:
            self._decode.close()
            self._decode = None

    def _read(self, part: Part) -> Clip:
        if self._decode is not None and part.begin < self._until:
            self.close()
        if self._decode is None:
            with self._path.open("rb") as source:
                self._decode = self._start(source.fileno(), self._traced)
        decode, self._until = self._decode, part.end
        begins = decode.start_time() if part.exact else 0.0
        frames, times = decode.read(part.begin - begins, part.end - begins, self._most)
        times = times + begins
        if (decode.log.damage or decode.status) and not self._traced:
            self._traced = True
            self.close()
            return self._read(part)
        return self._clip(part, decode, frames, times)

    def _clip(self, part: Part, decode: SequentialDecode, frames: Frames, times: Times) -> Clip:
        """The clip of the frames that were read last, which are those of `part`."""
        width, height, fps = stream(decode.log.head)
        if len(frames) > 1 and times[-1] > times[0]:
            mean = (len(frames) - 1) / (times[-1] - times[0])
            fps = fps if fps and abs(mean / fps - 1) < STEADY else round(float(mean), 2)
        about = (width, height, fps)
        if len(frames) > self._most:
            return Clip(None, f"more than {self._most} frames", *about)
        errors = decode.log.errors(decode.count - len(frames), max(decode.count, 1))
        wrong = reason(errors, 0 if decode.log.damage else decode.status or 0)
        if wrong := wrong or part.misfit(times):
            return Clip(None, wrong, *about)
        return Clip(frames, None, *about) if len(frames) else Clip(None, "no video frame", *about)


class Readers:
    """The readers of all video files at work, and whose turn it is with each."""

    def __init__(self, start: Callable[[int, bool], SequentialDecode], most: int) -> None:
        """As for `Reader`."""
        self._new = functools.partial(Reader, start=start, most=most)
        self._turn = threading.Condition()
        self._announced: dict[Path, tuple[Reader, collections.deque[Part]]] = {}
        self._idle: dict[Path, Reader] = {}
        self._closed = False

    def announce(self, parts: Sequence[Part]) -> None:
        """Tell beforehand, in order, what `read` will be called with."""
        with self._turn:
            for path, group in itertools.groupby(parts, key=_path):
                _, turns = self._announced.setdefault(path, (self._new(path), collections.deque()))
                turns.append(next(group))

    def read(self, parts: Sequence[Part]) -> list[Clip]:
        """The clips of parts, those of one file in order."""
        return [
            clip
            for path, group in itertools.groupby(parts, key=_path)
            for clip in self._of(path, list(group))
        ]

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _of(self, path: Path, parts: list[Part]) -> list[Clip]:
        reader = self._take(path, parts[0])
        try:
            clips = [reader.read(part) for part in parts]
        except BaseException:
            reader.close()
            raise
        self._leave(path, reader, ended=parts[-1].final or parts[-1].end == math.inf)
        return clips

    def _take(self, path: Path, part: Part) -> Reader:
        """The reader of a file, when it is this part's turn. A second attempt finds it still so."""
        with self._turn:
            if path not in self._announced:
                return self._idle.pop(path, None) or self._new(path)
            reader, turns = self._announced[path]
            self._turn.wait_for(lambda: self._closed or turns[0] == part)
            if self._closed:
                raise RuntimeError("the decoder is closed")
            return reader

    def _leave(self, path: Path, reader: Reader, ended: bool) -> None:
        """Let the next one have its turn; of files that were not announced, the last stays open."""
        with self._turn:
            if path in self._announced:
                self._announced[path][1].popleft()
                self._turn.notify_all()
            if ended:
                reader.close()
                self._announced.pop(path, None)
            elif path not in self._announced:
                for other in self._idle.values():
                    other.close()
                self._idle = {path: reader}


def _path(part: Part) -> Path:
    return part.path


def packet_times(process: subprocess.Popen[bytes], most: int) -> Times:
    """The times in seconds, in order, of the packets that ffmpeg's `framecrc` lists, `most` at most.

    Packets that are empty, or that an edit list hides, are left out. Raises `TimeoutError` where none comes
    for long.
    """
    unit, before, ticks = 1.0, 0, array("q")
    for line in _lines(process):
        if line.startswith(b"#tb 0:"):
            numerator, denominator = map(int, line[6:].split(b"/"))
            unit = numerator / denominator
        elif not line.startswith(b"#") and len(ticks) < most:
            _, decoding, showing, _, size, _, *flags = line.split(b",")[:7]
            stamps = [int(stamp) for stamp in (showing, decoding) if int(stamp) != NO_TIME]
            before = stamps[0] if stamps else before
            hidden = flags and int(flags[0].partition(b"=")[2], 16) & DISCARD
            if int(size) and not hidden:
                ticks.append(before)
    times: Times = np.sort(np.frombuffer(ticks, np.int64)).astype(np.float64) * unit
    return times
