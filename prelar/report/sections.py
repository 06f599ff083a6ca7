"""Pre-training: the losses against updates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prelar.config import Config
from prelar.report.catalog import EVALUATION_CURVES, LOSSES, METHODS, PRETRAINING_CURVES, Curve, Loss
from prelar.report.charts import Figure, figure, read_curve, spreads, trend
from prelar.report.figures import Series, line_chart, number
from prelar.report.provenance import find_provenance, flatten, redact
from prelar.report.runs import PAGE, Results, data_uri, read_json
from prelar.utils.tables import read_tsv


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: its anchor, and of its template `templates/sections/<name>.html.jinja`, which extends
            `section.html.jinja` and fills the blocks `intro` and `body`.
        title: its heading.
        values: what the template shows, beside what every template sees (`Results.values`).
        link: how the contents call it, where that is not the title.
    """

    name: str
    title: str
    values: Mapping[str, Any]
    link: str | None = None


def pretraining(results: Results) -> Section:
    """The section on pre-training: the losses, and what else was logged behind a fold."""
    curves: dict[bool, list[Figure]] = {True: [], False: []}
    for loss, chart in loss_curves(results.root / PRETRAINING_CURVES, "pre").items():
        curves[loss in LOSSES].append(chart)
    values = {"pretraining": curves[True], "pretraining_more": curves[False]}
    return Section("pretraining", "Pre-training", values)


def loss_curves(folder: Path, prefix: str) -> dict[str, Figure]:
    """A chart for each metric logged under `folder`, by name, with a line for each place it is logged in."""
    found: dict[str, dict[str, Curve]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        curve = read_curve(path)
        place = path.parent.relative_to(folder).as_posix()
        if curve and path.stem != "step":
            found.setdefault(path.stem, {})["all" if place == "." else place] = curve
    order = [name for name in LOSSES if name in found] + [
        name for name in sorted(found) if name not in LOSSES
    ]
    figures = {}
    for name in order:
        loss = LOSSES.get(name) or Loss(name.replace("_", " ").capitalize(), name.replace("_", " "), "")
        lines = dict(list(found[name].items())[:4])
        values = [v for _, y in lines.values() for v in y]
        log = spreads(values)
        chart = line_chart(
            [Series(place, *curve) for place, curve in lines.items()],
            identifier=f"{prefix}-{name.replace('_', '-')}",
            title=f"{loss.title} during pre-training",
            description=" ".join(trend(place, *curve, "updates") for place, curve in lines.items()),
            x_label="updates",
            y_label=loss.axis,
            log=log,
        )
        headings = {loss.title if len(lines) == 1 else place: curve for place, curve in lines.items()}
        figures[name] = figure(chart, f"{loss.title}. {loss.caption}".strip(), "Updates", headings)
    return figures


def action(results: Results) -> Section:
    """The section on what the latent action means: in episodes of random actions, and in recorded ones."""
    probes = {name: read_json(results.folder / f"{name}.json") for name in ("probe", "probe_demonstrations")}
    return Section("action", "Latent action", {"probes": probes})


VALIDATION = Path("reports/validation")


def data(results: Results) -> Section:
    """The section on the store of this run."""
    documents = VALIDATION / results.config.dataset / "index.html"
    dataset = read_json(results.folder / "dataset.json")
    values = {
        "dataset": dataset,
        "previews": [
            {**preview, "source": data_uri(results.folder / "previews" / preview["file"])}
            for preview in (dataset or {}).get("previews", [])
        ],
        "validation": read_json(results.root / results.config.store.with_suffix(".json")),
        "documents": documents.relative_to(PAGE.parent).as_posix(),
    }
    return Section("data", "Data", values)


FOLDER = Path("reports/learning")


def learning(results: Results) -> Section | None:
    """The section on the learning bench; None where it was not run."""
    summary = read_json(results.root / FOLDER / "summary.json")
    if summary is None:
        return None
    table = read_tsv(results.root / FOLDER / "curves.tsv")
    values = {
        "bench": summary,
        "name": METHODS[summary["method"]][0],
        "curve": _learning_chart(table, summary),
    }
    return Section("learning", "Does the agent learn?", values)


def _learning_chart(table: dict[str, list[float]], summary: dict[str, Any]) -> Figure:
    """Return against environment steps: mean over seeds, band from lowest to highest, chance behind."""
    steps = table["step"]
    seeds = [column for name, column in table.items() if name.startswith("return_")]
    points = list(zip(*seeds, strict=True))
    mean = [sum(point) / len(point) for point in points]
    chance = [summary["chance"]] * 2
    chart = line_chart(
        [Series("mean of the seeds", steps, mean, [min(p) for p in points], [max(p) for p in points])],
        identifier="learning-bench",
        title=f"Return on {summary['task']} against random actions",
        description=f"{trend('Return', steps, mean, 'environment steps')} "
        f"Random actions: {number(summary['chance'])}.",
        x_label="environment steps",
        y_label="return",
        behind=[Series("random actions", [0.0, steps[-1]], chance)],
    )
    headings = ("Environment steps", "Mean", *(f"Seed {seed}" for seed in range(len(seeds))))
    rows = tuple(tuple(number(value) for value in row) for row in zip(steps, mean, *seeds, strict=True))
    return Figure(Markup(chart), "", headings, rows)


STARTS = {"pretrained": "pre-trained", "scratch": "from scratch"}
ERRORS = {"error": "Prediction error", "reward_error": "Reward error"}


def offline(results: Results) -> Section:
    """The section on what the checkpoint is worth, without any policy."""
    paths = {label: results.folder / f"offline_{start}.tsv" for start, label in STARTS.items()}
    tables = {label: read_tsv(path) for label, path in paths.items() if path.exists()}
    charts = [_offline_chart(name, title, tables) for name, title in ERRORS.items()] if tables else []
    values = {"charts": charts, "fits": results.summary.get("offline")}
    return Section("offline", "Does pre-training help?", values)


def _offline_chart(name: str, title: str, tables: dict[str, dict[str, list[float]]]) -> Figure:
    """One error against updates, a line for each start; the table tells the spread over seeds."""
    steps = next(iter(tables.values()))["step"]
    chart = line_chart(
        [Series(label, steps, table[name]) for label, table in tables.items()],
        identifier=f"offline-{name.replace('_', '-')}",
        title=f"{title} of the world model on held-out episodes",
        description=" ".join(trend(label, steps, table[name], "updates") for label, table in tables.items()),
        x_label="updates",
        y_label=f"{title.lower()}, mean squared",
        log=all(value > 0 for table in tables.values() for value in table[name]),
    )
    kinds = {"mean": name, "lowest": f"{name}_min", "highest": f"{name}_max"}
    columns = [table[key] for table in tables.values() for key in kinds.values()]
    headings = ("Updates", *(f"{label}, {kind}" for label in tables for kind in kinds))
    rows = tuple(tuple(number(value) for value in row) for row in zip(steps, *columns, strict=True))
    return Figure(Markup(chart), f"{title}.", headings, rows)


STAGES = ("pretrain", "finetune", "evaluate")


def origin(results: Results) -> Section:
    """The section on where the run comes from."""
    values = {
        "provenance": find_provenance(results.config, results.root),
        "params": params_groups(results.config),
    }
    return Section("origin", "Origin", values)


def params_groups(config: Config) -> dict[str, dict[str, str]]:
    """The parameters that this run used, as text: for ablations, for the data, and the chosen presets.

    What is private in them is left out.
    """
    flat = {key: redact(value) for key, value in flatten(config.model_dump(mode="json")).items()}
    groups: dict[str, dict[str, str]] = {"Ablation": {}, "Data": {}}
    groups.update({f"scales.{config.scale}.{stage}": {} for stage in STAGES})
    for key, value in flat.items():
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        if "." not in key:
            groups["Ablation"][key] = text
        elif key.startswith((f"{config.dataset}.", "sample.")):
            groups["Data"][key] = text
        elif key.startswith(f"scales.{config.scale}."):
            group, _, name = key.rpartition(".")
            groups[group][name] = text
    return groups


def prediction(results: Results) -> Section:
    """The section on open-loop prediction, of the pre-trained model and of the fine-tuned one."""
    values = {
        "prediction": prediction_chart(results.folder / "prediction.tsv", "prediction"),
        "prediction_policy": prediction_chart(results.folder / "prediction_policy.tsv", "prediction-policy"),
        "held_out": results.summary.get("prediction"),
        "own": results.summary.get("prediction_policy"),
    }
    return Section("prediction", "Prediction", values)


def prediction_chart(path: Path, identifier: str) -> Figure | None:
    """Error of the open-loop prediction, and of copying the last frame, against frames predicted."""
    if not path.exists():
        return None
    table = read_tsv(path)
    steps = table["step"]
    lines = {"model": table["model"], "copy last frame": table["copy"]}
    chart = line_chart(
        [Series(label, steps, values) for label, values in lines.items()],
        identifier=identifier,
        title="Open-loop prediction error",
        description=" ".join(trend(label, steps, values, "frames ahead") for label, values in lines.items()),
        x_label="frames ahead",
        y_label="prediction error, mean squared",
    )
    columns = [table[name] for name in ("step", "model", "copy", "model_psnr", "copy_psnr")]
    rows = tuple(tuple(number(value) for value in row) for row in zip(*columns, strict=True))
    headings = ("Frames ahead", "Model", "Copy", "Model, dB", "Copy, dB")
    return Figure(Markup(chart), "", headings, rows)


def task(results: Results) -> Section:
    """The section on the task."""
    values = {
        "learning": learning_curves(results.root / EVALUATION_CURVES),
        "episodes": episodes(results.folder / "episodes.tsv"),
    }
    return Section("task", "The task", values)


def learning_curves(folder: Path) -> list[Figure]:
    """Success and return of the evaluations during fine-tuning, against environment steps.

    `folder` holds `success.tsv` and `return.tsv`, the names under which fine-tuning logs them.
    """
    figures = []
    for name, title, unit, limits in (
        ("success", "Success rate", "share of the evaluation episodes", (0.0, 1.0)),
        ("return", "Return", "mean of the evaluation episodes", None),
    ):
        path = folder / f"{name}.tsv"
        curve = read_curve(path) if path.exists() else None
        if curve:
            steps, values = curve
            chart = line_chart(
                [Series(title, steps, values)],
                identifier=f"learning-{name}",
                title=f"{title} during fine-tuning",
                description=trend(title, steps, values, "environment steps"),
                x_label="environment steps",
                y_label=f"{title.lower()}, {unit}",
                y_range=limits,
            )
            figures.append(figure(chart, f"{title}, {unit}.", "Environment steps", {title: curve}))
    return figures


def episodes(path: Path) -> list[dict[str, float]]:
    """The rows of the evaluation episodes' table; none where there is no table."""
    if not path.exists():
        return []
    table = read_tsv(path)
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
