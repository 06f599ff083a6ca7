"""What the sections of the page of one run show: for each template under `templates/sections` its values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prelar.config import Config
from prelar.report.catalog import (
    CURVES,
    ENVIRONMENT_STEPS,
    EVALUATE,
    LEARNING,
    METHODS,
    OFFLINE,
    PRETRAINING,
    PRETRAINING_CURVES,
    VALIDATION,
    Curve,
    CurveSpec,
    loss_curve,
)
from prelar.report.charts import Figure, Series, figure, interval_figure
from prelar.report.provenance import data_prefixes, flatten, redact
from prelar.report.runs import Files, Run

PAGE = Path("reports/index.html")
STAGES = ("pretrain", "finetune", "evaluate")
Values = dict[str, Any]


def task(config: Config, run: Run) -> Values:
    """Success and return of the evaluations during fine-tuning, and the evaluation episodes."""
    table = run.files.table(EVALUATE / "episodes.tsv")
    summary = run.files.load(EVALUATE / "summary.json") or {}
    return {
        "returns": returns_figure(summary.get("episodes", {}).get("policies", [])),
        "learning": curve_figures(run.curves, "success", "return"),
        "episodes": [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)],
    }


def returns_figure(policies: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The return of each policy with its interval; None where there is none."""
    if not policies:
        return None
    counts = ", ".join(f"{policy['episodes']} of {policy['name']}" for policy in policies)
    return interval_figure(
        "Return of each policy",
        "return, mean of the episodes",
        [(policy["name"], policy["return"], policy["low"], policy["high"]) for policy in policies],
        identifier="returns",
        caption=f"Mean return and its 95% interval, a bootstrap over episodes: {counts}.",
    )


def curve_figures(curves: Mapping[str, Curve], *names: str) -> list[Figure]:
    """A chart for each of the named curves that there are."""
    found = [(name, CURVES[name]) for name in names if name in curves]
    return [figure(spec, [Series(spec.label, *curves[name])], identifier=name) for name, spec in found]


def learning(config: Config, run: Run) -> Values | None:
    """The learning bench; None where it was not run."""
    summary = run.files.load(LEARNING / "summary.json")
    if summary is None or "tasks" not in summary:
        return None
    table = run.files.table(LEARNING / "curves.tsv")
    curves = [
        _bench_figure(
            row, table["step"], [table[f"{row['task']} return {n}"] for n in range(summary["seeds"])]
        )
        for row in summary["tasks"]
    ]
    return {"bench": summary, "learner": METHODS[summary["method"]][0], "curves": curves}


def _bench_figure(row: Mapping[str, Any], steps: list[float], seeds: list[list[float]]) -> Figure:
    """The learning bench on one task: mean of the seeds and their range against random actions."""
    points = list(zip(*seeds, strict=True))
    mean = [sum(point) / len(point) for point in points]
    title = f"Return on {row['task']} against random actions"
    return figure(
        CurveSpec(str(LEARNING / "curves.tsv"), "return", title, ENVIRONMENT_STEPS, "return", ""),
        [Series("mean of the seeds", steps, mean, [min(p) for p in points], [max(p) for p in points])],
        identifier=f"learning-bench-{row['task']}",
        behind=[Series("random actions", [0.0, steps[-1]], [row["chance"]] * 2)],
        columns={"Environment steps": steps, "Mean": mean}
        | {f"Seed {seed}": values for seed, values in enumerate(seeds)},
    )


def prediction(config: Config, run: Run) -> Values:
    """Open-loop prediction, of the pre-trained model and of the fine-tuned one."""
    summary = run.files.load(EVALUATE / "summary.json") or {}
    return {
        "prediction": _prediction_figure(run, "prediction"),
        "prediction_policy": _prediction_figure(run, "prediction_policy"),
        "held_out": summary.get("prediction"),
        "own": summary.get("prediction_policy"),
        "sources": summary.get("sources", []),
    }


def _prediction_figure(run: Run, name: str) -> Figure | None:
    """Error of the prediction, and of what predicts without a model, against frames predicted."""
    spec = CURVES[name]
    table = run.files.table(spec.file)
    if not table:
        return None
    lines = [
        Series("model", table["step"], table["model"]),
        Series("copy last frame", table["step"], table["copy"]),
    ]
    columns = {
        spec.x: "step",
        "Model": "model",
        "Copy": "copy",
        "Model, dB": "model_psnr",
        "Copy, dB": "copy_psnr",
    }
    if "median" in table:
        lines.append(Series("median of the training frames", table["step"], table["median"]))
        columns |= {"Median": "median", "Median, dB": "median_psnr"}
    return figure(
        spec,
        lines,
        identifier=name.replace("_", "-"),
        columns={heading: table[column] for heading, column in columns.items()},
    )


def offline(config: Config, run: Run) -> Values:
    """What the checkpoint is worth, without any policy: the world model fitted to fixed episodes."""
    starts = {"pre-trained": "offline_pretrained", "from scratch": "offline_scratch"}
    tables = {
        label: table
        for label, start in starts.items()
        if (table := run.files.table(CURVES[f"{start}_error"].file))
    }
    summary = run.files.load(EVALUATE / "summary.json") or {}
    policies = summary.get("episodes", {}).get("policies", [])
    return {
        "charts": [_offline_figure(name, tables) for name in OFFLINE if tables],
        "fits": summary.get("offline"),
        "expert": any(policy["name"] == "scripted expert" for policy in policies),
    }


def _offline_figure(name: str, tables: Mapping[str, Mapping[str, list[float]]]) -> Figure:
    """One error against updates, a line for each start; the table has the spread over seeds."""
    spec = CURVES[name]
    steps = next(iter(tables.values()))["step"]
    kinds = {"mean": "", "lowest": "_min", "highest": "_max"}
    return figure(
        spec,
        [Series(label, steps, table[spec.column]) for label, table in tables.items()],
        identifier=name.replace("_", "-"),
        columns={spec.x: steps}
        | {
            f"{label}, {kind}": table[spec.column + suffix]
            for label, table in tables.items()
            for kind, suffix in kinds.items()
        },
    )


def action(config: Config, run: Run) -> Values:
    """What the latent action means: in episodes of random actions, and in recorded ones."""
    names = ("probe", "probe_demonstrations")
    return {
        "probes": {name: run.files.load(EVALUATE / f"{name}.json") for name in names},
        "gaps": {name: _gaps_figure(run, name) for name in names},
    }


def _gaps_figure(run: Run, name: str) -> Figure | None:
    """R² of the latent action and of two controls against how far apart the frames of a pair are."""
    spec = replace(CURVES["probe_gaps"], file=str(EVALUATE / f"{name}_gaps.tsv"))
    table = run.files.table(spec.file)
    if not table:
        return None
    lines = {
        "latent action": "latent",
        "untrained encoder": "untrained",
        "raw frame difference": "difference",
    }
    return figure(
        spec,
        [Series(label, table["step"], table[column]) for label, column in lines.items()],
        identifier=f"{name.replace('_', '-')}-gaps",
    )


def pretraining(config: Config, run: Run) -> Values:
    """The losses, and what else pre-training logged, to stand behind a fold."""
    figures = loss_figures(run.files)
    known = {name: chart for name, chart in figures.items() if f"pretrain_{name}" in CURVES}
    return {
        "pretraining": list(known.values()),
        "pretraining_more": [chart for name, chart in figures.items() if name not in known],
    }


def loss_figures(files: Files) -> dict[str, Figure]:
    """A chart for each metric that pre-training logged, by name, with a line for each folder that has it."""
    found: dict[str, dict[str, Curve]] = {}
    for path in map(Path, files.find(PRETRAINING_CURVES)):
        if path.suffix == ".tsv" and path.stem != "step" and (curve := files.curve(path, path.stem)):
            place = path.parent.relative_to(PRETRAINING_CURVES).as_posix()
            found.setdefault(path.stem, {})["all" if place == "." else place] = curve
    known = [CURVES[name].column for name in PRETRAINING]
    figures = {}
    for name in [name for name in known if name in found] + sorted(found.keys() - known):
        spec = CURVES.get(f"pretrain_{name}") or loss_curve(name)
        lines = [Series(place, *curve) for place, curve in list(found[name].items())[:4]]
        if len(lines) == 1:
            lines = [replace(lines[0], label=spec.label)]
        figures[name] = figure(spec, lines, identifier=f"pretrain-{name.replace('_', '-')}")
    return figures


def data(config: Config, run: Run) -> Values:
    """The store of this run, and what its validation found."""
    return {
        "dataset": run.files.load(EVALUATE / "dataset.json"),
        "validation": run.files.load(config.store.with_suffix(".json")),
        "documents": (VALIDATION / config.dataset / "index.html").relative_to(PAGE.parent).as_posix(),
    }


def origin(config: Config, run: Run) -> Values:
    """Where the run comes from."""
    return {"run": run, "params": params_groups(config)}


def params_groups(config: Config) -> dict[str, dict[str, str]]:
    """The parameters that this run used, as text: for ablations, for the data, and the chosen presets.

    What is private in them is left out.
    """
    flat = flatten(config.model_dump(mode="json"))
    data = data_prefixes(flat)
    groups: dict[str, dict[str, str]] = {"Ablation": {}, "Data": {}}
    groups.update({f"scales.{config.scale}.{stage}": {} for stage in STAGES})
    for key, value in flat.items():
        shown = redact(value)
        text = json.dumps(shown, ensure_ascii=False) if not isinstance(shown, str) else shown
        if f"{key}.".startswith(data):
            groups["Data"][key] = text
        elif key.startswith(f"scales.{config.scale}."):
            group, _, name = key.rpartition(".")
            groups[group][name] = text
        elif "." not in key and key not in ("sources", "mixtures", "unions"):
            groups["Ablation"][key] = text
    return groups


SECTIONS: Mapping[str, tuple[str, Callable[[Config, Run], Values | None]]] = {
    "task": ("The task", task),
    "learning": ("Does the agent learn?", learning),
    "prediction": ("Prediction", prediction),
    "offline": ("Does pre-training help?", offline),
    "action": ("Latent action", action),
    "pretraining": ("Pre-training", pretraining),
    "data": ("Data", data),
    "origin": ("Origin", origin),
}  # name of the template and of the anchor → title, and what makes the values; a section without is left out
