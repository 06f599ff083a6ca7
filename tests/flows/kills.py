"""Work that is killed again and again: at its operations on the disk, or as a flow with all its processes.

`Interruption` and `kill_until_done` kill a forked copy of this process at the n-th operation. `FlowProcess`
is a flow in a process of its own, whose `descendants` can be killed one by one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import staging
from prelar.store.schema import checks_path, index_path
from prelar.store.store import Store
from prelar.utils import files

MANY = 500
SECONDS = 240


def tree(folder: Path, name: str) -> dict[str, bytes]:
    """The published store `name` and its index, by path."""
    store = folder / f"{name}.zarr"
    held = {str(path.relative_to(folder)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {**held, "index": index_path(store).read_bytes()}


class Interruption:
    """Kills this process with SIGKILL at the n-th operation that changes the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        for owner, names in (
            (
                os,
                ("pwrite", "fsync", "fdatasync", "truncate", "unlink", "rmdir", "replace", "link", "rename"),
            ),
            (Path, ("replace", "unlink", "mkdir")),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **named)

        return counted


def kill_until_done(
    name: str, work: Callable[[], None], wanted: dict[str, bytes], seed: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Run the work on store `name` and kill it until a run ends by itself; returns the number of kills.

    It works in the current folder. Before each run the outputs are removed, as DVC does; what is staged must
    bring them back, in the end `wanted` and nothing besides.
    """
    random_ = random.Random(seed)
    target = staging.target(name)
    for kills in range(MANY):
        for path in (target, index_path(target), checks_path(target)):
            files.remove(path)
        pid = os.fork()
        if pid == 0:
            try:
                Interruption(monkeypatch, random_.randint(1, 12 + 2 * kills))
                work()
                os._exit(0)
            except BaseException as error:
                traceback.print_exception(error)
                os._exit(1)
        random_.random()
        status = os.waitpid(pid, 0)[1]
        if (target / "zarr.json").exists() and index_path(target).exists():
            Store.open(target)
        if os.WIFSIGNALED(status):
            continue
        assert os.waitstatus_to_exitcode(status) == 0
        assert tree(target.parent, name) == wanted
        assert list(files.STAGING.iterdir()) == []
        assert not list(target.parent.glob(f".{name}.*"))
        return kills
    raise AssertionError(f"killed {MANY} times without an end")


class FlowProcess:
    """A flow that runs in `root` as a process, to be killed with its descendants."""

    def __init__(self, root: Path, flow: str) -> None:
        self._log = root.with_name(f"{flow}.log")
        with self._log.open("wb") as log:
            self._flow = subprocess.Popen(
                [sys.executable, "-m", flow],
                cwd=root,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self._self = psutil.Process(self._flow.pid)

    def descendants(self, word: str) -> list[psutil.Process]:
        """Its descendants whose command lines hold a word."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in self._self.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if word in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def wait_for(self, ready: Callable[[], object]) -> bool:
        """Wait until something is so. Where the flow ends first, print what it said and return False."""
        end = time.monotonic() + SECONDS
        while not ready():
            if self._flow.poll() is not None:
                print(f"ended with {self._flow.returncode}:", self._log.read_text(errors="replace"))
                return False
            assert time.monotonic() < end
            time.sleep(0.05)
        return True

    def kill_one(self, word: str, random_: random.Random) -> bool:
        """Kill a descendant by chance; whether there was one."""
        with contextlib.suppress(IndexError, psutil.Error):
            random_.choice(self.descendants(word)).kill()
            return True
        return False

    def kill(self) -> bool:
        """Kill it and see its descendants end; whether it still ran."""
        descendants = self.descendants("")
        running = self._flow.poll() is None
        self._flow.kill()
        self._flow.wait()
        assert not psutil.wait_procs(descendants, timeout=SECONDS)[1]
        return running

    def interrupt(self, number: signal.Signals) -> int:
        """Signal it and see its descendants end; its status."""
        descendants = self.descendants("")
        self._flow.send_signal(number)
        status = self.end()
        assert not psutil.wait_procs(descendants, timeout=SECONDS)[1]
        return status

    def end(self) -> int:
        """Its status, once it has ended by itself."""
        return self._flow.wait(timeout=SECONDS)
