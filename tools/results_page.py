"""Write docs/results.md and its figures from the tables in results/, without running anything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import StrictUndefined, Template

from prelar.evaluation.controllability import interval
from prelar.report.catalog import CurveSpec
from prelar.report.charts import Series, line_chart, number
from prelar.report.results import Results
from prelar.report.runs import Run
from prelar.report.statistics import interquartile_mean, probability_of_improvement, seed_interval
from prelar.utils.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/results.md")
TEMPLATE = Path(__file__).with_name("results.md.jinja")
FIGURES = Path("docs/results")

_HELD = "scales.small.finetune.freeze_updates"
_POINT = {"beta_a": 0, "action_kind": "deterministic"}
_Settings = Mapping[str, Mapping[str, Any]]
COMPARED: _Settings = {
    "DreamerV2": {"method": "dreamerv2"},
    "ResNet, untrained": {"method": "apv", "naive": True, "scales.small.pretrain.steps": 0},
    "APV": {"method": "apv"},
    "ContextWM": {"method": "contextwm"},
    "PreLAR": {"method": "prelar"},
    "PreLAR, no action KL": {"method": "prelar", **_POINT},
    "PreLAR, no consistency": {"method": "prelar", "beta_c": 0},
}
CAUSES: _Settings = {
    "APV, one RSSM": {"method": "apv", "naive": True},
    "PreLAR, held": {"method": "prelar", _HELD: 120},
    "PreLAR, no action KL, held": {"method": "prelar", **_POINT, _HELD: 120},
    "PreLAR, beta_a 0.01": {"method": "prelar", "beta_a": 0.01},
}
SETTINGS: _Settings = {**COMPARED, **CAUSES}
"""What the sweeps compare: a name, and what it changes besides what a whole sweep does."""
_KEYS = dict.fromkeys(key for changes in SETTINGS.values() for key in changes)


@dataclass(frozen=True)
class Block:
    """A part of the page: the results of the preset, in `results/<preset>.csv`.

    `settings` are the rows of its tables; those that the preset lacks are the first block's. `charts` maps a
    figure's name to its title and the settings drawn.
    """

    preset: str
    settings: Sequence[str]
    charts: Mapping[str, tuple[str, Sequence[str]]]


_METHODS = (
    "How fast the agent learns, by method",
    ("DreamerV2", "ResNet, untrained", "APV", "ContextWM", "PreLAR"),
)
_ABLATIONS = (
    "What PreLAR's losses on the action are worth",
    ("ResNet, untrained", "PreLAR", "PreLAR, no action KL", "PreLAR, no consistency"),
)
_TRIED = ("What makes the difference", ("APV", "PreLAR", *CAUSES))
BLOCKS = (
    Block("small-comparison", tuple(COMPARED), {"methods": _METHODS, "ablations": _ABLATIONS}),
    Block("small-comparison-rlbench", tuple(COMPARED), {"methods-2": _METHODS, "ablations-2": _ABLATIONS}),
    Block("small-causes", ("APV", "PreLAR", "PreLAR, no action KL", *CAUSES), {"causes": _TRIED}),
)
LAST = 3
STYLE = """<style>
svg { background: #fcfbf8; font-family: sans-serif; stroke-linejoin: round; }
.grid { stroke: #d8d4ca; } .axis { stroke: #585d65; }
text { fill: #585d65; font-size: 12px; } .label { fill: #1c1e22; }
.s0 { color: #0a5a87; } .s1 { color: #a8480a; } .s2 { color: #3f6d14; }
.s3 { color: #7d2f70; } .s4 { color: #6b5900; } .s5 { color: #40505c; }
.line { fill: none; stroke: currentColor; stroke-width: 2; } .mark { fill: currentColor; stroke: #fcfbf8; }
.band { fill: currentColor; opacity: 0.16; } .behind { color: #585d65; stroke-width: 1.5; }
</style>"""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The normalised returns of one setting.

    Attributes:
        name: of the setting.
        values: (seeds, tasks, steps), 0 what random actions reach in a task, 1 what its expert does.
        runs: the runs, (seeds, tasks).
    """

    name: str
    values: Values
    runs: Sequence[Sequence[Run]]

    @property
    def area(self) -> Values:
        """The mean of the learning curve, (seeds, tasks, 1)."""
        return self.values.mean(-1, keepdims=True)

    @property
    def last(self) -> Values:
        """The mean of the curve's last `LAST` points, (seeds, tasks, 1)."""
        return self.values[..., -LAST:].mean(-1, keepdims=True)


def page(tables: Mapping[str, Results]) -> tuple[str, dict[str, str]]:
    """The page's text, and its figures by file name, from the tables by preset; not all have to be there."""
    told, figures, first = [], dict[str, str](), dict[str, list[Run]]()
    for one in BLOCKS:
        if one.preset in tables:
            own = runs_of(tables[one.preset])
            first = first or own
            runs = {name: own.get(name) or first[name] for name in one.settings}
            values, drawn = describe(one, tables[one.preset], runs)
            told.append(values)
            figures |= drawn
    params = tables[BLOCKS[0].preset].params
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, undefined=StrictUndefined)
    text = template.render(
        blocks=told,
        updates=params["scales.small.pretrain.steps"],
        env_steps=params["scales.small.finetune.env_steps"],
        tasks=told[0]["tasks"],
        failed={name: error for results in tables.values() for name, error in results.failed.items()},
    )
    return text.rstrip() + "\n", figures


def runs_of(results: Results) -> dict[str, list[Run]]:
    """The runs of a sweep by setting; those that are not done have no curves."""
    found: dict[str, list[Run]] = {}
    for run in results.planned():
        own = {key: run.changed[key] for key in _KEYS if key in run.changed}
        found.setdefault(next(name for name, changes in SETTINGS.items() if changes == own), []).append(run)
    return found


def describe(
    one: Block, results: Results, runs: Mapping[str, Sequence[Run]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the template needs of a block of `runs` by setting, and its figures by file name."""
    seeds, tasks, steps = balanced(runs)
    done, hours = len(results.runs), sum(results.cpu_seconds.values()) / 3600
    values: dict[str, Any] = {
        "preset": one.preset,
        "charts": {name: title for name, (title, _) in one.charts.items()},
        "tasks": tasks,
        "commit": results.commit[:10],
        "seeds": len(seeds),
        "done": done,
        "planned": len(results.changes),
        "hours": f"{hours:.1f}",
        "minutes": f"{60 * hours / max(done, 1):.1f}",
    }
    figures = {}
    if seeds:
        controls = {task: control_returns(runs, task) for task in tasks}
        scores = [score(name, own, seeds, controls, steps) for name, own in runs.items()]
        values |= {
            "learning": learning(scores),
            "improvement": improvement(scores),
            "returns": returns(scores, controls),
            "ahead": ahead(scores, tasks),
            "models": world_models(scores),
            "copied": spread(scores[-1], "prediction_error_copy", per_seed=True),
            "probe": f"probe-{one.preset}",
        }
        for name, (title, shown) in one.charts.items():
            figures[f"{name}.svg"] = chart(scores, shown, steps, title)
        figures[f"probe-{one.preset}.svg"] = probe(scores)
    return values, figures


def balanced(runs: Mapping[str, Sequence[Run]]) -> tuple[list[int], list[str], list[float]]:
    """The seeds of which all runs of all settings are done, the tasks, and the steps of the curves."""
    every = [run for own in runs.values() for run in own]
    planned = [{run.params["seed"] for run in own} for own in runs.values()]
    lacking = {run.params["seed"] for run in every if not run.curves}
    whole = sorted(set.intersection(*planned) - lacking)
    steps = [run.curves["return"][0] for run in every if run.params["seed"] in whole]
    tasks = list(dict.fromkeys(run.params["task"] for run in every))
    return whole, tasks, list(steps[0]) if steps else []


def control_returns(runs: Mapping[str, Sequence[Run]], task: str) -> tuple[float, float]:
    """Mean returns of random actions and of the expert in a task, over all runs of it."""
    every = [run for own in runs.values() for run in own if run.params["task"] == task]
    found = [run.metrics for run in every if run.metrics]
    low, high = (float(np.mean([one[name] for one in found])) for name in ("return_random", "return_expert"))
    return low, high


def score(
    name: str,
    own: Sequence[Run],
    seeds: Sequence[int],
    controls: Mapping[str, tuple[float, float]],
    steps: Sequence[float],
) -> Scores:
    """The scores of a setting in some seeds; the tasks are those of `controls`."""
    runs = {(run.params["seed"], run.params["task"]): run for run in own}
    table = [[runs[seed, task] for task in controls] for seed in seeds]
    assert all(list(run.curves["return"][0]) == list(steps) for row in table for run in row)
    low, high = np.array(list(controls.values())).T[:, None, :, None]
    returns = np.array([[run.curves["return"][1] for run in row] for row in table])
    return Scores(name, (returns - low) / (high - low), table)


# --- Tables and figures -----------------------------------------------------------------------------------


def learning(scores: Sequence[Scores]) -> str:
    """Areas under the learning curves, and their ends."""
    headings = ("setting", "area under the curve (95%)", "end (95%)")
    rows = [
        (
            one.name,
            *(between(float(middle(x)), *seed_interval(x), len(one.runs)) for x in (one.area, one.last)),
        )
        for one in scores
    ]
    return markdown(headings, rows)


def improvement(scores: Sequence[Scores]) -> str:
    """How probably a run of one setting beats one of another."""
    rows = []
    for one, other in itertools.combinations(scores, 2):
        x, y = ([values[:, task, 0] for task in range(values.shape[1])] for values in (one.area, other.area))
        value, low, high = probability_of_improvement(x, y)
        verdict = "first" if low > 0.5 else "second" if high < 0.5 else "not told apart"
        told = verdict if len(one.runs) > 1 else "one seed"
        rows.append((one.name, other.name, between(value, low, high, len(one.runs)), told))
    return markdown(("first", "second", "probability (95%)", "better"), rows)


def returns(scores: Sequence[Scores], controls: Mapping[str, tuple[float, float]]) -> str:
    """Returns at the end, seed by seed."""
    rows: list[tuple[str, ...]] = [
        (one.name, *(", ".join(f"{at_end(run):.0f}" for run in runs) for runs in zip(*one.runs, strict=True)))
        for one in scores
    ]
    for place, name in enumerate(("random actions", "scripted expert")):
        rows.append((name, *(f"{values[place]:.0f}" for values in controls.values())))
    return markdown(("", *controls), rows)


def ahead(scores: Sequence[Scores], tasks: Sequence[str]) -> str:
    """Returns after training over seeds, and in how many runs the agent's interval lies above random's."""
    rows = []
    for one in scores:
        cells = []
        for runs in zip(*one.runs, strict=True):
            found = np.array([run.metrics["return"] for run in runs])
            held = sum(run.metrics["return_low"] > run.metrics["return_random_high"] for run in runs)
            told = between(float(found.mean()), *interval(found), len(found))
            cells.append(f"{told}; {held} of {len(runs)}")
        rows.append((one.name, *cells))
    every = [run for one in scores for row in one.runs for run in row]
    ends = [
        [run.metrics["return_random_high"] for run in every if run.params["task"] == task] for task in tasks
    ]
    rows.append(("random actions", *(f"at most {number(max(found))}" for found in ends)))
    return markdown(("", *tasks), rows)


def world_models(scores: Sequence[Scores]) -> str:
    """Whether pre-training helps the model, and what its action decides."""
    headings = ("setting", "offline fit, pre-trained", "from scratch", "prediction", "controllability, dB")
    rows = []
    for one in scores:
        cells = [spread(one, f"offline_error_{kind}") for kind in ("pretrained", "scratch")]
        cells += [spread(one, name, per_seed=True) for name in ("prediction_error", "controllability_db")]
        rows.append((one.name, *cells))
    return markdown(headings, rows)


def probe(scores: Sequence[Scores]) -> str:
    """R² of the latent actions over gaps, beside the raw difference, as an SVG file."""
    lines = {}
    for one in scores:
        found = [runs[0].curves for runs in one.runs if "probe_gaps" in runs[0].curves]
        if found:
            lines["raw difference"] = [curves["probe_gaps_difference"] for curves in found]
            lines[one.name] = [curves["probe_gaps"] for curves in found]
    spec = CurveSpec("", "", "R² of the latent action", "frames apart", "R²", "")
    drawn = []
    for name, curves in lines.items():
        values = np.array([y for _, y in curves])
        steps = list(curves[0][0])
        drawn.append(
            Series(name, steps, *(x.tolist() for x in (values.mean(0), values.min(0), values.max(0))))
        )
    return styled(line_chart(spec, drawn, identifier="probe"))


def at_end(run: Run) -> float:
    """The mean of the last `LAST` points of a run's learning curve."""
    return float(np.mean(run.curves["return"][1][-LAST:]))


# --- Helpers ----------------------------------------------------------------------------------------------


def middle(values: Values) -> Values:
    """The interquartile mean of (seeds, tasks, K) over seeds and tasks: (K,)."""
    return interquartile_mean(values.reshape(-1, values.shape[-1])).squeeze()


def between(value: float, low: npt.ArrayLike, high: npt.ArrayLike, count: int) -> str:
    """A value of `count` scores and its ends, scalars or (1,), of which one score has none."""
    ends = [number(float(np.squeeze(end))) for end in (low, high)]
    return number(value) + (f" ({' to '.join(ends)})" if count > 1 else "")


def spread(one: Scores, metric: str, per_seed: bool = False) -> str:
    """Mean, least and greatest of a metric over runs, or over one run a seed; a dash where none has it."""
    runs = [run for row in one.runs for run in (row[:1] if per_seed else row)]
    found = [run.metrics[metric] for run in runs if metric in run.metrics]
    if not found:
        return "–"
    return between(float(np.mean(found)), min(found), max(found), len(found))


def chart(scores: Sequence[Scores], names: Sequence[str], steps: Sequence[float], title: str) -> str:
    """The learning curves of some settings as an SVG file."""
    lines = []
    for one in scores:
        if one.name in names:
            low, high = seed_interval(one.values)
            lines.append(Series(one.name, steps, middle(one.values).tolist(), low.tolist(), high.tolist()))
    spec = CurveSpec("", "", title, "environment steps", "normalised return", "")
    return styled(line_chart(spec, lines, identifier="learning"))


def styled(svg: str) -> str:
    """A chart as a file of its own."""
    return re.sub(r"^<svg ([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg" \1>\n{STYLE}', svg) + "\n"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, Results]:
    """The tables that there are, by preset."""
    places = {one.preset: ROOT / f"results/{one.preset}.csv" for one in BLOCKS}
    return {preset: Results.read(place) for preset, place in places.items() if place.exists()}


def main() -> None:
    """Write the page and its figures."""
    text, figures = page(tables())
    write_text(ROOT / PAGE, text)
    for name, svg in figures.items():
        write_text(ROOT / FIGURES / name, svg)
    print(f"results: {PAGE}, {len(figures)} figures in {FIGURES}")


if __name__ == "__main__":
    main()
