"""Published results that ours may be held against, and when they may.

The curves are derived from raw ones that authors published, by `tools/published_curves.py`: of APV and
DreamerV2, 8 seeds each (Seo et al., Reinforcement Learning with Action-Free Pre-Training from Videos, ICML
2022), success in Meta-World and return in DeepMind Control; and of DreamerV2 in DeepMind Control, 5 seeds
(Hafner et al., Mastering Atari with Discrete World Models, ICLR 2021).

PreLAR: the headline of its authors' presentation (Zhang et al., PreLAR, ECCV 2024), without and with the loss
on the action representation. It names no tasks, so it is drawn where all six are compared.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prelar.envs.names import DMC, METAWORLD

FILE = Path(__file__).with_name("published_curves.csv")
STEPS = (100_000, 200_000)
SOURCES = {
    "apv": "Seo et al., ICML 2022: the authors’ raw curves, 8 seeds a task",
    "dreamerv2": "Hafner et al., ICLR 2021: the authors’ raw curves, 5 seeds a task",
}
PRELAR_SOURCE = "Zhang et al., ECCV 2024: the authors’ presentation"
HEADLINE = {
    "PreLAR without its action loss": (0.076, 0.597),
    "PreLAR": (0.499, 0.966),
}
ALL = "all"
Point = tuple[float, float, float, float]  # interquartile mean, low, high, mean


@dataclass(frozen=True)
class Published:
    """A curve of one method over the tasks that are compared: success or return at steps.

    `values` are interquartile means with the interval from `low` to `high` where a single task, or all tasks
    of the source, are compared; else means over the tasks' means, without interval. `at`: means at `STEPS`.
    """

    label: str
    source: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    at: tuple[float, ...]


@functools.cache
def table() -> dict[tuple[str, str, str], dict[str, dict[int, Point]]]:
    """(suite, source, method) → task → step → point."""
    found: dict[tuple[str, str, str], dict[str, dict[int, Point]]] = {}
    with FILE.open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            curves = found.setdefault((row["suite"], row["source"], row["method"]), {})
            point = (float(row["iqm"]), float(row["low"]), float(row["high"]), float(row["mean"]))
            curves.setdefault(row["task"], {})[int(row["step"])] = point
    return found


TASKS = tuple(task for task in table()["metaworld", "apv", "DreamerV2"] if task != ALL)


def comparable(params: Iterable[Mapping[str, Any]], tasks: Iterable[str], last_step: float) -> str | None:
    """Why the published results may not be held against runs; None where they may.

    `params` are those of the runs without the prefix of their scale, `tasks` their tasks, `last_step` is the
    last environment step that a curve reaches.
    """
    settings, chosen = list(params), sorted(set(tasks))
    suites = {DMC if task.startswith(DMC.prefix) else METAWORLD for task in chosen}
    if len(suites) > 1:
        return "tasks of two suites are compared"
    if any(setting.get("scale") == "smoke" for setting in settings):
        return "runs at scale “smoke” are far too small and too short to be held against them"
    spec = next(iter((suites or {METAWORLD}).pop().tasks.values()))
    if any(setting.get("finetune.time_limit") not in (None, spec.time_limit) for setting in settings):
        return f"their episodes end after {spec.time_limit:,} steps, those compared here do not"
    if any(setting.get("finetune.action_repeat") not in (None, spec.action_repeat) for setting in settings):
        every = "an action at every step" if spec.action_repeat == 1 else "an action every second step"
        return f"their agents choose {every}, those compared here do not"
    if any(setting.get("distract", "none") != "none" for setting in settings):
        return "nothing distracted their agents, as it did those compared here"
    known = {task for curves in table().values() for task in curves}
    if unknown := [task for task in chosen if task.removeprefix(DMC.prefix) not in known]:
        return f"nothing is published for {', '.join(unknown)}"
    results = published_results(chosen)
    if not results:
        return f"nothing is published for {', '.join(chosen)} together"
    first = min(result.steps[0] for result in results)
    if last_step < first:
        return f"they begin at {first:,.0f} steps, and the runs end at {last_step:,.0f}"
    return None


def published_results(tasks: Iterable[str]) -> list[Published]:
    """The published results for a set of tasks of one suite; PreLAR's headline for the six of APV alone."""
    named = sorted(set(tasks))
    chosen = [task.removeprefix(DMC.prefix) for task in named]
    suite = "dmc" if any(task.startswith(DMC.prefix) for task in named) else "metaworld"
    found = []
    for (where, source, label), curves in table().items():
        if where != suite or not all(task in curves for task in chosen):
            continue
        steps = tuple(curves[chosen[0]])
        means = np.mean([[curves[task][step][3] for step in steps] for task in chosen], axis=0)
        at = tuple(float(np.interp(step, steps, means)) for step in STEPS)
        whole = ALL if set(chosen) == curves.keys() - {ALL} else chosen[0] if len(chosen) == 1 else None
        if whole is None:
            found.append(Published(label, SOURCES[source], steps, tuple(means), None, None, at))
        else:
            values, low, high, _ = zip(*curves[whole].values(), strict=True)
            found.append(Published(label, SOURCES[source], steps, values, low, high, at))
    if suite == "metaworld" and set(chosen) == set(TASKS):
        found += [
            Published(label, PRELAR_SOURCE, STEPS, success, None, None, success)
            for label, success in HEADLINE.items()
        ]
    return found
