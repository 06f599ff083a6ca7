"""The page that compares runs: one file that needs nothing else, made like the page of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prelar.report.catalog import (
    COMPARED_MEDIA,
    CURVES,
    EVALUATE,
    METRIC_NAMES,
    OFFLINE,
    PRETRAINING,
    Curve,
)
from prelar.report.charts import DASHES, TABLE_ROWS, Figure, Series, figure, number
from prelar.report.page import embed_media, environment
from prelar.report.provenance import redact
from prelar.report.published import STEPS, Published, comparable, published_results
from prelar.report.runs import Run, find_runs
from prelar.report.statistics import Estimate
from prelar.report.variants import Variant, aggregate, at_step, differences, essential, group
from prelar.utils.files import write_text
from prelar.utils.tables import evenly_spaced_indices

PAGE = Path("reports/compare.html")


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
    """Write the page that compares the runs of some revisions. Raises `UserError` where one lacks results."""
    runs = find_runs(names, root)
    write_text(output, render(runs))
    print(f"report: {len(runs)} run{'s' if len(runs) > 1 else ''} compared in {output}", flush=True)


def render(runs: Sequence[Run]) -> str:
    """The page's text."""
    variants, repeats = group(runs)
    refusal, published = select_published(variants)
    lines = [Series(f"{found.label} (published)", STEPS, found.success) for found in published]
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
                "learning": compare_curves(variants, "success", lines) + compare_curves(variants, "return"),
                "pretraining": [chart for name in PRETRAINING for chart in compare_curves(variants, name)],
                "offline": [chart for name in OFFLINE for chart in compare_curves(variants, name)],
                "prediction": compare_curves(variants, "prediction"),
                "efficiency": efficiency(variants, published),
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
    ends = [steps[-1] for variant in variants if (steps := aggregate(variant, "success")[0])]
    params = [essential(run.params) for variant in variants for run in variant.runs]
    refusal = comparable(params, tasks, max(ends, default=0))
    if refusal is None and any(set(variant.tasks) != tasks for variant in variants):
        refusal = "the settings were not run on the same tasks"
    return refusal, [] if refusal else published_results(tasks)


# --- Tables -------------------------------------------------------------------------------------------------


def efficiency(variants: Sequence[Variant], published: Sequence[Published]) -> list[Row]:
    """Rows of the table of sample efficiency: success at 1e5, at 2e5 and at the last common step."""
    rows = []
    for variant in variants:
        steps, estimates = aggregate(variant, "success")
        cells = [_efficiency_cell(at_step(variant, "success", step)) for step in STEPS]
        last = f"{_efficiency_cell(estimates[-1])} at {number(steps[-1])}" if steps else "no common step"
        ends = (estimates[-1], steps[-1]) if steps else (None, 0.0)
        rows.append(Row(variant.label, variant.size, (*cells, last), False, *ends))
    for result in published:
        means = [f"mean {number(100 * value)}%" for value in result.success]
        rows.append(Row(f"{result.label} (published)", result.source, (*means, ""), published=True))
    return rows


def _efficiency_cell(found: Estimate | None) -> str:
    if found is None:
        return "not reached"
    spread = f" [{interval(found, 100)}]" if found.low is not None else ""
    return f"{number(100 * found.iqm)}%{spread}, mean {number(100 * found.mean)}%"


def differences_table(variants: Sequence[Variant]) -> list[tuple[str, tuple[str, ...]]]:
    """Each key that differs among the variants, with its value in each."""
    settings = [{key: redact(value) for key, value in variant.settings.items()} for variant in variants]
    keys = differences([variant.settings for variant in variants])
    return [(key, tuple(_text(setting.get(key)) for setting in settings)) for key in keys]


def _text(value: Any) -> str:
    return "–" if value is None else str(value)
