"""The page that compares runs: one file that needs nothing else, made like the page of one run."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader

from prelar.report.catalog import OFFLINE, PREDICTION, PRETRAINING, RETURN, SUCCESS
from prelar.report.charts import charts, interval
from prelar.report.figures import Series, number
from prelar.report.page import TEMPLATES as SHARED
from prelar.report.page import environment
from prelar.report.provenance import commands, redact
from prelar.report.published import STEPS, Published, comparable, published
from prelar.report.runs import Run, find_runs
from prelar.report.statistics import Estimate
from prelar.report.variants import Variant, aggregate, at_step, differences, essential, group
from prelar.utils.files import write_text

PAGE = Path("reports/compare.html")
TEMPLATES = Path(__file__).parent / "templates"
METRICS = {
    "success_rate": "Success",
    "return": "Return",
    "prediction_error": "Prediction error",
    "prediction_error_policy": "Prediction error, own episodes",
    "probe_r2": "Probe R²",
}


@dataclass(frozen=True)
class Row:
    """A line of the table of sample efficiency: who, of how many runs, and a cell for each step.

    Ours have the aggregate at the last step too, and that step, where their runs share one.
    """

    label: str
    size: str
    cells: tuple[str, ...]
    theirs: bool = False
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
    templates = environment()
    templates.loader = FileSystemLoader([TEMPLATES, SHARED])
    refusal, theirs = held_against(variants)
    text: str = templates.get_template("compare.html.jinja").render(
        {
            "runs": runs,
            "variants": variants,
            "repeats": repeats,
            "tasks": sorted({task for variant in variants for task in variant.tasks}),
            "smoke": any(run.params.get("scale") == "smoke" for run in runs),
            "learning": charts(variants, SUCCESS, as_series(theirs)) + charts(variants, RETURN),
            "pretraining": [chart for kind in PRETRAINING for chart in charts(variants, kind)],
            "offline": [chart for kind in OFFLINE for chart in charts(variants, kind)],
            "prediction": charts(variants, PREDICTION),
            "efficiency": efficiency(variants, theirs),
            "refusal": refusal,
            "theirs": theirs,
            "differing": differences_table(variants),
            "metrics": {key: name for key, name in METRICS.items() if any(key in r.metrics for r in runs)},
            "origins": [origin(run) for run in runs],
            "shown": [(variant, media(variant)) for variant in variants],
        }
    )
    return text


# --- Published results --------------------------------------------------------------------------------------


def held_against(variants: Sequence[Variant]) -> tuple[str | None, list[Published]]:
    """Why the published results are not shown, and else those that are."""
    tasks = {task for variant in variants for task in variant.tasks}
    ends = [steps[-1] for variant in variants if (steps := aggregate(variant, "success")[0])]
    params = [essential(run.params) for variant in variants for run in variant.runs]
    refusal = comparable(params, tasks, max(ends, default=0))
    if refusal is None and any(set(variant.tasks) != tasks for variant in variants):
        refusal = "the settings were not run on the same tasks"
    return refusal, [] if refusal else published(tasks)


def as_series(theirs: Sequence[Published]) -> list[Series]:
    """Published success rates as lines of a chart."""
    return [Series(f"{found.label} (published)", STEPS, found.success) for found in theirs]


# --- Tables -------------------------------------------------------------------------------------------------


def efficiency(variants: Sequence[Variant], theirs: Sequence[Published]) -> tuple[tuple[str, ...], list[Row]]:
    """Headings and rows of the table of sample efficiency: success at 1e5, at 2e5 and at the last step."""
    rows = []
    for variant in variants:
        steps, estimates = aggregate(variant, "success")
        cells = [_efficiency_cell(at_step(variant, "success", step)) for step in STEPS]
        last = f"{_efficiency_cell(estimates[-1])} at {number(steps[-1])}" if steps else "no common step"
        ends = (estimates[-1], steps[-1]) if steps else (None, 0.0)
        rows.append(Row(variant.label, variant.size, (*cells, last), False, *ends))
    for p in theirs:
        told = [f"mean {number(100 * value)}%" for value in p.success]
        rows.append(Row(f"{p.label} (published)", p.source, (*told, ""), theirs=True))
    return ("1e5 steps", "2e5 steps", "last common step"), rows


def _efficiency_cell(found: Estimate | None) -> str:
    if found is None:
        return "not reached"
    spread = f" [{interval(found, 100)}]" if found.low is not None else ""
    return f"{number(100 * found.iqm)}%{spread}, mean {number(100 * found.mean)}%"


def differences_table(variants: Sequence[Variant]) -> list[tuple[str, tuple[str, ...]]]:
    """Each key that differs among the variants, with its value in each."""
    settings = [dict(variant.settings) for variant in variants]
    return [(key, tuple(_text(setting.get(key)) for setting in settings)) for key in differences(settings)]


def origin(run: Run) -> dict[str, Any]:
    """Where a run comes from, as the page shows it."""
    return {
        "run": run,
        "commands": commands(run.baseline, {key: redact(value) for key, value in run.changed.items()}),
        "inputs": {
            path: digest
            for path, digest in run.inputs.items()
            if path in (f"data/{run.params.get('dataset')}.zarr", "data/pretrain", "data/finetune")
        },
    }


def _text(value: Any) -> str:
    shown = redact(value)
    return "–" if shown is None else str(shown)


def media(variant: Variant) -> Mapping[str, str]:
    """Pictures and videos of the variant's first run as `data:` addresses, by name without dots."""
    kinds = {"png": "image/png", "mp4": "video/mp4"}
    return {
        name.replace(".", "_"): f"data:{kinds[name[-3:]]};base64,{base64.b64encode(content).decode('ascii')}"
        for name, content in variant.runs[0].media.items()
    }
