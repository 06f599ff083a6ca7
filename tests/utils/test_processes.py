"""Worker processes: results come back, failures cancel the rest, nobody outlives a killed parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prelar.utils.errors import UserError
from prelar.utils.processes import processors, worker_pool

PARENT = """
import os, sys, time
from prelar.utils.processes import worker_pool
if __name__ == "__main__":
    with worker_pool(2) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
        pool.submit(time.sleep, 60).result()
"""


def test_results_come_back() -> None:
    with worker_pool(2) as pool:
        assert list(pool.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
    assert processors() >= 1


def test_failure_cancels_what_waits() -> None:
    with pytest.raises(ValueError, match="stop"), worker_pool(1) as pool:
        jobs = [pool.submit(time.sleep, 0.2) for _ in range(20)]
        raise ValueError("stop")
    assert jobs[-1].cancelled()


def test_failure_ends_what_runs() -> None:
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_pool(2) as pool:
        pool.submit(abs, 1).result()
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_told_in_a_line(number: signal.Signals) -> None:
    with pytest.raises(UserError, match=r"^a worker process died"), worker_pool(1) as pool:
        pool.submit(signal.raise_signal, number).result()


def test_killed_parent_takes_its_workers_along(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    settings = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=settings
    ) as parent:
        assert parent.stdout is not None
        workers = [int(number) for number in parent.stdout.readline().split()]
        assert workers
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    """Whether a process still runs; an ended one that nobody has collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
