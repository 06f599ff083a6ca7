"""The X display that RLBench's simulators draw on: the user's if it answers, else an Xvfb of our own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

from prelar.data.rlbench_process import read_line
from prelar.errors import UserError

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
        command = ["Xvfb", "-displayfd", str(writing), *SCREEN]
        self._server = subprocess.Popen(
            [sys.executable, "-c", _FOLLOWER, *command],
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            number = read_line(pipe.fileno(), bytearray(), START_SECONDS) or b""
        if not number.strip().isdigit():
            self.close()
            raise UserError("Xvfb does not start; run `Xvfb :99` to see why, or set DISPLAY")
        return f":{int(number)}"

    def close(self) -> None:
        """End the Xvfb, if one was started."""
        if self._server is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(timeout=5)
            if self._server.poll() is None:
                self._server.kill()
                self._server.wait()
            self._server = None
