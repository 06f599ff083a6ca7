"""What this process, or those of a flow, hold in memory, as the kernel counts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def growth() -> Iterator[Callable[[], float]]:
    """Yield what tells by how many MB this process was larger, at most, than it is at the beginning."""

    def counted(name: str) -> int:
        found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        assert found
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = counted("VmRSS")
    yield lambda: (counted("VmHWM") - before) / 1024


def held(pid: int) -> tuple[float, float]:
    """Summed proportional set size in MB of a process and its descendants: Prefect's server apart."""
    own = server = 0.0
    for process in _tree(pid):
        size, is_server = _of(process)
        own, server = (own, server + size) if is_server else (own + size, server)
    return own, server


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _of(process: psutil.Process) -> tuple[float, bool]:
    """PSS in MB of a process, and whether it is Prefect's server."""
    try:
        is_server = "flows.runtime" in " ".join(process.cmdline())
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        return float(text.partition("\nPss:")[2].split()[0]) / 1024, is_server
    except (psutil.Error, OSError, IndexError):
        return 0.0, False
