"""Clips to frames: ffmpeg decodes and resizes, this module asks it and judges the answer.

Plain WebM clips, which is what Something-Something V2 has, are joined: one ffmpeg process decodes many, one
after the other, and tells the time of every frame, which says whose it is. Everything else gets a process of
its own. Clips travel through anonymous files in memory: they can be sought in, nothing is left behind by a
crash, and no clip's name reaches a command line. Frames are exactly the decoded ones in order: none is
dropped or doubled for the sake of a frame rate. Bytes depend neither on the processor (`SCALE`) nor on which
clips share a process. A clip's trouble is its own; a process that was killed from outside is not, and raises.

Parts of a video file come from one sequential decode of it (`prelar.videos.sequential`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import re
import select
import subprocess
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
import numpy.typing as npt

from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME, FRAME_BYTES, SIZE, Frames
from prelar.utils.video_file import ffmpeg_binary
from prelar.videos import sequential, webm
from prelar.videos.ffmpeg_log import NO_VIDEO, check_not_killed, errors, reason, stream
from prelar.videos.sequential import MAX_SECONDS, Clip, Part, Readers, SequentialDecode, Times

SCALE = f"scale={SIZE}:{SIZE}:flags=bicubic+accurate_rnd+bitexact"
MAX_FRAMES = 10_000
MAX_PIXELS = 4096 * 4096
MAX_CPU_SECONDS = 300
MAX_LOG = 1 << 20
MAX_PACKETS = 50_000_000
JOINED = 64
JOINED_FRAMES = 5_000
APART = 10_000  # seconds from the beginning of one joined clip to the next
TIMED = 6  # the first ffmpeg that tells the time of every frame
FORMATS = "matroska,webm,mov,mp4,avi"


class Decoder:
    """Decodes clips with one ffmpeg binary: `path`, or the static one of imageio-ffmpeg."""

    def __init__(self, path: str | None = None, threads: int = 1) -> None:
        """A sequential decode runs on `threads` threads. Raises `UserError` where the binary does not run."""
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
        self._times = release is None or int(release[1]) >= TIMED
        self._threads = threads
        self._lock = threading.Lock()
        self._running: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()
        self._closed = False
        self._readers = Readers(self._start_sequential, MAX_FRAMES)

    def close(self) -> None:
        """End every process that is running; whoever waits for one, or asks for more, gets `RuntimeError`."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()
        self._readers.close()

    def decode(self, clips: Sequence[bytes]) -> list[Clip]:
        """Decode clips, each given as the bytes of its file.

        Where anything goes wrong with joined clips, halves of them are joined, and so on, so that a bad clip
        names its own trouble and its neighbours are as if it had not been there. Raises `RuntimeError`
        where ffmpeg was killed.
        """
        return list(self.decode_each(clips))

    def decode_each(self, clips: Sequence[bytes]) -> Iterator[Clip]:
        """As `decode`, but clips that do not go together with others are decoded when they are asked for."""
        headers = [webm.header(content) if self._times else None for content in clips]
        done: dict[int, Clip] = {}
        for numbers in _groups(headers):
            done |= self._decode_by_halves({number: clips[number] for number in numbers})
        for number, (content, header) in enumerate(zip(clips, headers, strict=True)):
            clip = done.pop(number) if number in done else self._decode_alone(content)
            yield _described(clip, header)

    def decode_part(self, part: Part) -> Clip:
        """Decode a part of a file. Parts that adjoin have every frame of the file once."""
        return self.decode_parts([part])[0]

    def decode_parts(self, parts: Sequence[Part]) -> list[Clip]:
        """Decode parts of files, those of one file in order, from sequential decodes of the files.

        A process of an earlier call is gone on with, if it has not come past these parts. Parts that were
        announced wait until their turn has come. Raises `RuntimeError` where ffmpeg was killed.
        """
        return self._readers.read(parts)

    def announce(self, parts: Sequence[Part]) -> None:
        """Tell beforehand, in order, what `decode_parts` will be called with, on whatever thread."""
        self._readers.announce(parts)

    def seconds(self, path: Path) -> Times | None:
        """The times of a video file's frames in seconds, in order: of those that its packets hold.

        Empty where there is no video in it, None where it cannot be read or not a frame be decoded.
        """
        with (
            contextlib.suppress(OSError, TimeoutError),
            path.open("rb") as handle,
            _memory(2) as (first, log),
        ):
            words = packets_command(self.path, handle.fileno(), first)
            with self._start(words, [handle.fileno(), first], subprocess.PIPE, log) as process:
                try:
                    times = sequential.packet_times(process, MAX_PACKETS)
                except BaseException:
                    process.kill()
                    raise
            said = os.pread(log, MAX_LOG, 0).decode("utf-8", "replace")
            check_not_killed(said, process.returncode)
            if reason(said, 0) == NO_VIDEO:
                return np.empty(0)
            decoded = any(not line.startswith(b"#") for line in os.pread(first, MAX_LOG, 0).splitlines())
            return times if len(times) and decoded else None
        return None

    def _decode_by_halves(self, clips: dict[int, bytes]) -> dict[int, Clip]:
        """Plain clips of one look, by number. Those that ffmpeg decodes only alone are left out."""
        if len(clips) < 2:
            return {}
        frames = self._decode_joined(list(clips.values()))
        if frames is not None:
            return {number: Clip(part) for number, part in zip(clips, frames, strict=True)}
        numbers = list(clips)
        halves = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        first, second = (
            self._decode_by_halves({number: clips[number] for number in half}) for half in halves
        )
        return first | second

    def _decode_joined(self, clips: Sequence[bytes]) -> list[Frames] | None:
        """The frames of each clip from one process, or None if there was any trouble."""
        with _memory(4) as (source, playlist, output, times):
            for content in clips:
                _write(source, content)
            _write(playlist, _playlist(source, [len(content) for content in clips]))
            try:
                words = joined_command(self.path, playlist, output, times, len(clips))
                log, status = self._run(words, [source, playlist, output, times])
            except subprocess.TimeoutExpired:
                return None
            frames = _frames(output)
            counts = frames_each(os.pread(times, os.fstat(times).st_size, 0), len(clips))
        if status or errors(log) or counts is None or counts.sum() != len(frames):
            return None
        return np.split(frames, counts.cumsum()[:-1])

    def _decode_alone(self, content: bytes) -> Clip:
        """One clip by what its header tells, or, where that does not do, by what ffmpeg finds out."""
        if not content:
            return Clip(None, "the file is empty")
        clip = self._decode_once(content, thorough=False)
        return clip if clip.frames is not None else self._decode_once(content, thorough=True)

    def _decode_once(self, content: bytes, thorough: bool) -> Clip:
        with _memory(2) as (source, output):
            _write(source, content)
            try:
                log, status = self._run(command(self.path, source, output, thorough), [source, output])
            except subprocess.TimeoutExpired:
                return Clip(None, f"decoding took more than {MAX_SECONDS} s")
            frames = _frames(output)
        about = stream(log)
        if len(frames) > MAX_FRAMES:
            return Clip(None, f"more than {MAX_FRAMES} frames", *about)
        wrong = reason(log, status)
        if wrong:
            return Clip(None, wrong, *about)
        if not len(frames):
            return Clip(None, "no video frame", *about)
        return Clip(frames, None, *about)

    def _start_sequential(self, source: int, traced: bool) -> SequentialDecode:
        """Begin the sequential decode of an open file."""
        if not self._times:
            raise UserError(f"ffmpeg {self.version} tells no times; own videos need {TIMED} or later")
        times = os.memfd_create("times")
        try:
            words = sequential_command(self.path, source, times, 1 if traced else self._threads, traced)
            process = self._start(words, [source, times], subprocess.PIPE, subprocess.PIPE)
        except BaseException:
            os.close(times)
            raise
        return SequentialDecode(process, times)

    def _start(
        self, words: list[str], handles: Sequence[int], output: int, log: int
    ) -> subprocess.Popen[bytes]:
        """Start ffmpeg, and give it the open files `handles`. Raises `RuntimeError` once closed."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the decoder is closed")
            process = subprocess.Popen(
                words,
                bufsize=0,
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def _run(self, words: list[str], handles: Sequence[int]) -> tuple[str, int]:
        """What ffmpeg said, and its exit status; it is given the open files `handles`."""
        with _memory(1) as (log,):
            with self._start(words, handles, subprocess.DEVNULL, log) as process:
                status = _wait(process)
            said = os.pread(log, MAX_LOG, 0).decode("utf-8", "replace")
            check_not_killed(said, status)
            if os.fstat(log).st_size > MAX_LOG:
                said += f"\n[error] more than {MAX_LOG} bytes of messages"
            return said, status


def _groups(headers: Sequence[webm.Header | None]) -> Iterator[list[int]]:
    """The numbers of plain clips that are decoded by one process: of one look, and not of too many frames."""
    held: dict[object, list[int]] = {}
    frames: dict[object, int] = {}
    for number, header in enumerate(headers):
        if header is None or header.packets > MAX_FRAMES:
            continue
        look = header.look
        count = frames.get(look, 0) + header.packets
        if look in held and (len(held[look]) == JOINED or count > JOINED_FRAMES):
            yield held.pop(look)
            count = header.packets
        held.setdefault(look, []).append(number)
        frames[look] = count
    yield from held.values()


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


def command(binary: str, source: int, output: int, thorough: bool = False) -> list[str]:
    """The arguments that decode open file `source` into raw RGB frames in `output`.

    Only container formats that hold video are tried, so that a playlist posing as a clip opens nothing.
    Unless `thorough`, a clip's header is believed, which saves decoding its first frame twice.
    """
    header = {} if thorough else {"nofind_stream_info": None}
    bounded = {"frames:v": MAX_FRAMES + 1}
    return _command(binary, source, output, {"format_whitelist": FORMATS, **header}, bounded)


def joined_command(binary: str, playlist: int, output: int, times: int, clips: int) -> list[str]:
    """The arguments that decode the clips of a playlist in turn; `times` is what `frames_each` reads."""
    one_video = {
        "format": "concat",
        "safe": 0,
        "format_whitelist": f"concat,{FORMATS}",
        "protocol_whitelist": "file,subfile",
    }
    timing = {"stats_enc_pre": f"/proc/self/fd/{times}", "stats_enc_pre_fmt": "{ptsi} {tbi}"}
    return _command(binary, playlist, output, one_video, {**timing, "frames:v": clips * MAX_FRAMES + 1})


def sequential_command(binary: str, source: int, times: int, threads: int, traced: bool) -> list[str]:
    """The arguments that decode a whole open file to the standard output, a line a frame to `times`.

    traced: every packet and frame has its line in the log.
    """
    timing = {"stats_enc_pre": f"/proc/self/fd/{times}", "stats_enc_pre_fmt": "{pts} {tb}"}
    reading = {"format_whitelist": FORMATS, "threads": threads}
    return _command(binary, source, 1, reading, timing, ["-debug_ts"] if traced else [], timelimit=False)


def _opened(source: int, **options: Any) -> Any:
    """The first video stream of an open file, which may name no other and be of no size without bound."""
    guard = {"protocol_whitelist": "file", "max_pixels": MAX_PIXELS, "threads": 1}
    return ffmpeg.input(f"/proc/self/fd/{source}", **{**guard, **options})["V:0"]


def packets_command(binary: str, source: int, first: int) -> list[str]:
    """The arguments that list a file's packets on the standard output, and decode one frame for `first`."""
    opened = _opened(source, format_whitelist=FORMATS)
    listed = opened.output("pipe:1", c="copy", copyinkf=None, copypriorss=1, format="framecrc")
    decoded = opened.output(f"/proc/self/fd/{first}", format="framecrc", **{"frames:v": 1})
    both = ffmpeg.merge_outputs(listed, decoded)
    arguments: list[str] = both.global_args(
        "-nostdin", "-hide_banner", "-nostats", "-v", "level+error", "-y"
    ).compile(cmd=binary)
    return arguments


def _command(
    binary: str,
    source: int,
    output: int,
    reading: dict[str, Any],
    writing: dict[str, Any],
    more: Sequence[str] = (),
    timelimit: bool = True,
) -> list[str]:
    """The filter chain ends in RGB: left to the encoder, frames lose colours after a change of size.

    The raw frames are numbered for the muxer, which would complain of two of one time.
    """
    written = _opened(source, an=None, sn=None, dn=None, **reading).output(
        "pipe:1" if output == 1 else f"/proc/self/fd/{output}",
        vf=f"{SCALE},format=rgb24",
        fps_mode="passthrough",
        enc_time_base="1:1000000",
        format="rawvideo",
        **{"bsf:v": "setts=ts=N"},
        **writing,
    )
    limit = ["-timelimit", str(MAX_CPU_SECONDS)] if timelimit else []
    arguments: list[str] = written.global_args(
        *("-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-filter_threads", "1"),
        *(*limit, *more, "-y"),
    ).compile(cmd=binary)
    return arguments


def _playlist(source: int, sizes: Sequence[int]) -> bytes:
    """The concat demuxer's list of clips of these sizes (bytes), which lie end to end in an open file.

    One open file holds them all: a process may have only some 1,000, and decodes many batches at once. The
    times of their frames begin `APART` seconds apart.
    """
    ends = itertools.accumulate(sizes, initial=0)
    clips = "".join(
        f"file subfile,,start,{begin},end,{end},,:/proc/self/fd/{source}\nduration {APART}\n"
        for begin, end in itertools.pairwise(ends)
    )
    return f"ffconcat version 1.0\n{clips}".encode()


def frames_each(times: bytes, clips: int) -> npt.NDArray[np.int64] | None:
    """How many frames each clip of a playlist has, given a line a frame of its time and unit (`83 1/1000`).

    None where they are unknown, or not as they should be: every clip with 1 to `MAX_FRAMES`, one by one.
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
