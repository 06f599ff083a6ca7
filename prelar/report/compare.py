"""The page that compares runs: one file that needs nothing else, made like the page of one run."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prelar.report.catalog import (
    COMPARED_MEDIA,
    CURVES,
    EVALUATE,
    METRIC_NAMES,
    OFFLINE,
    PRETRAINING,
    Curve,
    CurveSpec,
)
from prelar.report.charts import DASHES, TABLE_ROWS, Figure, Series, figure, number
from prelar.report.page import embed_media, environment
from prelar.report.provenance import redact
from prelar.report.published import STEPS, Published, comparable, published_results
from prelar.report.results import Results
from prelar.report.runs import Run, find_runs
from prelar.report.statistics import RESAMPLES, Estimate, performance_profile, probability_of_improvement
from prelar.report.variants import Variant, aggregate, at_step, differences, essential, group
from prelar.utils.errors import UserError
from prelar.utils.files import write_text
from prelar.utils.tables import evenly_spaced_indices

PAGE = Path("reports/compare.html")
LEARNING_CURVES = ("success", "return")


@dataclass(frozen=True)
class Row:
    """A line of the table of sample efficiency: who, of how many runs, and a cell for each step.

    Ours have the aggregate at the last step too, and that step, where their runs share one.
    """

    label: str
    size: str
    cells: tuple[str, ...]
    published: bool = False
    last: Estimate | None = None
    step: float = 0


def run(names: Sequence[str], output: Path = PAGE, root: Path = Path()) -> None:
    """Write the page that compares the runs of some revisions, and of tables of results, named NAME.csv.

    The learning curves stand beside it, in a table of its name. Raises `UserError` where one lacks results,
    and where the table would take the place of the page or of a table that is read.
    """
    table = output.with_suffix(".csv")
    if table == output or table.resolve() in {(root / name).resolve() for name in names}:
        taken = "is the page" if table == output else "is read here"
        raise UserError(
            f"--output {output}: the curves are written beside the page, to {table}, which {taken}; "
            "give another name, such as reports/compare.html"
        )
    tables = {name: Results.read(root / name) for name in names if name.endswith(".csv")}
    runs = [run for results in tables.values() for run in results.runs.values()]
    runs += find_runs([name for name in names if name not in tables], root)
    for name, results in tables.items():
        for failed, error in results.failed.items():
            print(f"{name}: {failed} failed and is not shown: {error}", flush=True)
    write_text(output, render(runs))
    write_text(table, export(runs))
    print(f"report: {len(runs)} run{'s' if len(runs) > 1 else ''} compared in {output}, {table}", flush=True)


def render(runs: Sequence[Run]) -> str:
    """The page's text."""
    variants, repeats = group(runs)
    refusal, published = select_published(variants)
    kind = headline_curve(runs)
    lines = published_lines(variants, published, kind)
    behind = {name: lines if name == kind else [] for name in LEARNING_CURVES}
    text: str = (
        environment()
        .get_template("compare.html.jinja")
        .render(
            {
                "runs": runs,
                "variants": variants,
                "repeats": repeats,
                "tasks": sorted({task for variant in variants for task in variant.tasks}),
                "smoke": any(run.params.get("scale") == "smoke" for run in runs),
                "succeeds": kind == "success",
                "learning": [
                    chart for name in behind for chart in compare_curves(variants, name, behind[name])
                ],
                "improvement": improvement(variants, kind),
                "profiles": profiles(variants, kind),
                "resamples": RESAMPLES,
                "pretraining": [chart for name in PRETRAINING for chart in compare_curves(variants, name)],
                "offline": [chart for name in OFFLINE for chart in compare_curves(variants, name)],
                "prediction": compare_curves(variants, "prediction"),
                "efficiency": efficiency(variants, published, kind),
                "refusal": refusal,
                "published": published,
                "differing": differences_table(variants),
                "metrics": {
                    key: name for key, name in METRIC_NAMES.items() if any(key in r.metrics for r in runs)
                },
                "shown": [
                    (
                        variant,
                        embed_media(variant.runs[0].files, [EVALUATE / name for name in COMPARED_MEDIA]),
                    )
                    for variant in variants
                ],
            }
        )
    )
    return text


def headline_curve(runs: Sequence[Run]) -> str:
    """The curve that tells how good agents are: success, or return where no run's task tells success."""
    return "success" if any("success" in run.curves for run in runs) or not runs else "return"


def export(runs: Sequence[Run]) -> str:
    """The learning curves of all runs as CSV, a row a seed and step; settings are named as on the page."""
    labels = {run.name: variant.label for variant in group(runs)[0] for run in variant.runs}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "setting", "method", "task", "seed", "step", "success", "return"))
    for run in runs:
        keys = (run.params.get(key) for key in ("method", "task", "seed"))
        about = (run.name, labels.get(run.name, "a repetition"), *keys)
        for step, values in run.points(LEARNING_CURVES):
            writer.writerow((*about, f"{step:g}", *(values.get(name, "") for name in LEARNING_CURVES)))
    return text.getvalue()


# --- Charts -------------------------------------------------------------------------------------------------


def compare_curves(variants: Sequence[Variant], name: str, behind: Sequence[Series] = ()) -> list[Figure]:
    """Charts of a curve, so many that each has lines that can be told apart; none where no run has it.

    A setting has the same line in the charts of every curve. `behind` is drawn behind in grey.
    """
    spec = CURVES[name]
    figures = []
    for part, begin in enumerate(range(0, len(variants), len(DASHES))):
        chosen = variants[begin : begin + len(DASHES)]
        lines, rows = [], []
        for style, variant in enumerate(chosen):
            steps, estimates = aggregate(variant, name)
            if steps:
                lines.append(_series(style, variant, steps, estimates))
                rows += [
                    _row(variant, steps[i], estimates[i])
                    for i in evenly_spaced_indices(len(steps), TABLE_ROWS)
                ]
        if lines:
            identifier = f"{name.replace('_', '-')}-{part}"
            chart = figure(spec, lines, identifier=identifier, behind=[*behind, *_references(chosen, name)])
            headings = ("Setting", spec.x.capitalize(), "IQM", "95%", "Mean")
            figures.append(replace(chart, headings=headings, rows=tuple(rows)))
    return figures


def interval(estimate: Estimate, scale: float = 1) -> str:
    """The interval's ends, an en dash between them; a dash where there is none."""
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{number(scale * estimate.low)} – {number(scale * estimate.high)}"


def _series(style: int, variant: Variant, steps: list[float], estimates: list[Estimate]) -> Series:
    low = [e.low for e in estimates if e.low is not None]
    high = [e.high for e in estimates if e.high is not None]
    middle = [e.iqm for e in estimates]
    if len(low) < len(steps):
        return Series(variant.label, steps, middle, style=style)
    return Series(variant.label, steps, middle, low, high, style)


def _references(variants: Sequence[Variant], name: str) -> list[Series]:
    """The reference curves of some settings; settings that share one have it once."""
    reference = CURVES[name].reference
    if reference is None:
        return []
    shared: dict[Curve, list[str]] = {}
    for variant in variants:
        steps, estimates = aggregate(variant, reference[0])
        if steps:
            shared.setdefault((tuple(steps), tuple(e.iqm for e in estimates)), []).append(variant.label)
    if len(shared) == 1:
        return [Series(reference[1], steps, values) for steps, values in shared]
    return [Series(f"{'; '.join(who)}, {reference[1]}", *curve) for curve, who in shared.items()]


def _row(variant: Variant, step: float, estimate: Estimate) -> tuple[str, ...]:
    return variant.label, number(step), number(estimate.iqm), interval(estimate), number(estimate.mean)


# --- Published results --------------------------------------------------------------------------------------


def select_published(variants: Sequence[Variant]) -> tuple[str | None, list[Published]]:
    """Why the published results are not shown, and else those that are."""
    tasks = {task for variant in variants for task in variant.tasks}
    params = [essential(run.params) for variant in variants for run in variant.runs]
    refusal = comparable(params, tasks, _last_step(variants))
    if refusal is None and any(set(variant.tasks) != tasks for variant in variants):
        refusal = "the settings were not run on the same tasks"
    return refusal, [] if refusal else published_results(tasks)


def _last_step(variants: Sequence[Variant]) -> float:
    """The last step that all runs of a setting reach, of the setting that goes furthest."""
    kind = headline_curve([run for variant in variants for run in variant.runs])
    return max((steps[-1] for variant in variants if (steps := aggregate(variant, kind)[0])), default=0)


def published_lines(variants: Sequence[Variant], published: Sequence[Published], kind: str) -> list[Series]:
    """The published curves as far as ours go; one that ends earlier is whole."""
    last, lines = _last_step(variants), []
    for found in published:
        count = sum(step <= last for step in found.steps)
        columns = (found.steps, found.values, found.low, found.high)
        steps, values, low, high = (column and column[:count] for column in columns)
        if steps and values:
            lines.append(Series(f"{found.label} (published)", steps, values, low, high))
    return lines


# --- Beyond means -------------------------------------------------------------------------------------------


def last_scores(variants: Sequence[Variant], kind: str) -> tuple[float, list[list[list[float]]]]:
    """The last step that all runs have, and for each setting and task the runs' scores at it.

    No scores where the settings were not run on the same tasks, or share no step.
    """
    steps = [set(run.curves.get(kind, ((), ()))[0]) for variant in variants for run in variant.runs]
    shared = set.intersection(*steps) if steps else set()
    if not shared or len({tuple(variant.tasks) for variant in variants}) > 1:
        return 0.0, []
    step = max(shared)
    scores = [
        [[dict(zip(*run.curves[kind], strict=True))[step] for run in runs] for runs in variant.tasks.values()]
        for variant in variants
    ]
    return step, scores


def improvement(variants: Sequence[Variant], kind: str) -> list[tuple[str, ...]]:
    """A row for each pair of settings: both, how probably a run of the first beats the second, interval."""
    step, scores = last_scores(variants, kind)
    rows: list[tuple[str, ...]] = []
    for (one, x), (other, y) in itertools.combinations(zip(variants, scores, strict=False), 2):
        value, low, high = probability_of_improvement(x, y)
        single = any(len(task) < 2 for task in (*x, *y))
        spread = "–" if single else f"{number(low)} – {number(high)}"
        rows.append((one.label, other.label, number(value), spread, number(step)))
    return rows


def profiles(variants: Sequence[Variant], kind: str) -> list[Figure]:
    """The share of runs above each score at the last step that all have; none where they share no step."""
    step, scores = last_scores(variants, kind)
    found = []
    for part, begin in enumerate(range(0, len(scores), len(DASHES))):
        chosen = list(zip(variants, scores, strict=True))[begin : begin + len(DASHES)]
        top = max(score for tasks in scores for task in tasks for score in task)
        limits = np.linspace(0, 1 if kind == "success" else max(top, 1e-9), 41)
        lines = []
        for style, (variant, tasks) in enumerate(chosen):
            share, *ends = (column.tolist() for column in performance_profile(tasks, limits))
            low, high = (None, None) if any(len(task) < 2 for task in tasks) else ends
            lines.append(Series(variant.label, limits.tolist(), share, low, high, style))
        spec = CurveSpec(
            "",
            kind,
            f"Performance profile at {number(step)} steps",
            kind,
            "share of runs above it",
            f"Share of runs whose {kind} at {number(step)} steps is higher, over tasks and seeds.",
            limits=(0.0, 1.0),
        )
        found.append(figure(spec, lines, identifier=f"profile-{part}"))
    return found


# --- Tables -------------------------------------------------------------------------------------------------


def efficiency(variants: Sequence[Variant], published: Sequence[Published], kind: str) -> list[Row]:
    """Rows of the table of sample efficiency: `kind` at 1e5, at 2e5 and at the last common step."""
    rows = []
    for variant in variants:
        steps, estimates = aggregate(variant, kind)
        cells = [_efficiency_cell(at_step(variant, kind, step), kind) for step in STEPS]
        last = (
            f"{_efficiency_cell(estimates[-1], kind)} at {number(steps[-1])}" if steps else "no common step"
        )
        ends = (estimates[-1], steps[-1]) if steps else (None, 0.0)
        rows.append(Row(variant.label, variant.size, (*cells, last), False, *ends))
    for result in published:
        means = [f"mean {_score(value, kind)}" for value in result.at]
        rows.append(Row(f"{result.label} (published)", result.source, (*means, ""), published=True))
    return rows


def _score(value: float, kind: str) -> str:
    return f"{number(100 * value)}%" if kind == "success" else number(value)


def _efficiency_cell(found: Estimate | None, kind: str) -> str:
    if found is None:
        return "not reached"
    spread = f" [{interval(found, 100 if kind == 'success' else 1)}]" if found.low is not None else ""
    return f"{_score(found.iqm, kind)}{spread}, mean {_score(found.mean, kind)}"


def differences_table(variants: Sequence[Variant]) -> list[tuple[str, tuple[str, ...]]]:
    """Each key that differs among the variants, with its value in each."""
    settings = [{key: redact(value) for key, value in variant.settings.items()} for variant in variants]
    keys = differences([variant.settings for variant in variants])
    return [(key, tuple(_text(setting.get(key)) for setting in settings)) for key in keys]


def _text(value: Any) -> str:
    return "–" if value is None else str(value)
