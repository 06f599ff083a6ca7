"""The flow `experiments`: a sweep over params, run as DVC experiments. `python -m flows.experiments`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows import dvc, pipeline, runtime
from flows.pool import Pool
from flows.sweep import (
    PRESETS,
    Experiment,
    Preset,
    grids,
    plan,
    points,
    read_grids,
    steps,
    words_to_grid,
)
from flows.version import COPIES, LOGS, Step, Version
from prelar.config import PARAMS, parse_yaml
from prelar.envs.names import checked_config
from prelar.report.provenance import flatten
from prelar.report.results import Results
from prelar.report.runs import find_runs
from prelar.utils import files
from prelar.utils.errors import UserError, one_line

Place = Literal["here", "pool"]
GridForm = pipeline.several_of_each()
UNCHANGED = GridForm()
PACE = 1.0
POOL_RUNS = 64
COLUMNS = ("success_rate", "prediction_error")
RESULTS = Path("results")
_WITHOUT_CODE = "results: needs code, the tag or commit whose code the results are of"


@flow(name="experiments")
def experiments(
    preset: Preset | None = None,
    grid: GridForm = UNCHANGED,  # type: ignore[valid-type]
    more: list[dict[str, list[Any]]] | None = None,
    workers: Annotated[int, Field(ge=1, le=64)] = 2,
    place: Place = "here",
    code: str | None = None,
    results: str | None = None,
) -> dict[str, str]:
    """Run the experiments of a sweep that have no result yet. Returns the state of each.

    Args:
        preset: A predefined sweep. None: only the grid.
        grid: Values for the keys of params.yaml; every combination is an experiment. A key here overrides
            the preset's. Empty fields keep the value in params.yaml.
        more: Further grids, with any dotted keys, such as scales.smoke.pretrain.steps.
        workers: Number of experiments that run at the same time on this machine.
        place: Where they run: on this machine (here), or on the workers of the pool.
        code: Tag or commit whose code and params.yaml are used. None: the project as it is now.
        results: With `code`: table for the results, such as results/NAME.csv, which `prelar report` reads.
            Runs that are in it are not run again.
    """
    if results and not code:
        raise UserError(_WITHOUT_CODE)
    with files.exclusive("experiments"):
        files.remove(COPIES)
        version = Version.named(code)
        wanted = plan(grids(preset, grid.model_dump(), more), version)  # type: ignore[attr-defined]
        table = ResultsTable(Path(results), wanted, version) if results and code else None
        if place == "pool":
            return Sweep(wanted, Pool(version, whole=code is not None), table).run(POOL_RUNS)
        return Sweep(wanted, version, table).run(workers)


@task(name="experiment", task_run_name="{step.name}", cache_policy=NO_CACHE)
def run_step(step: Step, sweep: Sweep) -> None:
    """Run an experiment, or shared stages, with its output as the task's log."""
    sweep.states[step.name] = "running"
    try:
        sweep.cpu_seconds[step.name] = sweep.place.run(step, get_run_logger().info, sweep.stop)
    except BaseException as error:
        sweep.states[step.name], sweep.errors[step.name] = "failed", one_line(error)
        raise
    sweep.states[step.name] = "done"


class ResultsTable:
    """The results of a sweep over the code of a tag or commit, in a table that grows as runs end."""

    def __init__(self, path: Path, wanted: list[Experiment], version: Version) -> None:
        """Go on with the table at `path`. Raises `UserError` where it is of other code."""
        self.path = path
        if path.exists():
            self.results = Results.read(path)
        else:
            params = flatten(parse_yaml(dvc.git("show", f"{version.commit}:./{PARAMS}")))
            self.results = Results(commit=version.commit, params=params)
        kept, named = self.results.commit, version.commit
        if kept != named:
            raise UserError(
                f"{path}: has results of {kept[:10]}, not of {named[:10]}; go on with "
                f"`--code {kept[:10]}`, or name another table"
            )
        self.results.changes |= {one.name: one.changes for one in wanted}

    def update(self, sweep: Sweep) -> None:
        """Take in what has ended since the last call, and what it took."""
        results = self.results
        for name, seconds in dict(sweep.cpu_seconds).items():
            if seconds is not None:
                results.cpu_seconds[name] = seconds
        for name in results.changes:
            if sweep.states.get(name) == "failed":
                results.failed[name] = sweep.errors.get(name, "not started, for what it needs failed")
            elif sweep.states.get(name) == "done" and name not in results.runs:
                results.add(*find_runs([name]))
        results.write(self.path)


class Sweep:
    """One run of a sweep in a place, and what is known of its steps; `stop` ends those that run."""

    def __init__(
        self, wanted: list[Experiment], place: Version | Pool, table: ResultsTable | None = None
    ) -> None:
        done = place.results().keys() | (table.results.runs.keys() if table else set())
        self.place, self.table, self.stop = place, table, threading.Event()
        self.states = {one.name: "done" if one.name in done else "waiting" for one in wanted}
        self.errors: dict[str, str] = {}
        self.cpu_seconds: dict[str, float | None] = {}
        self._wanted = {one.name: one for one in wanted}
        self._seen: dict[str, str] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        progress = create_progress_artifact(0.0, key="sweep-progress", description="Experiments done")
        self._progress = cast(UUID, progress)

    def run(self, workers: int) -> dict[str, str]:
        """Let Prefect run every step after those that it needs. Raises `UserError` where some failed."""
        todo = steps([one for one in self._wanted.values() if self.states[one.name] != "done"], workers)
        futures: dict[str, PrefectFuture[None]] = {}
        ended: list[PrefectFuture[None]] = []
        runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=workers)
        with runner, contextlib.ExitStack() as stack:
            stack.callback(self.stop.set)
            for step in todo:
                needs = [futures[name] for name in step.needs]
                futures[step.name] = runner.submit(run_step, {"step": step, "sweep": self}, wait_for=needs)
                futures[step.name].add_done_callback(ended.append)
            while len(ended) < len(todo):
                self._show()
                time.sleep(PACE)
        skipped: dict[str, list[str]] = {}
        for step in todo:
            if self.states.setdefault(step.name, "waiting") == "waiting":
                self.states[step.name] = "failed"
                failed = next(name for name in step.needs if self.states[name] == "failed")
                skipped.setdefault(failed, []).append(step.name)
        self._show()
        self._report_failures(skipped)
        return {name: self.states[name] for name in self._wanted}

    def _report_failures(self, skipped: dict[str, list[str]]) -> None:
        """Say what failed and why; `skipped`: what was not started, by the step that it needed."""
        for name, error in self.errors.items():
            log = LOGS / f"{name}.log"
            print(f"{name}: {error}" + (f"; {log} has its output" if log.exists() else ""), file=sys.stderr)
        for name, others in skipped.items():
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            print(f"{others[0]}{more}: not started, for {name} failed", file=sys.stderr)
        if failed := [name for name in self._wanted if self.states[name] == "failed"]:
            raise UserError(
                f"{len(failed)} of {len(self._wanted)} experiments failed ({', '.join(failed[:3])}); "
                "start the sweep again to run them again"
            )

    def _show(self) -> None:
        """Show the states, as lines and in the Prefect UI, where they changed."""
        states = dict(self.states)
        if states == self._seen:
            return
        for name, state in states.items():
            if self._seen.get(name) != state != "waiting":
                get_run_logger().info("%s: %s", name, state)
                print(f"{state:8} {name}", flush=True)
        self._seen = states
        if self.table:
            self.table.update(self)
        keys = list(dict.fromkeys(itertools.chain(*(one.changes for one in self._wanted.values()))))
        rows = []
        for name, one in self._wanted.items():
            if states[name] == "done" and name not in self._metrics:
                row = self.table.results.runs.get(name) if self.table else None
                self._metrics[name] = dict(row.metrics) if row else dvc.metrics(name)
            figures = {column: self._metrics.get(name, {}).get(column) for column in COLUMNS}
            changes = {key: one.changes.get(key) for key in keys}
            rows.append({"experiment": name, "state": states[name], **changes, **figures})
        ended = sum(row["state"] in ("done", "failed") for row in rows)
        update_progress_artifact(self._progress, 100.0 * ended / len(rows))
        create_table_artifact(rows, key="sweep", description=f"{ended} of {len(rows)} ended")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.experiments", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE,VALUE…",
        help="values for a key of params.yaml; every combination is an experiment",
    )
    parser.add_argument(
        "--file", type=Path, help="a grid, or a list of grids, in YAML or JSON: keys with lists of values"
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="a predefined sweep, whose keys KEY=… overrides"
    )
    parser.add_argument("--list", action="store_true", help="list the presets and exit")
    parser.add_argument("--dry-run", action="store_true", help="list the experiments and exit")
    parser.add_argument(
        "--workers", type=int, default=2, help="experiments that run at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--code", help="tag or commit whose code and params.yaml are used (default: the project as it is)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="CSV",
        help="with --code: table for the results (default: results/PRESET.csv)",
    )
    parser.add_argument(
        "--pool", action="store_true", help="run on the workers of the pool (python -m flows.pool)"
    )
    parser.epilog = "Starting a sweep again runs only what has no result yet."
    return parser.parse_args()


def main() -> None:
    """Run the sweep that the command line describes."""
    given = _arguments()
    if given.list:
        width = max(map(len, PRESETS))
        for name, (about, parts) in PRESETS.items():
            print(f"{name:{width}} {about} ({len(list(points(parts)))} experiments)")
        return
    checked_config()
    if not 1 <= given.workers <= 64:
        raise UserError(f"--workers = {given.workers}: choose 1 to 64")
    words = words_to_grid(given.words)
    more = read_grids(given.file) if given.file else []
    merged = grids(given.preset, words, more)
    wanted = plan(merged, Version.named(given.code))
    if given.dry_run:
        print("\n".join(experiment.name for experiment in wanted))
        return
    results = given.results
    if results is None and given.preset and given.code:
        results = RESULTS / f"{given.preset}.csv"
    if results and not given.code:
        raise UserError(_WITHOUT_CODE)
    if not (given.pool or results) and not {one.name for one in wanted} - dvc.results().keys():
        print(f"nothing to do: all {len(wanted)} experiments have a result")
        return
    place: Place = "pool" if given.pool else "here"
    with runtime.server():
        experiments(
            more=merged,
            workers=given.workers,
            place=place,
            code=given.code,
            results=str(results) if results else None,
        )


if __name__ == "__main__":
    runtime.run(main)
