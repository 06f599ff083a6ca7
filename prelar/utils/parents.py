"""Processes that end with the one that started them, in whatever way that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = os.getppid()
"""The process that started this one, as long as this module is imported early."""
_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: int = signal.SIGTERM) -> None:
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
        end_with(PARENT, signal.SIGKILL)
