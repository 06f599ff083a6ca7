"""DVC's command line, run so that it and its stages end with the flow that asked for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from prelar.errors import UserError, printable

GRACE = 20
PACE = 0.2


class Log:
    """Output that goes to a file, read as it grows."""

    def __init__(self) -> None:
        self._read = 0

    def fresh(self, path: Path) -> list[str]:
        """The whole lines that are new since the last call; none where there is no file yet."""
        if not path.is_file():
            return []
        with path.open("rb") as handle:
            handle.seek(self._read)
            whole, newline, _ = handle.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        lines = re.split(r"[\r\n]+", whole.decode(errors="replace"))
        return [printable(line.expandtabs()) for line in lines if line.strip()]


def overrides(changes: dict[str, Any]) -> list[str]:
    """Changes to params.yaml as words of `dvc exp run`."""
    return [word for key, value in changes.items() for word in ("-S", f"{key}={json.dumps(value)}")]


def dvc(*words: str, tell: Callable[[str], None] | None = None) -> list[str]:
    """Run DVC and return its lines, each told as it comes. Raises `UserError` with DVC's reasons.

    DVC has a session of its own. What interrupts this call interrupts DVC and its stages as Ctrl-C in a
    terminal would, so that DVC puts the workspace back before it ends. The output goes through a file: the
    workers of DVC's queue keep the output of what started them open, so that a pipe would never end.
    """
    lines: list[str] = []
    with tempfile.NamedTemporaryFile() as output, _started(words, output) as process:
        log, ended = Log(), False
        while not ended:
            ended = process.poll() is not None
            for line in log.fresh(Path(output.name)):
                lines.append(line.strip())
                if tell:
                    tell(lines[-1])
            time.sleep(0 if ended else PACE)
    if process.returncode != 0:
        reasons = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        raise UserError(
            f"dvc {words[0]} {words[1]} ended with status {process.returncode}: {'; '.join(reasons)}"
        )
    return lines


def busy(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a task failed because another DVC command held a lock, so that it may be tried again."""
    try:
        state.result()
    except UserError as error:
        return "lock" in str(error).lower()
    except BaseException:
        return False
    return False


@contextlib.contextmanager
def _started(words: tuple[str, ...], output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """DVC in a session of its own, and whatever of it lives when the block ends, ended."""
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", *words],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, and kill what has not ended after `GRACE` seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
            return
