"""DVC's command line, run so that it and its stages end with the flow that asked for them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prelar.errors import UserError

GRACE = 20


def overrides(changes: dict[str, Any]) -> list[str]:
    """Changes to params.yaml as words of `dvc exp run`."""
    return [word for key, value in changes.items() for word in ("-S", f"{key}={json.dumps(value)}")]


def dvc(*words: str, tell: Callable[[str], None] | None = None) -> list[str]:
    """Run DVC and return its lines, each told as it comes. Raises `UserError` with DVC's reasons.

    DVC has a session of its own. What interrupts this call interrupts DVC and its stages as Ctrl-C in a
    terminal would, so that DVC puts the workspace back before it ends.
    """
    lines: list[str] = []
    with _started(words) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if text := line.strip():
                lines.append(text)
                if tell:
                    tell(text)
        process.wait()
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
def _started(words: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """DVC in a session of its own, and whatever of it lives when the block ends, ended."""
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", *words],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    ) as process:
        try:
            yield process
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[str]) -> None:
    """Interrupt a process and its children, and kill what has not ended after `GRACE` seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE)
            return
