"""DVC's command line and Git's, run so that they and their stages end with the flow that asked for them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prelar.config import PARAMS, Config
from prelar.stages import PIPELINE, Stages
from prelar.utils.errors import UserError, printable
from prelar.utils.overrides import override
from prelar.utils.parents import child

GRACE = 20
PACE = 0.2
EXPERIMENTS = "refs/exps"
CPU_SECONDS = "CPU seconds:"
START = f"""\
import contextlib, os, resource, runpy, signal, sys
from prelar.utils.parents import end_with_parent
end_with_parent(int(sys.argv.pop(1)), signal.SIGKILL)
with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
    group.write(str(os.nice(0)))  # Linux shares the CPU out by sessions, of which this one is new
try:
    runpy.run_module("dvc", run_name="__main__", alter_sys=True)
finally:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print({CPU_SECONDS!r}, round(sum(one.ru_utime + one.ru_stime for one in used), 1), flush=True)
"""


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
    """Changes to params.yaml as words of `dvc exp run`; a key that the file lacks is added."""
    return [word for key, value in changes.items() for word in ("-S", f"++{key}={override(value)}")]


def dvc(
    *words: str,
    on_line: Callable[[str], None] | None = None,
    folder: Path = Path(),
    log: Path | None = None,
    stop: threading.Event | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Run DVC in a folder and return its lines, each given to `on_line` as it comes and kept in `log`.

    The log ends with `CPU_SECONDS` and what DVC and its stages took, which is no line of DVC's.

    DVC has a session of its own, waits for other DVCs and is killed when this process ends. What interrupts
    this call, or sets `stop`, interrupts DVC and its stages as Ctrl-C in a terminal would. Raises `UserError`
    with DVC's reasons.
    """
    lines: list[str] = []
    command = [sys.executable, "-c", START, str(os.getpid()), "--wait-for-lock", "--cd", str(folder), *words]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = {"env": os.environ | {"PATH": path, **environment}, "stderr": subprocess.STDOUT}
    with (
        log.open("wb") if log else tempfile.NamedTemporaryFile() as output,
        child(command, signal.SIGINT, GRACE, stdout=output, **settings) as process,
    ):
        new, ended = Log(), False
        while not ended:
            if stop and stop.is_set():
                raise UserError(f"dvc {words[0]} {words[1]} was interrupted")
            ended = process.poll() is not None
            for line in new.fresh(Path(output.name)):
                if line.startswith(CPU_SECONDS):
                    continue
                lines.append(line.strip())
                if on_line:
                    on_line(lines[-1])
            time.sleep(0 if ended else PACE)
    if process.returncode != 0:
        reasons = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        raise UserError(
            f"dvc {words[0]} {words[1]} ended with status {process.returncode}: {'; '.join(reasons)}"
        )
    return lines


def git(*words: str, folder: Path = Path()) -> str:
    """What Git prints in a folder. Raises `UserError` with Git's reasons."""
    done = subprocess.run(["git", *words], cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        reasons = " ".join(done.stderr.split()) or f"ended with status {done.returncode}"
        raise UserError(f"git {words[0]}: {reasons}")
    return done.stdout


def results() -> dict[str, str]:
    """The references of the finished experiments that Git knows, by name."""
    listed = git("for-each-ref", "--format=%(refname)", f"{EXPERIMENTS}/*/*/*").splitlines()
    return {ref.rsplit("/", 1)[-1]: ref for ref in listed}


def metrics(name: str) -> dict[str, float]:
    """The metrics of a finished experiment; none where its pipeline left none."""
    try:
        found: dict[str, float] = json.loads(git("show", f"{results()[name]}:metrics.json"))
    except UserError:
        return {}
    return found


IN_STAGE = ("DVC_STAGE", "DVC_ROOT")
Stamps = dict[Path, list[tuple[str, int, int, int]]]


def stamps(stage: str, config: Config) -> Stamps:
    """What the outputs of `stage` are made of, as it lies there now: inode, size and time of every file.

    Nothing where the current folder is not the top of a DVC project with that stage, and inside a stage,
    whose outputs DVC commits itself.
    """
    values = config.model_dump(mode="json")
    stages = Stages().resolved(values) if Path(".dvc").is_dir() and PIPELINE.is_file() else {}
    if any(name in os.environ for name in IN_STAGE) or stage not in stages:
        return {}
    return {path: _stamps(path) for path in (PARAMS, *map(Path, stages[stage]["deps"]))}


def record(stage: str, begun: Stamps) -> None:
    """Let DVC commit the outputs of `stage`, which a flow has just made with the values of params.yaml.

    begun: `stamps` of when it began; nothing happens where there were none. Where one of them differs now, or
    DVC cannot (it is busy, or a dependency is missing), a line says so: the outputs are whole all the same,
    and the next `dvc repro` makes them again.
    """
    if not begun:
        return
    for path, before in begun.items():
        if _stamps(path) != before:
            print(f"{stage}: not recorded with DVC: {path} changed meanwhile", file=sys.stderr)
            return
    command = [sys.executable, "-m", "dvc", "commit", "--force", stage]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(f"{stage}: recorded with DVC; `dvc status` tells what depends on it")
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    error = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason")
    reason = printable(error.removeprefix("ERROR: "))
    print(
        f"{stage}: not recorded with DVC: {reason}; mend that and run `dvc commit {stage}`", file=sys.stderr
    )


def _stamps(path: Path) -> list[tuple[str, int, int, int]]:
    """Inode, size and time of a file, or of every file in a folder; none where there is none."""
    inside = [item for item in path.rglob("*") if "__pycache__" not in item.parts] if path.is_dir() else []
    states = [(str(item), item.stat()) for item in sorted((path, *inside)) if item.is_file()]
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]
