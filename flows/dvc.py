"""DVC's command line, run so that it and its stages end with the flow that asked for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelar.config import read_yaml
from prelar.utils.errors import UserError, printable
from prelar.utils.parents import child

GRACE = 20
PACE = 0.2


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
    """Changes to params.yaml as words of `dvc exp run`."""
    return [word for key, value in changes.items() for word in ("-S", f"{key}={json.dumps(value)}")]


def dvc(*words: str, tell: Callable[[str], None] | None = None) -> list[str]:
    """Run DVC and return its lines, each told as it comes. Raises `UserError` with DVC's reasons.

    DVC has a session of its own. What interrupts this call interrupts DVC and its stages as Ctrl-C in a
    terminal would, so that DVC puts the workspace back before it ends. The output goes through a file: the
    workers of DVC's queue keep the output of what started them open, so that a pipe would never end.
    """
    lines: list[str] = []
    command = [sys.executable, "-m", "dvc", *words]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = {"env": os.environ | {"PATH": path}, "stderr": subprocess.STDOUT}
    with (
        tempfile.NamedTemporaryFile() as output,
        child(command, signal.SIGINT, GRACE, stdout=output, **settings) as process,
    ):
        log, ended = Log(), False
        while not ended:
            ended = process.poll() is not None
            for line in log.fresh(Path(output.name)):
                lines.append(line.strip())
                if tell:
                    tell(lines[-1])
            time.sleep(0 if ended else PACE)
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


EXPERIMENTS = "refs/exps"
LOST_AFTER = 60.0
FORCE_KILL_AFTER = 6.0
PATIENCE = 25.0


@dataclass(frozen=True)
class Entry:
    """One entry of the queue: `state` is queued, running, failed or done; `log` may not be there yet."""

    state: str
    log: Path
    pid: int | None = None


def results() -> set[str]:
    """The names of the finished experiments that Git knows."""
    listed = git("for-each-ref", "--format=%(refname)", f"{EXPERIMENTS}/*/*/*").splitlines()
    return {ref.rsplit("/", 1)[-1] for ref in listed}


def metrics(name: str) -> dict[str, float]:
    """The metrics of a finished experiment; none where its pipeline left none."""
    (ref, *_) = git("for-each-ref", "--format=%(refname)", f"{EXPERIMENTS}/*/*/{name}").splitlines()
    try:
        found: dict[str, float] = json.loads(git("show", f"{ref}:metrics.json"))
    except subprocess.CalledProcessError:
        return {}
    return found


def state_of_code() -> str:
    """The commit and what the workspace changes about it, params and results apart."""
    others = [f":(top,exclude){path}" for path in ("params.yaml", "dvc.lock", "metrics.json")]
    try:
        return git("rev-parse", "HEAD") + git("diff", "HEAD", "--", ":/", *others)
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"no commit to experiment on ({error.stderr.strip()}); commit the project first"
        ) from None


def git(*words: str) -> str:
    """What Git prints. Raises `CalledProcessError`."""
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


class Queue:
    """The queue of the project in the current folder, worked off by `workers` processes of DVC's."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._gone: dict[str, float] = {}

    def results(self) -> set[str]:
        """The names of the finished experiments."""
        return results()

    def put(self, name: str, changes: dict[str, Any]) -> None:
        """Queue an experiment under a name; what failed under it before makes room."""
        if (entry := self.entries().get(name)) and entry.state == "failed":
            dvc("queue", "remove", name)
        dvc("exp", "run", "--queue", "--name", name, *overrides(changes))

    def start(self) -> None:
        """See that the workers work."""
        dvc("queue", "start", "--jobs", str(self._workers))

    def entries(self) -> dict[str, Entry]:
        """The entries by name."""
        from dvc.repo import Repo

        with Repo() as repo:
            queue = repo.experiments.celery_queue
            states = [("failed", done.entry) for done in queue.iter_failed()]
            states += [("done", done.entry) for done in queue.iter_success()]
            states += [("running", entry) for entry in queue.iter_active()]
            states += [("queued", entry) for entry in queue.iter_queued()]
            return {
                str(entry.name): Entry(state, *self._output(queue, entry.stash_rev))
                for state, entry in states
            }

    @staticmethod
    def _output(queue: Any, revision: str) -> tuple[Path, int | None]:
        process = queue.proc.get(revision)
        return Path(queue.pid_dir) / revision / f"{revision}.out", process.pid if process else None

    def clear_lost(self, entries: dict[str, Entry]) -> None:
        """Let DVC call failed what it calls running although its process has long ended."""
        now = time.monotonic()
        gone = {name for name, entry in entries.items() if entry.state == "running" and not _lives(entry.pid)}
        self._gone = {name: self._gone.get(name, now) for name in gone}
        for name, since in self._gone.items():
            if now - since > LOST_AFTER:
                self._gone[name] = now
                _ask("kill", [name])

    def withdraw(self, names: set[str]) -> None:
        """Take experiments out of the queue, and end those that run: interrupted first, then killed.

        Whoever cancels a flow waits half a minute for it, so its package is asked, not its slow commands.
        """
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < PATIENCE:
            entries = {name: entry.state for name, entry in self.entries().items() if name in names}
            queued = [name for name, state in entries.items() if state == "queued"]
            running = [name for name, state in entries.items() if state == "running"]
            if not queued and not running:
                return
            _ask("remove", queued)
            if running:
                _ask("kill", running, force=passed > FORCE_KILL_AFTER)
                time.sleep(1)


def _ask(what: str, names: list[str], **options: bool) -> None:
    """Ask the queue to remove or kill entries, which may come too late."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo() as repo, contextlib.suppress(DvcException):
        getattr(repo.experiments.celery_queue, what)(names, **options)


def _lives(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


IN_STAGE = ("DVC_STAGE", "DVC_ROOT")
PIPELINE, PARAMS = Path("dvc.yaml"), Path("params.yaml")


Stamps = dict[Path, list[tuple[str, int, int, int]]]


def stamps(stage: str) -> Stamps:
    """What the outputs of `stage` are made of, as it lies there now: inode, size and time of every file.

    Nothing where the current folder is not the top of a DVC project with that stage, and inside a stage,
    whose outputs DVC commits itself.
    """
    stages = read_yaml(PIPELINE).get("stages", {}) if Path(".dvc").is_dir() and PIPELINE.is_file() else {}
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
    told = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason")
    reason = printable(told.removeprefix("ERROR: "))
    print(
        f"{stage}: not recorded with DVC: {reason}; mend that and run `dvc commit {stage}`", file=sys.stderr
    )


def _stamps(path: Path) -> list[tuple[str, int, int, int]]:
    """Inode, size and time of a file, or of every file in a folder; none where there is none."""
    inside = [item for item in path.rglob("*") if "__pycache__" not in item.parts] if path.is_dir() else []
    states = [(str(item), item.stat()) for item in sorted((path, *inside)) if item.is_file()]
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]
