"""Prediction: error against frames ahead, and videos of truth, model and error."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from prelar.report.charts import Figure, trend
from prelar.report.figures import Series, line_chart, number
from prelar.report.results import Results, Section
from prelar.tables import read_tsv


def section(results: Results) -> Section:
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
