"""A pool of RLBench simulators that collects demos. Each simulator serves many attempts.

- a demo gets ten attempts, each with random numbers of its own;
- an attempt without progress, or without an answer within the time limit, is killed. Such attempts, and those
  that end in an error that RLBench does not report as a failed demo, number three at most for one demo;
- a simulator that crashes costs the attempt in progress. It is replaced, as it is after an unexpected error
  and after `SERVICE` attempts;
- a task that a new simulator cannot load is not tried again, in any variation;
- where a demo's attempts are exhausted before the first success of its task and variation, the others of
  that variation are not tried;
- a finished demo waits in a file until the store has it, so that an interrupted run loses only the attempts
  in progress.

Every failure is reported as a line of text.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from prelar.demos import rlbench_worker
from prelar.demos.episodes import Episode, Job, at_size
from prelar.demos.rlbench_folder import FPS
from prelar.utils import files
from prelar.utils.errors import UserError, one_line
from prelar.utils.frames import Frames
from prelar.utils.parents import child

ROOT = "COPPELIASIM_ROOT"
LAUNCH_SECONDS = 120.0
SHUTDOWN_GRACE = 5.0
POLL_SECONDS = 1.0
IDLE_SECONDS = 30.0
IDLE_SHARE = 0.01
DIED = "the simulator ended"


def simulator_env(display: str | None, threads: int = 1) -> dict[str, str]:
    """The environment of a process that runs CoppeliaSim, whose software rendering gets `threads`."""
    root = os.environ.get(ROOT, "")
    paths = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    settings = dict(os.environ)
    if root:
        settings["LD_LIBRARY_PATH"] = os.pathsep.join([*paths, root] if root not in paths else paths)
        settings["QT_QPA_PLATFORM_PLUGIN_PATH"] = root
    settings.setdefault("LP_NUM_THREADS", str(threads))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        settings.setdefault(name, "1")
    if display:
        settings["DISPLAY"] = display
    code = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings["PYTHONPATH"] = os.pathsep.join(code)
    return settings


class HungError(Exception):
    """A simulator was idle or gave no answer in time, and was killed."""


class DeadError(Exception):
    """A simulator ended by itself."""


def read_line(pipe: int, buffer: bytearray, seconds: float) -> bytes | None:
    """The next line from a pipe; empty where the pipe ends, None where nothing came in time.

    buffer: what was read beyond the line, for the next call.
    """
    end = time.monotonic() + seconds
    while b"\n" not in buffer:
        if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
            return None
        piece = os.read(pipe, 65536)
        if not piece:
            return b""
        buffer += piece
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return line + b"\n"


class CpuActivity:
    """Whether a process works, by its processor time: planning gives no output for long, but is never idle.

    A stopped process, or one that waits for ever, is idle; an endless loop is not.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._since, self._spent = time.monotonic(), self._seconds()

    def idle(self) -> bool:
        """Whether it had less than `IDLE_SHARE` of a processor in `IDLE_SECONDS`."""
        if self._seconds() - self._spent > IDLE_SHARE * IDLE_SECONDS:
            self._since, self._spent = time.monotonic(), self._seconds()
        return time.monotonic() - self._since > IDLE_SECONDS

    def _seconds(self) -> float:
        """Processor time of all its threads; none any more where it has ended."""
        try:
            status = Path(f"/proc/{self._process}/stat").read_bytes()
        except OSError:
            return 0.0
        user, system = status.rpartition(b")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Simulator:
    """A process for one simulator; it ends with the thread that started it."""

    def __init__(self, log: Path, display: str | None = None, threads: int = 1) -> None:
        """Start the process; what CoppeliaSim prints is added to `log`."""
        self._pipe, writing = os.pipe()
        self._buffer = bytearray()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", rlbench_worker.__name__, str(writing), str(os.getpid())],
                env=simulator_env(display, threads),
                pass_fds=[writing],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        os.close(writing)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def launch(self, settings: Mapping[str, Any], seconds: float = LAUNCH_SECONDS) -> None:
        """Launch CoppeliaSim. Raises `HungError` or `DeadError`, with what it said."""
        answer = self.ask(settings, seconds)
        if "ready" not in answer:
            self.kill()
            raise DeadError(str(answer.get("reason")))

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request. Raises `HungError` or `DeadError`, after which the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(seconds)
        except TimeoutError as error:
            self.kill()
            raise HungError(str(error)) from None
        except OSError:
            line = b""
        if not line:
            self.kill(2.0)
            raise DeadError(f"{DIED} {_ending(self._process.returncode)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, seconds: float) -> bytes:
        """The next line; empty where the process ends, even if something else holds its pipe open.

        Raises `TimeoutError` in words where none comes.
        """
        activity, end = CpuActivity(self._process.pid), time.monotonic() + seconds
        while True:
            alive = self.alive
            line = read_line(
                self._pipe, self._buffer, min(POLL_SECONDS, end - time.monotonic()) if alive else 0
            )
            if line is not None or not alive:
                return line or b""
            if time.monotonic() >= end:
                raise TimeoutError(f"no answer from the simulator within {seconds:g} s")
            if activity.idle():
                raise TimeoutError(f"the simulator stood still for {IDLE_SECONDS:g} s")

    def close(self) -> None:
        """Let it shut CoppeliaSim down; kill it if that takes long."""
        with contextlib.suppress(OSError):
            self._process.stdin.close() if self._process.stdin else None
        self.kill(SHUTDOWN_GRACE)

    def interrupt(self) -> None:
        """End the process from any thread; whoever waits for it finds it dead."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self, grace: float = 0.0) -> None:
        """End the process and what it started, after `grace` seconds. A second time does nothing."""
        if self._pipe < 0:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close() if self._process.stdin else None
        os.close(self._pipe)
        self._pipe = -1


def _ending(code: int) -> str:
    """How a process ended, in words."""
    return f"by signal {-code}" if code < 0 else f"with status {code}"


def count_variations(tasks: Sequence[str]) -> dict[str, int]:
    """How many variations each task has. Raises `UserError` where RLBench cannot be imported."""
    files.STAGING.mkdir(parents=True, exist_ok=True)
    log = files.STAGING / "rlbench-count.log"
    simulator = Simulator(log)
    try:
        counts: dict[str, int] = simulator.ask({"count": list(tasks)}, LAUNCH_SECONDS)["variations"]
    except (HungError, DeadError) as error:
        raise UserError(f"RLBench cannot be imported: {error}; {log} says more") from None
    finally:
        simulator.close()
    return counts


START_SECONDS = 30.0
SCREEN = ["-screen", "0", "1280x1024x24", "-nolisten", "tcp", "-noreset", "+extension", "GLX", "+render"]


def given_display() -> str | None:
    """The value of DISPLAY if a local X server answers there."""
    shown = os.environ.get("DISPLAY", "")
    local = re.fullmatch(r"(?:unix)?:(\d+)(?:\.\d+)?", shown)
    if not local:
        return shown or None
    for address in (f"/tmp/.X11-unix/X{local[1]}", f"\0/tmp/.X11-unix/X{local[1]}"):
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(2)
            client.connect(address)
            return shown
    return None


_FOLLOWER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Display:
    """The X display that simulators draw on: the user's if it answers, else an Xvfb for as long as needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._running = contextlib.ExitStack()
        self._name: str | None = None
        self._distrusted = False

    def name(self) -> str:
        """A display that answers; an Xvfb that has ended is replaced. Raises `UserError` where none does."""
        with self._lock:
            if self._server is not None and self._server.poll() is None and self._name:
                return self._name
            given = None if self._distrusted else given_display()
            self._name = given or self._start()
            return self._name

    def distrust(self) -> None:
        """Leave the user's display, on which a simulator did not start, for an Xvfb if there is one."""
        with self._lock:
            self._distrusted = shutil.which("Xvfb") is not None

    def _start(self) -> str:
        reading, writing = os.pipe()
        command = [sys.executable, "-c", _FOLLOWER, "Xvfb", "-displayfd", str(writing), *SCREEN]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = child(command, signal.SIGTERM, 5.0, pass_fds=[writing], **quiet)
        self._server = self._running.enter_context(server)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            number = read_line(pipe.fileno(), bytearray(), START_SECONDS) or b""
        if not number.strip().isdigit():
            self.close()
            raise UserError("Xvfb does not start; run `Xvfb :99` to see why, or set DISPLAY")
        return f":{int(number)}"

    def close(self) -> None:
        """End the Xvfb, if one was started."""
        self._running.close()
        self._server = None


ATTEMPTS = 10
UNEXPECTED = 3
LAUNCHES = 5
SERVICE = 100
NOT_TRIED = "not tried after episode"
NOT_LOADED = "the task cannot be loaded"


class ManagedSimulator:
    """Keeps one simulator running for one thread, and launches another when it has ended or is worn."""

    def __init__(
        self, settings: Mapping[str, Any], timeout: float, display: Display, log: Path, threads: int
    ) -> None:
        """settings: what a simulator is launched with. timeout: seconds for an answer."""
        self._settings = settings
        self._timeout = timeout
        self._display = display
        self._log = log
        self._threads = threads
        self._served = 0
        self._simulator: Simulator | None = None
        self._stopped = False

    @property
    def fresh(self) -> bool:
        """Whether the last request was the first one of its simulator."""
        return self._served == 1

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A simulator's answer. Raises `HungError` or `DeadError`, or `UserError` where none starts.

        A simulator's memory grows with use, so it serves a number of requests only.
        """
        if self._served >= SERVICE:
            self.close()
        simulator = self._launched()
        self._served += 1
        return simulator.ask(request, self._timeout)

    def _launched(self) -> Simulator:
        reasons: list[str] = []
        while len(reasons) < LAUNCHES and not self._stopped:
            if self._simulator is not None and self._simulator.alive:
                return self._simulator
            self.drop()
            time.sleep(min(len(reasons), 2))
            try:
                self._simulator = Simulator(self._log, self._display.name(), self._threads)
                if self._stopped:
                    break
                self._simulator.launch(self._settings)
                self._served = 0
                return self._simulator
            except (HungError, DeadError) as error:
                reasons.append(str(error))
                self._display.distrust()
        if self._stopped:
            raise DeadError("stopped")
        raise UserError(f"CoppeliaSim does not start: {reasons[-1]}; {self._log} says more")

    def drop(self) -> None:
        """Kill the simulator; the next request launches another."""
        if self._simulator is not None:
            self._simulator.kill()
        self._simulator = None

    def stop(self) -> None:
        """Kill the simulator from any thread; none is launched afterwards."""
        self._stopped = True
        if (simulator := self._simulator) is not None:
            simulator.interrupt()

    def close(self) -> None:
        """Shut the simulator down."""
        if self._simulator is not None:
            self._simulator.close()
        self._simulator = None


class SimulatorPool:
    """Simulators that work on all jobs; finished demos wait in `folder` until they are discarded."""

    def __init__(
        self,
        jobs: Sequence[Job],
        workers: int,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        seed: int,
        timeout: float,
    ) -> None:
        """Demos and failures that an earlier run left in `folder` count as done.

        settings: what simulators are launched with, among it the cameras. timeout: seconds for an attempt.
        """
        self._cameras = settings["cameras"]
        self._seed = seed
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._changed = threading.Condition()
        self._finished = {job for job in jobs if self._left(job)}
        self._waiting = [job for job in jobs if job not in self._finished]
        self._busy: collections.Counter[str] = collections.Counter()
        self._seconds: dict[str, float] = {}
        self._solved = set[tuple[str, int | None]]()
        self._failed: dict[tuple[str, int | None], str] = {}
        for job in jobs:
            if job in self._finished:
                self._note(job, self._reason(job))
        self._error: BaseException | None = None
        self._closed = False
        self._display = Display()
        count = min(workers, len(self._waiting))
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, count))
        self._simulators = [
            ManagedSimulator(
                settings, timeout, self._display, self._folder / f"simulator{number}.log", threads
            )
            for number in range(count)
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(simulator,), daemon=True)
            for simulator in self._simulators
        ]

    def __enter__(self) -> SimulatorPool:
        if self._threads:
            self._display.name()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut all simulators down; after an error, kill them: only attempts in progress are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for simulator in self._simulators if error else ():
            simulator.stop()
        for thread in self._threads:
            thread.join()
        self._display.close()

    def result(self, job: Job) -> Episode:
        """Wait for a job and load its demo. Raises the error that stopped the pool."""
        with self._changed:
            self._changed.wait_for(lambda: job in self._finished or self._error or self._closed)
            if job not in self._finished:
                raise self._error or RuntimeError("the pool was closed")
        reason = self._reason(job)
        if reason is not None:
            return Episode(job, success=False, fps=FPS, reason=reason)
        return self._load(job)

    def discard(self, job: Job) -> None:
        """Remove the file of a job that the store has by now."""
        self._demo(job).unlink(missing_ok=True)
        self._failure(job).unlink(missing_ok=True)

    def _demo(self, job: Job) -> Path:
        return self._folder / f"{job.task}-v{job.variation}-e{job.episode}.npz"

    def _failure(self, job: Job) -> Path:
        return self._demo(job).with_suffix(".txt")

    def _reason(self, job: Job) -> str | None:
        """Why a finished job has no demo; None where it has one."""
        path = self._failure(job)
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _left(self, job: Job) -> bool:
        """Whether an earlier run left a whole file for a job."""
        return self._failure(job).exists() or zipfile.is_zipfile(self._demo(job))

    def _load(self, job: Job) -> Episode:
        try:
            with np.load(self._demo(job), allow_pickle=False) as content:
                frames = {camera: _at_size(content[camera]) for camera in self._cameras}
                arrays = {name: content[name] for name in rlbench_worker.ARRAYS}
        except Exception as error:
            return Episode(job, reason=f"the stored demo cannot be read: {one_line(error)}")
        return Episode(job, frames, arrays, success=True, fps=FPS)

    def _work(self, simulator: ManagedSimulator) -> None:
        """What each thread does: take jobs until there are none or an error stops the pool.

        Processes that a thread started end with it, and the display serves all: it waits for the others.
        """
        task = None
        try:
            while (job := self._take(task)) is not None:
                task = job.task
                begin = time.monotonic()
                reason = self._given_up(job) or self._attempt(simulator, job)
                if not self._closed:
                    self._finish(job, reason, time.monotonic() - begin)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
        finally:
            simulator.close()
        with self._changed:
            self._changed.wait_for(lambda: self._closed)

    def _take(self, task: str | None) -> Job | None:
        """The next job: of the loaded task, else of one that no simulator has, else of the longest left.

        None at the end. How long a task's jobs take is estimated by its last one.
        """
        with self._changed:
            if self._closed or self._error or not self._waiting:
                return None
            left = collections.Counter(job.task for job in self._waiting)

            def rank(number: int) -> tuple[bool, float, int]:
                name = self._waiting[number].task
                shared = -left[name] * self._seconds.get(name, 0.0) if self._busy[name] else -math.inf
                return name != task, shared, number

            job = self._waiting.pop(min(range(len(self._waiting)), key=rank))
            self._busy[job.task] += 1
            return job

    def _finish(self, job: Job, reason: str | None, seconds: float) -> None:
        """Record the outcome of a job, and wake who waits for it."""
        if reason:
            files.write_text(self._failure(job), reason)
        with self._changed:
            self._busy[job.task] -= 1
            self._seconds[job.task] = seconds
            self._finished.add(job)
            self._note(job, reason)
            self._changed.notify_all()

    def _note(self, job: Job, reason: str | None) -> None:
        """Count an outcome for or against a task and its variation; crashes count for neither."""
        task, variation = (job.task, None), (job.task, job.variation)
        if reason is None:
            self._solved |= {task, variation}
        elif reason.startswith(NOT_LOADED):
            self._failed.setdefault(task, reason)
        elif DIED not in reason:
            noted = reason if reason.startswith(NOT_TRIED) else f"{NOT_TRIED} {job.episode}: {reason}"
            self._failed.setdefault(variation, noted)

    def _given_up(self, job: Job) -> str | None:
        """Why a job is not tried, if so: its task cannot be loaded, or its variation only failed so far."""
        with self._changed:
            for key in ((job.task, None), (job.task, job.variation)):
                if key in self._failed and key not in self._solved:
                    return self._failed[key]
        return None

    def _attempt(self, simulator: ManagedSimulator, job: Job) -> str | None:
        """Try for a demo; None once it is stored, else the reasons of the failures.

        An error in loading a task has no random cause: by a new simulator, it is not tried again.
        """
        reasons: collections.Counter[str] = collections.Counter()
        unexpected = 0
        while reasons.total() < ATTEMPTS and unexpected < UNEXPECTED and not self._closed:
            request = {
                "task": job.task,
                "variation": job.variation,
                "seed": zlib.crc32(repr((self._seed, job, reasons.total())).encode()),
                "path": str(self._demo(job)),
            }
            try:
                answer = simulator.ask(request)
            except (HungError, DeadError) as error:
                answer = {"reason": str(error), "unexpected": isinstance(error, HungError)}
            if "errno" in answer:
                raise OSError(answer["errno"], answer["strerror"], str(self._demo(job)))
            if "steps" in answer:
                return None
            reasons[answer["reason"]] += 1
            if answer.get("unexpected"):
                unexpected += 1
                simulator.drop()
                if answer.get("loading") and simulator.fresh:
                    return f"{NOT_LOADED}: {answer['reason']}"
        simulator.drop()
        summary = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        return f"no demo in {reasons.total()} attempts: {summary}"


def _at_size(frames: Frames) -> Frames:
    """Pictures brought to 64x64."""
    return np.stack([np.asarray(at_size(Image.fromarray(frame))) for frame in frames])
