"""Pre-training: the losses against updates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prelar.report.charts import Curve, Figure, figure, read_curve, spreads, trend
from prelar.report.figures import Series, line_chart
from prelar.report.results import Results, Section

CURVES = Path("reports/pretrain/plots/metrics")


@dataclass(frozen=True)
class Loss:
    """What pre-training logs: how it is called, its axis, what it is, and the folder that it is logged to."""

    title: str
    axis: str
    caption: str
    place: str = "loss"


LOSSES = {
    "image": Loss(
        "Reconstruction",
        "reconstruction, squared error / 2 of an image",
        "Squared error of the decoded frame, halved and summed over pixels and channels.",
    ),
    "kl": Loss(
        "Dynamics KL",
        "dynamics KL, nats",
        "Posterior against prior of the state: what the dynamics failed to foresee.",
    ),
    "action_kl": Loss(
        "Action KL", "action KL, nats", "Latent action against N(0, I): what the action carries."
    ),
    "consistency": Loss(
        "Consistency",
        "consistency loss",
        "Disagreement between the orders of action distances and state distances.",
    ),
    "total": Loss("Total", "total, weighted sum of the losses", "The weighted sum that is minimised."),
    "prediction_error": Loss(
        "Prediction error",
        "prediction error, mean squared",
        "Of the frames of held-out clips that the model does not see, while it learns; pixels in [0, 1].",
        place="validation",
    ),
}


def section(results: Results) -> Section:
    """The section on pre-training: the losses, and what else was logged behind a fold."""
    curves: dict[bool, list[Figure]] = {True: [], False: []}
    for loss, chart in loss_curves(results.root / CURVES, "pre").items():
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
