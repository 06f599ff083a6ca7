"""A version of the project, and experiments on it in clones of their own, beside the workspace."""

from __future__ import annotations

import configparser
import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc import CPU_SECONDS, EXPERIMENTS, dvc, git, overrides, results
from prelar.stages import PIPELINE, Stages
from prelar.utils.errors import UserError
from prelar.utils.files import RESUME, RESUME_FOLDER, remove

Values = dict[str, Any]

COPIES = Path(".dvc/tmp/copies")
LOGS = Path("reports/experiments")


@dataclass(frozen=True)
class Step:
    """A run of DVC up to `targets`, after the steps that it `needs`: an experiment, or what several share."""

    name: str
    changes: Values
    targets: tuple[str, ...]
    needs: tuple[str, ...]
    shared: bool = False


@dataclass(frozen=True)
class Version:
    """A version of the project: the commit that experiments belong to, and a commit with the files."""

    commit: str
    files: str

    @classmethod
    def named(cls, revision: str | None) -> Version:
        """What a tag, branch or commit holds. None: the last commit and what is changed about it since."""
        try:
            wanted = f"{revision or 'HEAD'}^{{commit}}"
            commit = git("rev-parse", "--verify", "--end-of-options", wanted).strip()
            if revision or not git("status", "--porcelain", "--untracked-files=no"):
                return cls(commit, commit)
            return cls(commit, git("stash", "create").strip())
        except UserError as error:
            if revision:
                raise UserError(
                    f"code = {revision}: {error}; name a tag or a commit of this project"
                ) from None
            raise UserError(f"no commit to experiment on ({error}); commit the project first") from None

    def code(self, root: Path) -> str:
        """The hashes of dvc.yaml and of all code that it names, for a version whose files lie in `root`."""
        return git("ls-tree", self.files, "--", PIPELINE.name, *Stages(root / PIPELINE).code())

    @contextlib.contextmanager
    def copy(self, folder: Path) -> Iterator[None]:
        """A clone with this version's files, in a new folder, which lasts for the block."""
        listed = git("config", "--list").splitlines()
        own = [line for line in listed if line.startswith(("user.name=", "user.email="))]
        who = [word for line in own for word in ("--config", line)]
        try:
            git("clone", "--quiet", "--shared", "--no-checkout", *who, ".", str(folder))
            git("checkout", "--quiet", "--detach", self.commit, folder=folder)
            if self.files != self.commit:  # a clone of a shallow clone does not share its objects
                git("fetch", "--quiet", "--no-write-fetch-head", str(Path.cwd()), self.files, folder=folder)
            source = f"--source={self.files}"
            git("restore", "--quiet", source, "--staged", "--worktree", "--", ".", folder=folder)
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def run(self, step: Step, on_line: Callable[[str], None], stop: threading.Event) -> float | None:
        """Run a step beside the workspace, its output kept in `LOGS`; returns the CPU seconds that it took.

        Of an experiment its commit is taken over; what stages made is in the cache in any case.
        """
        LOGS.mkdir(parents=True, exist_ok=True)
        words = ("exp", "run", "--name", step.name, *overrides(step.changes), *step.targets)
        folder, log = COPIES / step.name, LOGS / f"{step.name}.log"
        with self.copy(folder), snapshots(step.name) as kept:
            _share_cache(folder)
            kept["DVC_SITE_CACHE_DIR"] = str((folder / ".dvc/tmp/site").absolute())
            dvc(*words, on_line=on_line, folder=folder, log=log, stop=stop, environment=kept)
            if not step.shared:
                self.fetch(str(folder), step.name)
        return float(log.read_text(encoding="utf-8", errors="replace").rpartition(CPU_SECONDS)[2])

    def results(self) -> dict[str, str]:
        """The references of the finished experiments of this and other versions, by name."""
        return results()

    def fetch(self, source: str, name: str) -> None:
        """Take a finished experiment over from another clone."""
        made = f"{EXPERIMENTS}/{self.commit[:2]}/{self.commit[2:]}/{name}"
        git("fetch", "--quiet", "--no-auto-gc", "--no-write-fetch-head", source, f"{made}:{made}")


@contextlib.contextmanager
def snapshots(name: str) -> Iterator[dict[str, str]]:
    """Variables that let a run in a copy of the project keep its snapshots outside of it.

    They are removed when the block succeeds; otherwise the next run of that name goes on from them.
    """
    folder = (RESUME / "experiments" / name).absolute()
    yield {RESUME_FOLDER: str(folder)}
    remove(folder)


def _share_cache(folder: Path) -> None:
    """Let a clone have the project's own settings of DVC, and its cache."""
    own = configparser.ConfigParser(interpolation=None)
    own.read(".dvc/config.local", encoding="utf-8")
    if not own.has_section("cache"):
        own.add_section("cache")
    from dvc.repo import Repo

    with Repo() as repo:
        own["cache"]["dir"] = str(Path(repo.cache.local_cache_dir).absolute())
    with (folder / ".dvc/config.local").open("w", encoding="utf-8") as settings:
        own.write(settings)
