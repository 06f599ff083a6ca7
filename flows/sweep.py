"""What a sweep consists of: experiments over a grid of params, and what its experiments have in common."""

from __future__ import annotations

import copy
import dataclasses
import graphlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from prelar.config import PARAMS, Config, parse_config, parse_yaml, read_yaml
from prelar.errors import UserError
from prelar.names import check_names

Values = dict[str, Any]
Grid = Mapping[str, list[Any]]
Preset = Literal["rlbench", "ssv2", "action-representation", "beta-a"]
Part = tuple[str, str]
"""A stage and the digest of all that its outputs follow from."""

PIPELINE = Path("dvc.yaml")
NAMED = ("method", "dataset", "task", "seed")
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
        "rlbench": (
            "The methods after pre-training on RLBench, on six tasks with eight seeds",
            ({"method": METHODS, "dataset": ["rlbench"], **_EVERY},),
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
    base, stages = read_yaml(root / PARAMS), read_yaml(root / PIPELINE)["stages"]
    found: dict[str, Experiment] = {}
    for changes in points(grids):
        config = parse_config(changed(base, changes))
        check_names(config)
        values = config.model_dump(mode="json")
        identity = _digest([state, values])
        parts = frozenset(part_keys(values, stages).items())
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
    shown = [str(values[key]) for key in NAMED]
    shown += [f"{key.split('.')[-1]}-{value}" for key, value in changes.items() if key not in NAMED]
    return re.sub(r"[^A-Za-z0-9.-]+|\.(?=\.|-|$)", "-", "-".join([*shown, identity[:10]]))


def part_keys(values: Values, stages: Mapping[str, Any]) -> dict[str, str]:
    """For each stage of dvc.yaml, the digest of its params, its command and the stages it builds on."""
    above = upstream(values, stages)
    found: dict[str, str] = {}
    for name in graphlib.TopologicalSorter(above).static_order():
        used = [_fill(key, values) for key in stages[name].get("params", [])]
        found[name] = _digest(
            [
                stages[name]["cmd"],
                {key: _lookup(values, key) for key in used},
                sorted(found[other] for other in above[name]),
            ]
        )
    return found


def upstream(values: Values, stages: Mapping[str, Any]) -> dict[str, set[str]]:
    """For each stage of dvc.yaml, the stages whose outputs it reads."""
    maker = {
        next(iter(out)) if isinstance(out, dict) else out: name
        for name, stage in stages.items()
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]
    }
    return {
        name: {maker[path] for dep in stage.get("deps", []) if (path := _fill(dep, values)) in maker}
        for name, stage in stages.items()
    }


def _fill(text: str, values: Values) -> str:
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(_lookup(values, match[1])), text)


def _lookup(values: Values, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


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
