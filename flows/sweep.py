"""What a sweep consists of: grids over the keys of params.yaml, and the runs of DVC that they come to."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from flows.version import Step, Values, Version
from prelar.config import PARAMS, Config, parse_config, parse_yaml, read_yaml
from prelar.envs.names import check_names
from prelar.stages import PIPELINE, Stages
from prelar.utils.errors import UserError

Grid = Mapping[str, list[Any]]
Preset = Literal[
    "demos",
    "ssv2",
    "action-representation",
    "beta-a",
    "small-comparison",
    "small-comparison-rlbench",
    "small-causes",
]
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
_WITHOUT_ACTION_KL: Grid = {"beta_a": [0], "action_kind": ["deterministic"]}
_OTHER_TASKS = ["drawer-open", "drawer-close", "dial-turn", "button-press-topdown", "door-open", "push"]
_SMALL: Grid = {
    "scale": ["small"],
    "threads": [1],
    "task": ["reach", "window-close", "plate-slide"],
    "seed": list(range(5)),
}
_METAWORLD: Grid = {**_SMALL, "sample.tasks": [_OTHER_TASKS], "sample.clips": [300]}
_RLBENCH: Grid = {
    **_SMALL,
    "dataset": ["demos"],
    "demos.source": ["apv_npz"],
    "demos.path": ["/data/rlbench_npz"],
    "demos.fps": [20],
}
_HELD: Grid = {"scales.small.finetune.freeze_updates": [120]}


def _pretrained(videos: Grid) -> tuple[Grid, ...]:
    """The methods that pre-train, and PreLAR without its losses on the action, over `videos`."""
    return (
        {"method": ["apv", "contextwm", "prelar"], **videos},
        {"method": ["prelar"], **_WITHOUT_ACTION_KL, **videos},
        {"method": ["prelar"], "beta_c": [0], **videos},
    )


PRESETS: Mapping[str, tuple[str, tuple[Grid, ...]]] = MappingProxyType(
    {
        "demos": (
            "All methods on demos (Meta-World's experts unless demos.source is set), six tasks, eight seeds",
            ({"method": METHODS, "dataset": ["demos"], **_EVERY},),
        ),
        "ssv2": (
            "All methods on ssv2 (the rendered sample unless ssv2.source is set), six tasks, eight seeds",
            ({"method": METHODS, "dataset": ["ssv2"], **_EVERY},),
        ),
        "action-representation": (
            "PreLAR; without consistency loss; also without action KL (deterministic latent action)",
            (
                {"method": ["prelar"], **_EVERY},
                {"method": ["prelar"], "beta_c": [0], **_EVERY},
                {"method": ["prelar"], "beta_c": [0], **_WITHOUT_ACTION_KL, **_EVERY},
            ),
        ),
        "beta-a": (
            "PreLAR with weights of the action KL (beta_a) from 0.01 to 10",
            ({"method": ["prelar"], "beta_a": [0.01, 0.1, 1.0, 10.0], **_EVERY},),
        ),
        "small-comparison": (
            "Methods and ablations of PreLAR at scale small: videos of other tasks, three tasks, five seeds",
            (
                {"method": ["dreamerv2"], **_METAWORLD},
                {"method": ["apv"], "naive": [True], "scales.small.pretrain.steps": [0], **_METAWORLD},
                *_pretrained(_METAWORLD),
            ),
        ),
        "small-comparison-rlbench": (
            "Its pre-trained settings on recorded RLBench episodes in /data/rlbench_npz (or demos.path=…)",
            _pretrained(_RLBENCH),
        ),
        "small-causes": (
            "Causes of differences in small-comparison: one RSSM, frozen parts, a stronger action KL",
            (
                {"method": ["apv"], "naive": [True], **_METAWORLD},
                {"method": ["prelar"], **_HELD, **_METAWORLD},
                {"method": ["prelar"], **_WITHOUT_ACTION_KL, **_HELD, **_METAWORLD},
                {"method": ["prelar"], "beta_a": [0.01], **_METAWORLD},
            ),
        ),
    }
)


def words_to_grid(words: Iterable[str]) -> dict[str, list[Any]]:
    """Words such as `seed=0,1,2` as a grid. Raises `UserError` for any other word, and a key given twice."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        key, found, text = word.partition("=")
        try:
            values = parse_yaml(f"[{text}]") if found else []
        except ValueError:
            values = []
        if not values:
            raise UserError(f"{word}: not a sweep over a key; write it like seed=0,1,2")
        if key in grid:
            raise UserError(f"{word}: {key} is given twice; write its values in one word")
        grid[key] = values
    return grid


def read_grids(path: Path) -> list[dict[str, list[Any]]]:
    """The grids of a YAML or JSON file: a mapping from keys to values, or a list of such mappings.

    Raises `UserError` where it holds none.
    """
    held = read_yaml(path)
    grids = held if isinstance(held, list) else [held]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"{path}: holds no sweep; write keys with lists of values, such as seed: [0, 1, 2]")
    return [
        {str(key): value if isinstance(value, list) else [value] for key, value in grid.items()}
        for grid in grids
    ]


def points(grids: Iterable[Grid]) -> Iterator[Values]:
    """Every combination of each grid. Raises `UserError` where a key has no values."""
    for grid in grids:
        for key in grid:
            if not grid[key]:
                raise UserError(f"{key}: has no values; write it like seed: [0, 1, 2]")
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def grids(
    preset: str | None, grid: dict[str, list[Any]], more: list[dict[str, list[Any]]] | None
) -> list[dict[str, list[Any]]]:
    """The grids of a preset or of `more`, each with the keys of `grid` in the place of its own."""
    given = [*(PRESETS[preset][1] if preset else ()), *(more or ())]
    return [{**one, **grid} for one in given or [{}]]


def changed(base: Values, changes: Values) -> Values:
    """The values of params.yaml with dotted keys changed. Unknown keys are left to the check."""
    values = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict):
            raise UserError(f"{key}: a sweep changes single values; write {key}.NAME for one within it")
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                raise UserError(f"{key}: unknown key; {name} is no group of keys")
        group[last] = value
    return values


@dataclass(frozen=True)
class Experiment:
    """A point of a sweep: `changes` to params.yaml, the stages `targets` that measure it (none: all), and the
    `parts`, in their order, that these and the stages before them make."""

    name: str
    seed: int
    changes: Values
    targets: tuple[str, ...]
    parts: tuple[Part, ...]


def plan(grids: Iterable[Grid], version: Version) -> list[Experiment]:
    """The experiments of a sweep over a version, checked, each once: all of the first seed, then all of the
    next, otherwise in the order of the grids.

    Raises `UserError` where a combination is no valid params.yaml.
    """
    with tempfile.TemporaryDirectory() as place, version.copy(root := Path(place) / "plan"):
        return plan_in(root, grids, version.code(root))


def plan_in(root: Path, grids: Iterable[Grid], code: str) -> list[Experiment]:
    """`plan` of the files in `root`. The name of an experiment follows from its params and `code`."""
    base, stages = read_yaml(root / PARAMS), Stages(root / PIPELINE)
    targets = stages.measuring()
    found: dict[str, Experiment] = {}
    for changes in points(grids):
        config = parse_config(changed(base, changes))
        check_names(config)
        values = config.model_dump(mode="json")
        identity = _digest([code, values])
        keys = stages.fingerprints(values, targets)
        parts = tuple((name, _digest([code, key])) for name, key in keys.items())
        name = _name(values, changes, identity)
        found.setdefault(identity, Experiment(name, config.seed, changes, targets, parts))
    return sorted(found.values(), key=lambda one: one.seed)


def steps(wanted: list[Experiment], workers: int) -> list[Step]:
    """What to run for experiments: stages that several share once, before the first of them.

    The shared stages of a seed come before its experiments, and with them those of the next seed where there
    are too few of them to keep all workers busy.
    """
    users: dict[Part, tuple[str, ...]] = {}
    for one in wanted:
        for part in one.parts:
            users[part] = (*users.get(part, ()), one.name)
    shared: dict[tuple[str, ...], list[Part]] = {}
    for part, names in users.items():
        if len(names) > 1:
            shared.setdefault(names, []).append(part)
    found: dict[str, Step] = {}

    def share(one: Experiment) -> tuple[str, ...]:
        """The names of the steps that make what `one` shares, from the first stage on; adds what lacks."""
        needs: list[str] = []
        for names in sorted(shared, key=len, reverse=True):
            if one.name in names:
                stages, digests = zip(*shared[names], strict=True)
                needs.append(f"{stages[-1]}-{digests[-1][:10]}")
                found.setdefault(
                    needs[-1], Step(needs[-1], one.changes, stages, tuple(needs[:-1]), shared=True)
                )
        return tuple(needs)

    seeds = [list(group) for _, group in itertools.groupby(wanted, key=lambda one: one.seed)]
    ahead = 1 if len(shared) >= workers * len(seeds) else 2
    for number, seed in enumerate(seeds):
        for one in itertools.chain(*seeds[number : number + ahead]):
            share(one)
        for one in seed:
            found[one.name] = Step(one.name, one.changes, one.targets, share(one))
    return list(found.values())


def _name(values: Values, changes: Values, identity: str) -> str:
    shown = [str(values[key]) for key in NAME_KEYS]
    told = {key: value for key, value in changes.items() if not isinstance(value, list)}
    shown += [f"{key.split('.')[-1]}-{value}" for key, value in told.items() if key not in NAME_KEYS]
    return re.sub(r"[^A-Za-z0-9.-]+|\.(?=\.|-|$)", "-", "-".join([*shown, identity[:10]]))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
