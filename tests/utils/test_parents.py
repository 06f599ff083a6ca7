"""A process that was started ends with its block, and its children with it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from prelar.utils.parents import child
from tests.utils.test_processes import alive

FAMILY = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN if "stubborn" in sys.argv else signal.SIG_DFL)
other = subprocess.Popen(["sleep", "60"])
print(other.pid, flush=True)
if "gone" not in sys.argv:
    time.sleep(60)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["willing", "stubborn"])
def test_a_child_and_its_children_end_with_the_block(stop: signal.Signals, how: str) -> None:
    words = [sys.executable, "-c", FAMILY, how]
    with (
        pytest.raises(ValueError, match="stop"),
        child(words, stop, 1.0 if how == "stubborn" else 60.0, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        other = int(process.stdout.readline())
        raise ValueError("stop")
    assert process.returncode == -(signal.SIGKILL if how == "stubborn" else stop)
    end = time.monotonic() + 20
    while alive(other):
        assert time.monotonic() < end, "the child's own child lives on"
        time.sleep(0.05)


def test_what_a_child_left_behind_by_itself_stays() -> None:
    words = [sys.executable, "-c", FAMILY, "gone"]
    with child(words, signal.SIGTERM, 60.0, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        other = int(process.stdout.readline())
        assert process.wait() == 0
    os.kill(other, signal.SIGKILL)  # fails where it had ended first
