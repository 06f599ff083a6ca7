"""Published results that ours may be held against, and when they may.

APV and DreamerV2: the raw curves that the authors of APV published (Seo et al., Reinforcement Learning with
Action-Free Pre-Training from Videos, ICML 2022), mean success of 8 seeds. The value at 1e5 steps is the mean
of those at 95,000 and 105,000, that at 2e5 of those at 195,000 and 205,000.

PreLAR: the headline of its authors' presentation (Zhang et al., PreLAR, ECCV 2024), without and with the loss
on the action representation. It names no tasks, so it is drawn where all six are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

STEPS = (100_000, 200_000)
APV_SOURCE = "Seo et al., ICML 2022: the authors’ raw curves, mean of 8 seeds"
PRELAR_SOURCE = "Zhang et al., ECCV 2024: the authors’ presentation"
SUCCESS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "DreamerV2": {
        "lever-pull": (0.000, 0.019),
        "drawer-open": (0.269, 0.825),
        "door-lock": (0.612, 0.875),
        "button-press-topdown-wall": (0.288, 0.938),
        "reach": (0.381, 0.663),
        "dial-turn": (0.131, 0.150),
    },
    "APV on RLBench": {
        "lever-pull": (0.125, 0.494),
        "drawer-open": (0.644, 0.994),
        "door-lock": (0.881, 0.962),
        "button-press-topdown-wall": (0.738, 0.962),
        "reach": (0.700, 0.875),
        "dial-turn": (0.406, 0.500),
    },
}
HEADLINE = {
    "PreLAR without its action loss": (0.076, 0.597),
    "PreLAR": (0.499, 0.966),
}
TASKS = tuple(SUCCESS["DreamerV2"])


@dataclass(frozen=True)
class Published:
    """Success of one method at `STEPS`, averaged over the tasks that are compared."""

    label: str
    success: tuple[float, float]
    source: str


def comparable(params: Iterable[Mapping[str, Any]], tasks: Iterable[str], last_step: float) -> str | None:
    """Why the published results may not be held against runs; None where they may.

    `params` are those of the runs without the prefix of their scale, `tasks` their tasks, `last_step` is the
    last environment step that a curve reaches.
    """
    settings = list(params)
    if any(setting.get("scale") == "smoke" for setting in settings):
        return "runs at scale “smoke” are far too small and too short to be held against them"
    if any(setting.get("finetune.time_limit") != 500 for setting in settings):
        return "their episodes end after 500 steps, those compared here do not"
    if any(setting.get("finetune.action_repeat") not in (None, 1) for setting in settings):
        return "their agents choose an action at every step, those compared here do not"
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        return f"nothing is published for {', '.join(unknown)}"
    if last_step < STEPS[0]:
        return f"they are given at 100,000 and 200,000 steps, and the runs end at {last_step:,.0f}"
    return None


def published_results(tasks: Iterable[str]) -> list[Published]:
    """The published results for a set of the six tasks; the headline of PreLAR for all six alone."""
    chosen = sorted(set(tasks))
    found = []
    for label, by_task in SUCCESS.items():
        first, second = (sum(by_task[task][k] for task in chosen) / len(chosen) for k in (0, 1))
        found.append(Published(label, (first, second), APV_SOURCE))
    if set(chosen) == set(TASKS):
        found += [Published(label, success, PRELAR_SOURCE) for label, success in HEADLINE.items()]
    return found
