"""A process that runs one RLBench simulator (`prelar.data.rlbench_simulator`): start it, ask it, end it.

Whatever becomes of the process, whoever asks gets an answer or an error within the time that was given.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prelar import files
from prelar.data import rlbench_simulator
from prelar.errors import UserError

ROOT = "COPPELIASIM_ROOT"
LAUNCH_SECONDS = 120.0
FAREWELL = 5.0
GLANCE = 1.0
STILL_SECONDS = 30.0
STILL_SHARE = 0.01
DIED = "the simulator ended"


def surroundings(display: str | None, threads: int = 1) -> dict[str, str]:
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
    """A simulator stood still or gave no answer in time, and was killed."""


class DeadError(Exception):
    """A simulator ended by itself."""


def read_line(pipe: int, held: bytearray, seconds: float) -> bytes | None:
    """The next line from a pipe; empty where the pipe ends, None where nothing came in time.

    held: what was read beyond the line, for the next call.
    """
    end = time.monotonic() + seconds
    while b"\n" not in held:
        if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
            return None
        piece = os.read(pipe, 65536)
        if not piece:
            return b""
        held += piece
    line, _, rest = bytes(held).partition(b"\n")
    held[:] = rest
    return line + b"\n"


class Pulse:
    """Whether a process works, told by its processor time: planning is silent for long, but never idle.

    A process that was stopped or waits for what never comes stands still; one that turns in circles does not.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._since, self._spent = time.monotonic(), self._seconds()

    def still(self) -> bool:
        """Whether it had less than `STILL_SHARE` of a processor in `STILL_SECONDS`."""
        if self._seconds() - self._spent > STILL_SHARE * STILL_SECONDS:
            self._since, self._spent = time.monotonic(), self._seconds()
        return time.monotonic() - self._since > STILL_SECONDS

    def _seconds(self) -> float:
        """Processor time of all its threads; none any more where it has ended."""
        try:
            told = Path(f"/proc/{self._process}/stat").read_bytes()
        except OSError:
            return 0.0
        user, system = told.rpartition(b")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Simulator:
    """A process for one simulator; it ends with the thread that started it."""

    def __init__(self, log: Path, display: str | None = None, threads: int = 1) -> None:
        """Start the process; what CoppeliaSim prints is added to `log`."""
        self._pipe, writing = os.pipe()
        self._held = bytearray()
        with log.open("ab") as told:
            self._process = subprocess.Popen(
                [sys.executable, "-m", rlbench_simulator.__name__, str(writing), str(os.getpid())],
                env=surroundings(display, threads),
                pass_fds=[writing],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=told,
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
        pulse, end = Pulse(self._process.pid), time.monotonic() + seconds
        while True:
            alive = self.alive
            line = read_line(self._pipe, self._held, min(GLANCE, end - time.monotonic()) if alive else 0)
            if line is not None or not alive:
                return line or b""
            if time.monotonic() >= end:
                raise TimeoutError(f"no answer from the simulator within {seconds:g} s")
            if pulse.still():
                raise TimeoutError(f"the simulator stood still for {STILL_SECONDS:g} s")

    def close(self) -> None:
        """Let it shut CoppeliaSim down; kill it if that takes long."""
        with contextlib.suppress(OSError):
            self._process.stdin.close() if self._process.stdin else None
        self.kill(FAREWELL)

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
