"""DVC's queue of experiments: what stands in it, how each entry fares, and where its output goes.

Changes go through DVC's command line. States are read through its package, as often as a flow wants to know.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc_command import dvc, overrides
from prelar.errors import UserError

EXPERIMENTS = "refs/exps"
LOST_AFTER = 60.0
GENTLE = 6.0
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
                _ask("kill", running, force=passed > GENTLE)
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
