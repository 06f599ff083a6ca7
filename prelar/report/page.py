"""The page that shows a run: reports/index.html, one file that needs nothing else.

The page is a function of the files that the stages left behind, of params.yaml and of git: it holds no time
and nothing of the machine. Of the parameters it shows addresses without user, password and query, and of
absolute paths the last part. What a run does not have (DreamerV2 has no pre-training, a store may lack a
validation split) is said in a sentence where it would stand.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prelar.config import Config
from prelar.errors import UserError
from prelar.files import write_text
from prelar.report.figures import Series, line_chart, number, thin
from prelar.report.privacy import presentable
from prelar.report.provenance import find_provenance, flatten
from prelar.tables import read_tsv

PAGE = Path("reports/index.html")
METRICS = Path("metrics.json")
EVALUATE = Path("reports/evaluate")
SAMPLE = Path("data/sample")
VALIDATION = Path("reports/validation")
CURVES = Path("reports/finetune/plots/metrics/eval")
TEMPLATES = Path(__file__).parent / "templates"
TABLE_ROWS = 12

METHODS = {
    "dreamerv2": (
        "DreamerV2",
        "DreamerV2 learns its world model from the task alone, without any pre-training: it is the baseline.",
    ),
    "apv": (
        "APV",
        "APV pre-trains a world model without actions on video, and stacks a second one, conditioned on the "
        "robot’s actions, on top of it for control.",
    ),
    "contextwm": (
        "ContextWM",
        "ContextWM pre-trains a world model without actions on video; one context frame of each clip carries "
        "the appearance, so that the dynamics are free to follow what moves.",
    ),
    "prelar": (
        "PreLAR",
        "PreLAR infers a latent action between each frame and the next, so that a world model conditioned on "
        "actions can be pre-trained on video that has none; fine-tuning encodes the robot’s actions into the "
        "same space.",
    ),
}
LOSSES = {
    "image": (
        "Reconstruction",
        "Squared error of the decoded frame, halved and summed over pixels and channels.",
    ),
    "kl": (
        "Dynamics KL",
        "Posterior against prior of the state, in nats: what the dynamics failed to foresee.",
    ),
    "action_kl": ("Action KL", "Latent action against N(0, I), in nats: what the action carries."),
    "consistency": (
        "Consistency",
        "Disagreement between the orders of action distances and state distances.",
    ),
    "lower_kl": ("Dynamics KL, lower", "Posterior against prior of the action-free states, in nats."),
    "total": ("Total", "The weighted sum that is minimised."),
    "prediction_error": ("Prediction error", "Of the frames that the model does not see, while it learns."),
}


@dataclass(frozen=True)
class Figure:
    """One chart: its SVG, caption, and the table behind it (headings, rows)."""

    svg: Markup
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def run(config: Config, root: Path = Path()) -> None:
    """Write reports/index.html under `root` from the results at hand.

    Raises:
        UserError: there is no metrics.json, so nothing was evaluated yet.
    """
    write_text(root / PAGE, render(config, root))
    print(f"report: {root / PAGE}", flush=True)


def render(config: Config, root: Path = Path()) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["score"] = lambda value: f"{round(value, 2) + 0.0:.2f}".replace("-", "\u2212")
    environment.filters["grouped"] = lambda value: f"{value:,}"
    page: str = environment.get_template("report.html.jinja").render(gather(config, root))
    return page


def gather(config: Config, root: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    folder = root / EVALUATE
    metrics = _read_json(root / METRICS)
    if metrics is None:
        raise UserError(f"{root / METRICS}: no such file; run `dvc repro evaluate` first")
    name, account = METHODS[config.method]
    provenance = find_provenance(config, root)
    curves: dict[bool, list[Figure]] = {True: [], False: []}
    for loss, figure in loss_curves(root / "reports/pretrain/plots/metrics", "pre").items():
        curves[loss in LOSSES].append(figure)
    return {
        "config": config,
        "method": name,
        "account": account,
        "pretrains": config.method != "dreamerv2" and config.pretrain.steps > 0,
        "metrics": metrics,
        "summary": _read_json(folder / "summary.json") or {},
        "episodes": _episodes(folder / "episodes.tsv"),
        "learning": learning_curves(root / CURVES),
        "pretraining": curves[True],
        "pretraining_more": curves[False],
        "prediction": prediction_chart(folder / "prediction.tsv", "prediction"),
        "prediction_policy": prediction_chart(folder / "prediction_policy.tsv", "prediction-policy"),
        "dataset": _read_json(folder / "dataset.json"),
        "probe": _read_json(folder / "probe.json"),
        "media": {path.stem + path.suffix.replace(".", "_"): data_uri(path) for path in _media(folder)},
        "validation": (VALIDATION / config.dataset / "index.html").relative_to(PAGE.parent).as_posix(),
        "stand_in": stand_in(config),
        "provenance": provenance,
        "params": params_groups(config),
    }


def stand_in(config: Config) -> str | None:
    """What the data are where they are not those that the data set's name promises."""
    if config.dataset == "ssv2" and config.ssv2.source == str(SAMPLE):
        return (
            "These are not clips of Something-Something V2, but the project’s own sample in the same shape: "
            "Meta-World’s scripted experts, rendered."
        )
    if config.dataset == "rlbench" and config.rlbench.source == "metaworld":
        return "These are demonstrations of Meta-World’s scripted experts, not of RLBench."
    return None


def params_groups(config: Config) -> dict[str, dict[str, str]]:
    """The parameters that this run used, as text: for ablations, for the data, and the chosen presets.

    What is private in them is left out.
    """
    flat = {key: presentable(value) for key, value in flatten(config.model_dump(mode="json")).items()}
    stages = ("pretrain", "finetune", "evaluate")
    groups: dict[str, dict[str, str]] = {"Ablation": {}, "Data": {}}
    groups.update({f"scales.{config.scale}.{stage}": {} for stage in stages})
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


def learning_curves(folder: Path) -> list[Figure]:
    """Success and return of the evaluations during fine-tuning, against environment steps.

    `folder` holds `success.tsv` and `return.tsv`, the names under which fine-tuning logs them.
    """
    figures = []
    for name, title, unit, limits in (
        ("success", "Success rate", "share of evaluation episodes", (0.0, 1.0)),
        ("return", "Return", "mean of the evaluation episodes", None),
    ):
        path = folder / f"{name}.tsv"
        curve = _curve(path) if path.exists() else None
        if curve:
            steps, values = curve
            chart = line_chart(
                [Series(title, steps, values)],
                identifier=f"learning-{name}",
                title=f"{title} during fine-tuning",
                description=_trend(title, steps, values, "environment steps"),
                x_label="environment steps",
                y_label=_lower(title),
                y_range=limits,
            )
            figures.append(_figure(chart, f"{title}, {unit}.", "Environment steps", {title: curve}))
    return figures


def loss_curves(folder: Path, prefix: str) -> dict[str, Figure]:
    """A chart for each metric logged under `folder`, by name, with a line for each place it is logged in."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        curve = _curve(path)
        place = path.parent.relative_to(folder).as_posix()
        if curve and path.stem != "step":
            found.setdefault(path.stem, {})["all" if place == "." else place] = curve
    order = [name for name in LOSSES if name in found] + [
        name for name in sorted(found) if name not in LOSSES
    ]
    figures = {}
    for name in order:
        title, caption = LOSSES.get(name, (name.replace("_", " ").capitalize(), ""))
        lines = dict(list(found[name].items())[:4])
        values = [v for _, y in lines.values() for v in y]
        log = min(values) > 0 and max(values) > 30 * min(values)
        chart = line_chart(
            [Series(place, *curve) for place, curve in lines.items()],
            identifier=f"{prefix}-{name.replace('_', '-')}",
            title=f"{title} during pre-training",
            description=" ".join(_trend(place, *curve, "updates") for place, curve in lines.items()),
            x_label="updates",
            y_label=_lower(title),
            log=log,
        )
        headings = {title if len(lines) == 1 else place: curve for place, curve in lines.items()}
        figures[name] = _figure(chart, f"{title}. {caption}".strip(), "Updates", headings)
    return figures


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
        description=" ".join(_trend(label, steps, values, "frames ahead") for label, values in lines.items()),
        x_label="frames ahead",
        y_label="mean squared error",
    )
    rows = tuple(
        tuple(number(value) for value in row)
        for row in zip(
            *(table[name] for name in ("step", "model", "copy", "model_psnr", "copy_psnr")), strict=True
        )
    )
    headings = ("Frames ahead", "Model", "Copy", "Model, dB", "Copy, dB")
    return Figure(Markup(chart), "", headings, rows)


def data_uri(path: Path) -> str:
    """A PNG or MP4 file as a `data:` address."""
    kind = {".png": "image/png", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _media(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix in (".png", ".mp4")]


def _figure(
    chart: str, caption: str, x_name: str, curves: dict[str, tuple[list[float], list[float]]]
) -> Figure:
    """A chart with a table of at most `TABLE_ROWS` rows, evenly spread; x of the first curve."""
    steps = next(iter(curves.values()))[0]
    columns = [y if x == steps else [float("nan")] * len(steps) for x, y in curves.values()]
    count = min(TABLE_ROWS, len(steps))
    picks = sorted({round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)})
    rows = tuple((number(steps[i]), *(number(column[i]) for column in columns)) for i in picks)
    return Figure(Markup(chart), caption, (x_name, *curves), rows)


def _curve(path: Path) -> tuple[list[float], list[float]] | None:
    """Steps and values of one DVCLive table, finite points only; None where there are none."""
    table = read_tsv(path)
    if "step" not in table or path.stem not in table:
        return None
    x, y = thin(table["step"], table[path.stem], limit=len(table["step"]) or 1)
    return (x.tolist(), y.tolist()) if len(x) else None


def _trend(name: str, steps: list[float], values: list[float], unit: str) -> str:
    if len(values) == 1:
        return f"{name}: {number(values[0])} at {number(steps[0])} {unit}."
    first, last = f"{number(values[0])} at {number(steps[0])}", f"{number(values[-1])} at {number(steps[-1])}"
    return (
        f"{name}: from {first} to {last} {unit}; lowest {number(min(values))}, highest {number(max(values))}."
    )


def _lower(title: str) -> str:
    """A title as it stands within a sentence."""
    return title[0].lower() + title[1:]


def _episodes(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    table = read_tsv(path)
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _read_json(path: Path) -> Any:
    """A JSON file's value, None where there is no file. Raises `UserError` where it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); run `dvc repro evaluate` again") from None
