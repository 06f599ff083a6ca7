"""Sweeps on several machines: workers in clones of the project take experiments from a Prefect work pool.

Git's `origin` and DVC's default remote carry results between the clones. `python -m flows.pool` is a worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Cancelling

from flows import runtime
from flows.dvc import EXPERIMENTS, Entry, dvc, git, overrides, results
from prelar.config import load_config
from prelar.utils.errors import UserError

POOL = "prelar"
CLONE = "PRELAR_CLONE"
DEPLOYMENT = "worker"
PAGE = 200
STATES = {
    StateType.SCHEDULED: "queued",
    StateType.PENDING: "queued",
    StateType.COMPLETED: "done",
    StateType.FAILED: "failed",
    StateType.CRASHED: "failed",
    StateType.CANCELLED: "failed",
}


@flow(name="experiment")
def experiment(name: str, changes: dict[str, Any], revision: str) -> str:
    """Run one experiment in the worker's clone and push what it made; returns its name.

    Args:
        name: What the experiment is called.
        changes: Changes to the keys of params.yaml at the revision.
        revision: The commit that it is an experiment on.
    """
    logger = get_run_logger()
    os.chdir(os.environ[CLONE])
    git("fetch", "--quiet", "origin")
    git("checkout", "--quiet", "--detach", revision)
    load_config()
    if name not in results():
        dvc("exp", "run", "--temp", "--pull", "--name", name, *overrides(changes), tell=logger.info)
    dvc("exp", "push", "--run-cache", "origin", name, tell=logger.info)
    return name


class Pool:
    """The experiments that workers of the pool take, in the place of DVC's queue."""

    def __init__(self) -> None:
        """Make pool and deployment known to the server. Raises `UserError` where the commit is not all."""
        if git("status", "--porcelain", "--untracked-files=no", "--", ":/", *_RESULTS):
            raise UserError(
                "the project has changes that are not committed, which workers would lack; commit them"
            )
        self._revision = git("rev-parse", "HEAD").strip()
        self._runs: dict[str, UUID] = {}
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        made = experiment.to_deployment(
            DEPLOYMENT, work_pool_name=POOL, entrypoint_type=EntrypointType.MODULE_PATH
        )
        cast(Any, made).apply()

    def results(self) -> set[str]:
        """The names of the finished experiments, after fetching those of `origin` where there is one."""
        if "origin" in git("remote").split():
            git("fetch", "--quiet", "origin", f"{EXPERIMENTS}/*:{EXPERIMENTS}/*")
        return results()

    def put(self, name: str, changes: dict[str, Any]) -> None:
        """Let the next worker that is free run an experiment."""
        parameters = {"name": name, "changes": changes, "revision": self._revision}
        run = run_deployment(f"experiment/{DEPLOYMENT}", parameters=parameters, flow_run_name=name, timeout=0)
        self._runs[name] = cast(FlowRun, run).id

    def start(self) -> None:
        """Workers start by themselves."""

    def entries(self) -> dict[str, Entry]:
        """How the experiments fare."""
        identities, runs = list(self._runs.values()), dict[UUID, FlowRun]()
        with get_client(sync_client=True) as client:
            for begin in range(0, len(identities), PAGE):
                some = FlowRunFilter(id=FlowRunFilterId(any_=identities[begin : begin + PAGE]))
                runs |= {run.id: run for run in client.read_flow_runs(flow_run_filter=some, limit=PAGE)}
        return {
            name: Entry(_state(runs[run]), Path(os.devnull))
            for name, run in self._runs.items()
            if run in runs
        }

    def clear_lost(self, entries: dict[str, Entry]) -> None:
        """Prefect finds out itself what has ended without a word."""

    def withdraw(self, names: set[str]) -> None:
        """Cancel what has not ended."""
        with get_client(sync_client=True) as client:
            for name in names & self._runs.keys():
                client.set_flow_run_state(self._runs[name], Cancelling())


_RESULTS = [":(top,exclude)dvc.lock", ":(top,exclude)metrics.json"]


def _state(run: FlowRun) -> str:
    return STATES.get(run.state_type, "running") if run.state_type else "queued"


def main() -> None:
    """Take experiments from the pool and run them in this clone, one at a time, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m flows.pool", description=main.__doc__)
    parser.add_argument("--name", help="the worker's name in the UI")
    given = parser.parse_args()
    url = os.environ.get(runtime.API)
    if not url or not runtime.answers(url):
        raise UserError(
            f"{runtime.API} = {url or 'not set'}: no Prefect server answers; name the one of make ui"
        )
    if not dvc("remote", "list"):
        raise UserError(
            "DVC has no remote to share results by; add one: dvc remote add --local -d shared PLACE"
        )
    here = str(Path().absolute())
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ |= {CLONE: here, "PYTHONPATH": os.pathsep.join(paths), "PREFECT_LOGGING_LEVEL": "INFO"}
    named = ["--name", given.name] if given.name else []
    words = ["worker", "start", "--pool", POOL, "--type", "process", "--limit", "1", *named]
    os.execv(sys.executable, [sys.executable, "-m", "prefect", *words])


if __name__ == "__main__":
    runtime.run(main)
