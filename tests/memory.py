"""What a flow's processes hold in memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

import psutil


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
