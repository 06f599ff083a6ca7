"""The flow `experiments`: a sweep over params as queued DVC experiments. `python -m flows.experiments`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast, get_args
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from pydantic import Field

from flows import dvc, pipeline, runtime
from flows.dvc import Entry, Log, Queue
from flows.pool import Pool
from prelar.config import PARAMS, Config, parse_config, parse_yaml, read_yaml
from prelar.envs.names import check_names, checked_config
from prelar.stages import PIPELINE, Stages
from prelar.utils import files
from prelar.utils.errors import UserError

Values = dict[str, Any]
Grid = Mapping[str, list[Any]]
Preset = Literal["demos", "ssv2", "action-representation", "beta-a"]
Part = tuple[str, str]
"""A stage and the digest of all that its outputs follow from."""

NAME_KEYS = ("method", "dataset", "task", "seed")
METHODS: list[Any] = list(get_args(Config.model_fields["method"].annotation))
TASKS: list[Any] = [
    "lever-pull",
    "drawer-open",
    "door-lock",
    "button-press-topdown-wall",
    "reach",
    "dial-turn",
]
SEEDS: list[Any] = list(range(8))
_EVERY: Grid = {"task": TASKS, "seed": SEEDS}

PRESETS: Mapping[str, tuple[str, tuple[Grid, ...]]] = MappingProxyType(
    {
        "demos": (
            "The methods after pre-training on RLBench, on six tasks with eight seeds",
            ({"method": METHODS, "dataset": ["demos"], **_EVERY},),
        ),
        "ssv2": (
            "The methods after pre-training on Something-Something V2, on six tasks with eight seeds",
            ({"method": METHODS, "dataset": ["ssv2"], **_EVERY},),
        ),
        "action-representation": (
            "PreLAR; without consistency; without consistency and action KL, its latent action a point",
            (
                {"method": ["prelar"], **_EVERY},
                {"method": ["prelar"], "beta_c": [0], **_EVERY},
                {
                    "method": ["prelar"],
                    "beta_c": [0],
                    "beta_a": [0],
                    "action_kind": ["deterministic"],
                    **_EVERY,
                },
            ),
        ),
        "beta-a": (
            "PreLAR with the action KL weighted from 0.01 to 10",
            ({"method": ["prelar"], "beta_a": [0.01, 0.1, 1.0, 10.0], **_EVERY},),
        ),
    }
)


@dataclass(frozen=True)
class Experiment:
    """One point of a sweep: `changes` to params.yaml, and the `parts` that its stages make."""

    name: str
    changes: Values
    parts: frozenset[Part]


def words_to_grid(words: Iterable[str]) -> dict[str, list[Any]]:
    """Words such as `seed=0,1,2` as a grid. Raises `UserError` for any other word."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        key, found, text = word.partition("=")
        try:
            values = parse_yaml(f"[{text}]") if found else []
        except ValueError:
            values = []
        if not values:
            raise UserError(f"{word}: not a sweep over a key; write it like seed=0,1,2")
        grid[key] = values
    return grid


def read_grids(path: Path) -> list[dict[str, list[Any]]]:
    """The grids of a YAML or JSON file: a mapping from keys to values, or a list of such mappings."""
    held = read_yaml(path)
    grids = held if isinstance(held, list) else [held]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"{path}: holds no sweep; write keys with lists of values, such as seed: [0, 1, 2]")
    return [
        {str(key): value if isinstance(value, list) else [value] for key, value in grid.items()}
        for grid in grids
    ]


def points(grids: Iterable[Grid]) -> Iterator[Values]:
    """Every combination of each grid."""
    for grid in grids:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def plan(grids: Iterable[Grid], state: str, root: Path = Path()) -> list[Experiment]:
    """The experiments of a sweep over the project in `root`, checked, each once, in the order of the grids.

    `state` names the project's code: the same params of other code are another experiment. Raises
    `UserError` where a combination is no valid params.yaml.
    """
    base, stages = read_yaml(root / PARAMS), Stages(root / PIPELINE)
    found: dict[str, Experiment] = {}
    for changes in points(grids):
        config = parse_config(changed(base, changes))
        check_names(config)
        values = config.model_dump(mode="json")
        identity = _digest([state, values])
        parts = frozenset(stages.fingerprints(values).items())
        found.setdefault(identity, Experiment(_name(values, changes, identity), changes, parts))
    return list(found.values())


def changed(base: Values, changes: Values) -> Values:
    """The values of params.yaml with dotted keys changed. Unknown keys are left to the check."""
    values = copy.deepcopy(base)
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                raise UserError(f"{key}: unknown key; {name} is no group of keys")
        group[last] = value
    return values


def _name(values: Values, changes: Values, identity: str) -> str:
    shown = [str(values[key]) for key in NAME_KEYS]
    shown += [f"{key.split('.')[-1]}-{value}" for key, value in changes.items() if key not in NAME_KEYS]
    return re.sub(r"[^A-Za-z0-9.-]+|\.(?=\.|-|$)", "-", "-".join([*shown, identity[:10]]))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class Gate:
    """Lets experiments through so that no two make the same part at once: the first makes it, the others
    wait until it is made and find it in DVC's cache."""

    making: dict[Part, str] = dataclasses.field(default_factory=dict)
    made: set[Part] = dataclasses.field(default_factory=set)

    def admits(self, experiment: Experiment) -> bool:
        """Whether nothing that the experiment needs is being made."""
        return not experiment.parts & self.making.keys()

    def enter(self, experiment: Experiment) -> None:
        """The experiment starts and makes what is not made yet."""
        self.making |= dict.fromkeys(experiment.parts - self.made, experiment.name)

    def passed(self, experiment: Experiment, stages: Iterable[str]) -> None:
        """The experiment's outputs of some stages are made."""
        names = set(stages)
        done = {part for part in experiment.parts if part[0] in names}
        self.made |= done
        for part in done:
            self.making.pop(part, None)

    def leave(self, experiment: Experiment, succeeded: bool) -> None:
        """The experiment ended; what it failed to make is left to the next."""
        if succeeded:
            self.made |= experiment.parts
        self.making = {part: name for part, name in self.making.items() if name != experiment.name}


Place = Literal["queue", "pool"]
GridForm = pipeline.several_of_each()
UNCHANGED = GridForm()
PACE = 1.0
RESTART = 30.0
COLUMNS = ("success_rate", "prediction_error")
ENDED = ("done", "failed")
STAGE = re.compile(r"[Ss]tage '(\w+)'")


class Board:
    """What is known about each experiment, for the threads that show it."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._closed = threading.Event()

    def update(self, entries: dict[str, Entry]) -> None:
        """Show entries as they are now."""
        self._entries = entries

    def close(self) -> None:
        """Let everyone know that the sweep ends before its experiments."""
        self._closed.set()

    def entry(self, name: str) -> Entry:
        """How an experiment fares. Raises `UserError` once the sweep was interrupted."""
        if self._closed.wait(PACE / 2):
            raise UserError(f"{name}: withdrawn, for the sweep was interrupted; start it again to go on")
        return self._entries[name]


@task(name="experiment", task_run_name="{name}", cache_policy=NO_CACHE)
def follow(name: str, board: Board) -> dict[str, float]:
    """Show an experiment's output until it ends; returns its metrics."""
    logger, log = get_run_logger(), Log()
    last = ""
    while True:
        entry = board.entry(name)
        for line in log.fresh(entry.log):
            logger.info(line)
            last = line if not line.startswith(" ") else last
        if entry.state == "done":
            return dvc.metrics(name)
        if entry.state == "failed":
            raise UserError(f"{name} failed: {last or 'no output'}; dvc queue logs {name} has all of it")


@flow(name="experiments")
def experiments(
    preset: Preset | None = None,
    grid: GridForm = UNCHANGED,  # type: ignore[valid-type]
    more: list[dict[str, list[Any]]] | None = None,
    workers: Annotated[int, Field(ge=1, le=64)] = 2,
    place: Place = "queue",
) -> dict[str, str]:
    """Run what a sweep lacks, as DVC experiments; returns the state of each.

    Args:
        preset: A sweep of the papers. None: the grid alone.
        grid: Values for the keys of params.yaml; every combination is an experiment. A key here takes the
            place of the preset's. What is left empty stays as params.yaml has it.
        more: Several grids at once, of any keys, such as scales.smoke.pretrain.steps.
        workers: Experiments at once in DVC's queue.
        place: Where they run: in DVC's queue on this machine, or with the workers of the pool on any.
    """
    state = dvc.state_of_code()
    wanted = plan(grids(preset, grid.model_dump(), more), state)  # type: ignore[attr-defined]
    with files.exclusive("experiments"):
        return Sweep(wanted, Pool() if place == "pool" else Queue(workers), state).run()


def grids(
    preset: str | None, grid: dict[str, list[Any]], more: list[dict[str, list[Any]]] | None
) -> list[dict[str, list[Any]]]:
    """The grids of a preset or of `more`, each with the keys of `grid` in the place of its own."""
    given = [*(PRESETS[preset][1] if preset else ()), *(more or ())]
    return [{**one, **grid} for one in given or [{}]]


class Sweep:
    """One run of a sweep: lets experiments into the queue, follows them and shows the whole."""

    def __init__(self, wanted: list[Experiment], queue: Queue | Pool, state: str) -> None:
        self._wanted = {experiment.name: experiment for experiment in wanted}
        self._queue = queue
        self._before = (state, read_yaml(PARAMS))
        self._states = dict.fromkeys(self._wanted, "waiting")
        self._gate, self._board = Gate(), Board()
        self._logs = {name: Log() for name in self._wanted}
        self._follow: dict[str, PrefectFuture[Any]] = {}
        self._above = _ancestors(self._before[1])
        self._started = 0.0
        self._changed = False

    def run(self) -> dict[str, str]:
        """Work until every experiment has ended. Raises `UserError` where one failed or was not started."""
        for name in self._queue.results() & self._wanted.keys():
            self._end(name, "done")
        self._enter(self._queue.entries())
        shown = Shown(self._wanted)
        try:
            while not self._over():
                shown.update(self._states)
                self._step()
                time.sleep(PACE)
        except BaseException:
            self._board.close()
            self._queue.withdraw({name for name, state in self._states.items() if state not in ENDED})
            raise
        finally:
            shown.update(self._states)
        for future in self._follow.values():
            future.wait()
        self._complain()
        return self._states

    def _enter(self, entries: dict[str, Entry]) -> None:
        """Take up what an earlier run of the sweep left in the queue."""
        for name in [name for name, state in self._states.items() if state == "waiting"]:
            if name in entries and entries[name].state in ("queued", "running"):
                self._gate.enter(self._wanted[name])
                self._states[name] = entries[name].state

    def _over(self) -> bool:
        left = {state for state in self._states.values() if state not in ENDED}
        return not left or (self._changed and left == {"waiting"})

    def _step(self) -> None:
        """See how the experiments fare, and let the next one into the queue."""
        entries = self._queue.entries()
        self._queue.clear_lost({name: entries[name] for name in entries.keys() & self._wanted.keys()})
        self._board.update(entries)
        for name, state in self._states.items():
            if state not in ("waiting", *ENDED) and name in entries:
                self._see(name, entries[name])
        if "queued" in self._states.values() and time.monotonic() - self._started > RESTART:
            self._start()
        waiting = (name for name, state in self._states.items() if state == "waiting")
        if admitted := next((name for name in waiting if self._gate.admits(self._wanted[name])), None):
            self._put(admitted)

    def _see(self, name: str, entry: Entry) -> None:
        """Note how one experiment fares, and which stages it has passed."""
        for line in self._logs[name].fresh(entry.log):
            for stage in STAGE.findall(line):
                self._gate.passed(self._wanted[name], self._above.get(stage, ()))
        if entry.state != "queued" and name not in self._follow:
            self._follow[name] = follow.submit(name, self._board)
        self._states[name] = entry.state
        if entry.state in ENDED:
            self._end(name, entry.state)

    def _put(self, name: str) -> None:
        if (dvc.state_of_code(), read_yaml(PARAMS)) != self._before:
            self._changed = True
            return
        self._gate.enter(self._wanted[name])
        self._queue.put(name, self._wanted[name].changes)
        self._states[name] = "queued"
        self._start()

    def _start(self) -> None:
        self._queue.start()
        self._started = time.monotonic()

    def _end(self, name: str, state: str) -> None:
        self._states[name] = state
        self._gate.leave(self._wanted[name], succeeded=state == "done")

    def _complain(self) -> None:
        failed = [name for name, state in self._states.items() if state == "failed"]
        waiting = [name for name, state in self._states.items() if state == "waiting"]
        if waiting:
            raise UserError(
                f"code or params.yaml changed while the sweep ran, so {len(waiting)} did not start; "
                "put the change back, or start the sweep again with it"
            )
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self._states)} experiments failed ({', '.join(failed[:3])}); "
                "dvc queue logs NAME says why; start the sweep again to run them again"
            )


def _ancestors(values: dict[str, Any]) -> dict[str, set[str]]:
    """For each stage, every stage that comes before it."""
    above = Stages().upstream(values)
    for _ in range(len(above)):
        above = {
            name: found.union(*(above[other] for other in found)) if found else found
            for name, found in above.items()
        }
    return above


class Shown:
    """The sweep's table and progress in the Prefect UI."""

    def __init__(self, wanted: dict[str, Experiment]) -> None:
        self._wanted = wanted
        self._seen: dict[str, str] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        made = create_progress_artifact(0.0, key="sweep-progress", description="Experiments done")
        self._progress = cast(UUID, made)

    def update(self, states: dict[str, str]) -> None:
        """Show the states, if they changed."""
        if states == self._seen:
            return
        logger = get_run_logger()
        for name, state in states.items():
            if self._seen.get(name) != state != "waiting":
                logger.info("%s: %s", name, state)
                print(f"{state:8} {name}", flush=True)
        self._seen = dict(states)
        for name, state in states.items():
            if state == "done" and name not in self._metrics:
                self._metrics[name] = dvc.metrics(name)
        ended = sum(state in ENDED for state in states.values())
        update_progress_artifact(self._progress, 100.0 * ended / len(states))
        create_markdown_artifact(
            self._table(states), key="sweep", description=f"{ended} of {len(states)} ended"
        )

    def _table(self, states: dict[str, str]) -> str:
        keys = list(dict.fromkeys(itertools.chain(*(one.changes for one in self._wanted.values()))))
        head = ["experiment", "state", *keys, *COLUMNS]
        rows = [head, ["---"] * len(head)]
        for name, state in states.items():
            measured = self._metrics.get(name, {})
            values = [str(self._wanted[name].changes.get(key, "")) for key in keys]
            figures = [f"{measured[column]:.4g}" if column in measured else "" for column in COLUMNS]
            rows.append([f"`{name}`", state, *values, *figures])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.experiments", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE,VALUE…",
        help="values for keys of params.yaml; each combination is an experiment",
    )
    parser.add_argument(
        "--file", type=Path, help="YAML or JSON: keys with lists of values, or a list of such"
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="a sweep of the papers; KEY=… narrows it")
    parser.add_argument("--list", action="store_true", help="list the presets and exit")
    parser.add_argument("--dry-run", action="store_true", help="list the experiments and exit")
    parser.add_argument("--workers", type=int, default=2, help="experiments at once (default: %(default)s)")
    parser.add_argument("--pool", action="store_true", help="let workers run them (python -m flows.pool)")
    parser.epilog = "A sweep that is started again runs only what has no result yet."
    return parser.parse_args()


def main() -> None:
    """Run the sweep that the command line describes."""
    given = _arguments()
    if given.list:
        for name, (about, parts) in PRESETS.items():
            print(f"{name:22} {about} ({len(list(points(parts)))} experiments)")
        return
    checked_config()
    if not 1 <= given.workers <= 64:
        raise UserError(f"--workers = {given.workers}: choose 1 to 64")
    words = words_to_grid(given.words)
    more = read_grids(given.file) if given.file else []
    merged = grids(given.preset, words, more)
    state = dvc.state_of_code()
    wanted = plan(merged, state)
    if given.dry_run:
        print("\n".join(experiment.name for experiment in wanted))
        return
    if not given.pool and not {experiment.name for experiment in wanted} - dvc.results():
        print(f"nothing to do: all {len(wanted)} experiments have a result")
        return
    with runtime.server():
        experiments(more=merged, workers=given.workers, place="pool" if given.pool else "queue")


if __name__ == "__main__":
    runtime.run(main)
