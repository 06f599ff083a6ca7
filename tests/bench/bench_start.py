"""How long `python -m prelar --help` takes, against a bare interpreter, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from tests.conftest import ROOT

PAIRS = 10


def run() -> dict[str, float]:
    """`start_seconds`, and `start_ratio` to the bare interpreter, medians."""
    readings = [(seconds("-m", "prelar", "--help"), seconds("-c", "")) for _ in range(PAIRS)]
    ratio = statistics.median(ours / bare for ours, bare in readings)
    ours = sorted(mine for mine, _ in readings)
    print(f"start: {statistics.median(ours):.2f} s (from {ours[0]:.2f} to {ours[-1]:.2f}, {PAIRS} pairs)")
    return {"start_seconds": statistics.median(ours), "start_ratio": ratio}


def seconds(*words: str) -> float:
    """The time of one process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin
