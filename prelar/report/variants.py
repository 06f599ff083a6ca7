"""Runs that differ by task and seed alone are one variant; what sets variants apart names them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prelar.report.catalog import METHODS, Curve
from prelar.report.provenance import data_prefixes, redact
from prelar.report.runs import Run
from prelar.report.statistics import Estimate, estimate
from prelar.utils.tables import evenly_spaced_indices

WITHIN = ("task", "seed")
MACHINE = ("device", "threads", "data_root")
DATA = ("sample", "ssv2", "demos", "sources", "mixtures", "unions")
DATA_MACHINE = ("workers", "batch", "ffmpeg")
"""Settings of the machine in the groups `DATA`."""
POINTS = 100


@dataclass(frozen=True)
class Variant:
    """Runs of one setting over tasks and seeds.

    `label` says what sets it apart from the others compared, `settings` its values of the keys that differ.
    """

    label: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def tasks(self) -> dict[str, list[Run]]:
        """The runs of each task, by its name."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(str(run.params.get("task")), []).append(run)
        return dict(sorted(found.items()))

    @property
    def size(self) -> str:
        """Of how many runs it is."""
        seeds = sorted({len(runs) for runs in self.tasks.values()})
        spread = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        one_task, one_seed = len(self.tasks) == 1, seeds == [1]
        return (
            f"n = {len(self.runs)}: {len(self.tasks)} task{'' if one_task else 's'}, "
            f"{spread} seed{'' if one_seed else 's'}{'' if one_task else ' each'}"
        )


def essential(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params that a run depends on: without machine settings, other data sets and other scales.

    The chosen scale's presets lose their prefix, so that runs of two scales are compared key by key.
    """
    scale = f"scales.{params.get('scale')}."
    data = data_prefixes(params)
    found = {}
    for key, value in params.items():
        if key.partition(".")[0] in DATA:
            if f"{key}.".startswith(data) and key.rpartition(".")[2] not in DATA_MACHINE:
                found[key] = value
        elif key.startswith(scale):
            found[key.removeprefix(scale)] = value
        elif not key.startswith("scales.") and key not in MACHINE:
            found[key] = value
    return found


def group(runs: Sequence[Run]) -> tuple[list[Variant], list[tuple[Run, Run]]]:
    """The variants among the runs in order of appearance, and (run, the earlier run that it repeats).

    A variant is named by its method and by the values in which it differs from most of the others.

    A run with the very params of an earlier one is no further seed, so it counts for nothing.
    """
    kept: dict[str, list[Run]] = {}
    first: dict[str, Run] = {}
    repeats = []
    for run in runs:
        params = essential(run.params)
        whole = _text(params)
        if whole in first:
            repeats.append((run, first[whole]))
            continue
        first[whole] = run
        setting = {key: value for key, value in params.items() if key not in WITHIN}
        kept.setdefault(_text(setting), []).append(run)
    settings = [json.loads(text) for text in kept]
    differing = differences(settings)
    usual = {key: _usual([_text(setting.get(key)) for setting in settings]) for key in differing}
    variants = [
        Variant(
            _label(setting, [key for key in differing if _text(setting.get(key)) != usual[key]]),
            {key: setting.get(key) for key in differing},
            tuple(kept[_text(setting)]),
        )
        for setting in settings
    ]
    return variants, repeats


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all settings, in the order of the first."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({_text(setting.get(key)) for setting in settings}) > 1]


def _usual(values: Sequence[str]) -> str | None:
    """What more than half of the values are; None where they are divided."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def _label(setting: Mapping[str, Any], differing: Sequence[str]) -> str:
    method = str(setting.get("method"))
    rest = [f"{key} = {_shown(setting[key])}" for key in differing if key != "method" and key in setting]
    shown = rest[:3] + ([f"{len(rest) - 3} more"] if len(rest) > 3 else [])
    return ", ".join([METHODS[method][0] if method in METHODS else method, *shown])


def _shown(value: Any) -> str:
    shown = redact(value)
    return shown if isinstance(shown, str) else json.dumps(shown)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# --- Curves -------------------------------------------------------------------------------------------------


def common_steps(runs: Sequence[Run], kind: str) -> list[float]:
    """The steps at which all runs have a point of the curve `kind`; none where a run has no curve."""
    if not all(kind in run.curves for run in runs):
        return []
    shared = set.intersection(*(set(run.curves[kind][0]) for run in runs))
    return sorted(shared)


def aggregate(variant: Variant, kind: str) -> tuple[list[float], list[Estimate]]:
    """The curve of a variant: steps that all its runs have, `POINTS` at most, and the aggregate at each."""
    steps = common_steps(variant.runs, kind)
    steps = [steps[i] for i in evenly_spaced_indices(len(steps), POINTS)]
    if not steps:
        return [], []
    scores = [np.array([_values(run.curves[kind], steps) for run in runs]) for runs in variant.tasks.values()]
    return steps, estimate(scores)


def at_step(variant: Variant, kind: str, step: float) -> Estimate | None:
    """The aggregate at one step, curves interpolated linearly; None where a run does not reach it."""
    scores = []
    for runs in variant.tasks.values():
        found = [interpolate(run.curves.get(kind), step) for run in runs]
        if any(value is None for value in found):
            return None
        scores.append(np.array(found, dtype=np.float64)[:, None])
    return estimate(scores)[0]


def interpolate(curve: Curve | None, step: float) -> float | None:
    """A curve's value at a step between its first and its last one, None outside of them."""
    if curve is None or not curve[0] or not curve[0][0] <= step <= curve[0][-1]:
        return None
    return float(np.interp(step, curve[0], curve[1]))


def _values(curve: Curve, steps: Sequence[float]) -> list[float]:
    found = dict(zip(*curve, strict=True))
    return [found[step] for step in steps]
