"""Sweeps on several machines: workers in clones of the project take experiments from a Prefect work pool.

Git's `origin` and DVC's default remote carry results between the clones. `python -m flows.pool` is a worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.deployments.runner import EntrypointType
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Cancelling, Crashed

from flows import runtime
from flows.dvc import EXPERIMENTS, dvc, git, overrides, results
from flows.version import Step, Version, snapshots
from prelar.config import load_config
from prelar.utils.errors import UserError

POOL = "prelar"
CLONE = "PRELAR_CLONE"
DEPLOYMENT = "worker"
PACE = 3.0
SILENCE = 600.0
"""Seconds after which a run that gives no sign of life is lost; Prefect gives one each 180."""


@flow(name="experiment")
def experiment(
    name: str, changes: dict[str, Any], revision: str, targets: tuple[str, ...] = (), shared: bool = False
) -> str:
    """Run an experiment in the worker's clone and push its results. Returns its name.

    Args:
        name: Name of the experiment.
        changes: Changes to the keys of params.yaml at the revision.
        revision: The commit that the experiment is based on.
        targets: Stages to run, with the stages that they need. Empty: the whole pipeline.
        shared: True for stages that several experiments share, which are no experiment themselves.
    """
    logger = get_run_logger()
    os.chdir(os.environ[CLONE])
    git("fetch", "--quiet", "origin")
    try:
        git("checkout", "--quiet", "--detach", revision)
    except UserError as error:
        raise UserError(f"{error}; push the commit to the origin of the workers' clones") from None
    load_config()
    if name not in results():
        words = ("exp", "run", "--temp", "--pull", "--name", name, *overrides(changes), *targets)
        with snapshots(name) as kept:
            dvc(*words, on_line=logger.info, environment=kept)
    dvc("exp", "push", "--run-cache", "origin", name, on_line=logger.info)
    if shared:
        dvc("exp", "remove", "--git-remote", "origin", name)
    return name


class Pool:
    """The workers of the pool as the place where a version's experiments run."""

    def __init__(self, version: Version, *, whole: bool) -> None:
        """Make pool and deployment known to the server; `whole` where the version is all in its commit.

        Raises `UserError` where it is not.
        """
        if not whole and git("status", "--porcelain", "--untracked-files=no", "--", ":/", *_RESULTS):
            raise UserError(
                "the project has changes that are not committed, which workers would lack; commit them"
            )
        self._version = version
        self._origin = "origin" in git("remote").split()
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        made = experiment.to_deployment(
            DEPLOYMENT, work_pool_name=POOL, entrypoint_type=EntrypointType.MODULE_PATH
        )
        cast(Any, made).apply()

    def results(self) -> dict[str, str]:
        """The references of the finished experiments, after fetching those of `origin` where there is one."""
        if self._origin:
            fetch_results()
        return results()

    def run(self, step: Step, on_line: Callable[[str], None], stop: threading.Event) -> float | None:
        """Let the next worker that is free run a step, and wait for it; `stop` cancels it.

        What it took of the worker's machine is not known, None. Raises `UserError` where the run fails, or
        gives no sign of life any more, as after its machine was switched off.
        """
        given = asdict(step) | {"revision": self._version.commit}
        del given["needs"]
        run = cast(
            FlowRun,
            run_deployment(f"experiment/{DEPLOYMENT}", parameters=given, flow_run_name=step.name, timeout=0),
        )
        on_line(f"flow run {run.id}, for the next free worker (python -m flows.pool)")
        heartbeat = EventNameFilter(name=["prefect.flow-run.heartbeat"])
        resource = EventResourceFilter(id=[f"prefect.flow-run.{run.id}"])
        last: list[UUID] = []
        seen = time.monotonic()
        with get_client(sync_client=True) as client:
            while not ((state := client.read_flow_run(run.id).state) and state.is_final()):
                if stop.wait(PACE):
                    client.set_flow_run_state(run.id, Cancelling())
                    raise UserError(f"{step.name} was interrupted")
                if time.monotonic() < seen + SILENCE:
                    continue
                until_now = EventFilter(event=heartbeat, resource=resource)
                latest = [event.id for event in client.read_events(until_now, limit=1).events]
                if latest and latest == last:
                    lost = f"its worker has been silent for {SILENCE:.0f} s; start the sweep again"
                    client.set_flow_run_state(run.id, Crashed(message=lost), force=True)
                    raise UserError(f"flow run {run.id}: {lost}")
                last, seen = latest, time.monotonic()
        if not state.is_completed():
            raise UserError(f"its flow run {run.id} is {state.name}: {state.message}")
        if self._origin and not step.shared:
            self._version.fetch("origin", step.name)
        return None


def fetch_results() -> None:
    """Take over the finished experiments that `origin` has. One that ran here as well stays as it is."""
    listed = git("ls-remote", "origin", f"{EXPERIMENTS}/*").splitlines()
    new = {line.split("\t")[1] for line in listed} - set(results().values())
    if new:
        git("fetch", "--quiet", "origin", *(f"{ref}:{ref}" for ref in sorted(new)))


_RESULTS = [":(top,exclude)dvc.lock", ":(top,exclude)metrics.json"]


def main() -> None:
    """Run experiments from the pool in this clone, one at a time, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m flows.pool", description=main.__doc__)
    parser.add_argument("--name", help="name of this worker in the UI")
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
    # Prefect's worker ends on SIGTERM by a SIGINT to itself, which a script's background job ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.execv(sys.executable, [sys.executable, "-m", "prefect", *words])


if __name__ == "__main__":
    runtime.run(main)
