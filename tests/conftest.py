"""Shared fixtures: a copy of the project in a folder of its own, at a size that runs in seconds."""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from prelar.config import Config

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: machines that test are busy

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "threads": 1,
    "sample": {"clips": 8},
    "ssv2": {"batch": 3},
    "demos": {"tasks": ["reach"], "episodes": 2, "workers": 1},
    "scales": {
        "smoke": {
            "pretrain": {
                "steps": 4,
                "batch": 2,
                "length": 6,
                "cnn_depth": 4,
                "hidden": 16,
                "deter": 16,
                "stoch": 4,
                "discrete": 4,
                "log_every": 2,
                "video_every": 4,
                "checkpoint_every": 2,
            },
            "finetune": {
                "env_steps": 60,
                "prefill": 30,
                "pretrain_updates": 2,
                "batch": 2,
                "length": 8,
                "freeze_updates": 1,
                "actor_after": 1,
                "bonus": 1.0,
                "action_repeat": None,
                "horizon": 3,
                "units": 16,
                "slow_every": 3,
                "replay": 200,
                "eval_every": 30,
                "eval_episodes": 1,
                "time_limit": 20,
                "checkpoint_every": 20,
            },
            "evaluate": {
                "episodes": 1,
                "random_episodes": 2,
                "time_limit": 8,
                "clips": 2,
                "observed": 2,
                "length": 6,
                "probe_episodes": 6,
                "probe_updates": 2,
                "offline_episodes": 4,
                "offline_updates": 2,
                "offline_batch": 2,
                "offline_seeds": 1,
            },
        }
    },
}


OUTPUT = ROOT / "tests/output"
MIGRATE = """
import asyncio
import flows
from prefect.server.database import provide_database_interface
asyncio.run(provide_database_interface().create_db())
"""
FIRST = ("tests/test_end_to_end.py",)


FORKED = [
    "prelar.envs.pixels",
    "prelar.evaluate",
    "prelar.simulator.page",
    "tests.control.toy_run",
    "tests.test_pretrain",
    "tests.toy",
    "tests.utils.test_synchronised",
    "torch._dynamo",
]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have one process import what all forked ones need: whoever forks first would decide for the others."""
    if any(hasattr(getattr(item, "module", None), "PROCESSES") for item in session.items):
        multiprocessing.set_forkserver_preload(FORKED)
        multiprocessing.forkserver.ensure_running()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of them keeps one worker at work in the end."""
    items.sort(key=lambda item: str(item.path.relative_to(ROOT)) not in FIRST)


@functools.cache
def prefect_home() -> Path:
    """A folder with the empty data base of a Prefect server, to be copied; a server takes seconds to make it.

    It is made once for each version of Prefect, by the first process of the tests that asks.
    """
    home = OUTPUT / f"prefect-{importlib.metadata.version('prefect')}"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "prefect.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.is_dir():
            with tempfile.TemporaryDirectory(dir=OUTPUT) as made:
                settings = os.environ | {"PREFECT_HOME": made}
                subprocess.run([sys.executable, "-c", MIGRATE], cwd=ROOT, env=settings, check=True)
                shutil.copytree(made, home)
    return home


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set the leaves of `changes` in `tree`."""
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(tree[key], value)
        else:
            tree[key] = value


class Spy:
    """A config that remembers which of its keys were read."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.cfg, name)


@dataclass(frozen=True)
class Project:
    """A copy of the project."""

    root: Path

    def edit(self, **changes: Any) -> None:
        """Change params.yaml, keeping its layout."""
        yaml = YAML()
        path = self.root / "params.yaml"
        params = yaml.load(path.read_text(encoding="utf-8"))
        merge(params, changes)
        with path.open("w", encoding="utf-8") as handle:
            yaml.dump(params, handle)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user who has activated the project's."""
        gone = ("PYTHONDONTWRITEBYTECODE", "PREFECT_HOME", "PREFECT_API_URL")
        kept = {key: value for key, value in os.environ.items() if key not in gone}
        return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(
        self, *command: str, timeout: float = 600, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user would, in the project and with its environment active."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode != 0:
            told = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            pytest.fail(f"{' '.join(command)} ended with {done.returncode}\n{told}")
        return done


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Project]:
    """Copy the files that git would carry into a folder, shrink the presets and commit."""

    @functools.cache
    def template() -> Path:
        root = tmp_path_factory.mktemp("template") / "project"
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        shutil.copytree(prefect_home(), root / ".prefect")
        project = Project(root)
        project.edit(**TINY)
        project.run("git", "init", "-q", "-b", "main")
        project.run("git", "config", "user.email", "tests@localhost")
        project.run("git", "config", "user.name", "tests")
        project.run("git", "add", "-A")
        project.run("git", "commit", "-q", "-m", "Start from a fresh clone")
        return root

    def make(root: Path) -> Project:
        shutil.copytree(template(), root, dirs_exist_ok=True)
        return Project(root)

    return make
