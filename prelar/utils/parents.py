"""Processes that end with the one that started them, in whatever way that ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

PARENT = os.getppid()
"""The process that started this one, as long as this module is imported early."""
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Let the system signal this process, also after an `exec`, when its parent process ends in any way."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit()


def end_with_dvc() -> None:
    """Let the system kill a stage when the DVC that runs it ends; nothing happens outside of a stage.

    Where DVC is killed, the outputs are no longer the stage's own: the next DVC may take them from its cache
    at any moment. So the stage writes nothing more. What it keeps for the next start lies elsewhere.
    """
    if "DVC_STAGE" in os.environ:
        end_with_parent(PARENT, signal.SIGKILL)


@contextlib.contextmanager
def child(
    words: Sequence[str], stop: signal.Signals, grace: float, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process without input and in a session of its own, so that Ctrl-C in a terminal does not reach it.

    If it still runs when the block ends, `stop` goes to it and its children, SIGKILL `grace` seconds later.
    What it left running when it ended by itself stays. options: those of `Popen`.
    """
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        for number in (stop, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=grace)
