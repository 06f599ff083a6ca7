"""Charts of the curves of several settings, laid over one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prelar.comparison.revisions import Curve
from prelar.comparison.statistics import Estimate
from prelar.comparison.variants import Variant, aggregate
from prelar.report.charts import TABLE_ROWS, Figure, spreads, trend
from prelar.report.figures import DASHES, Series, line_chart, number
from prelar.report.sections.pretraining import LOSSES
from prelar.spread import evenly

ENVIRONMENT_STEPS = "environment steps"


@dataclass(frozen=True)
class Kind:
    """A curve of `Run.curves` as it is drawn.

    Attributes:
        name: of the curve.
        title: of the chart.
        x, y: names of the axes with their units.
        caption: what stands below the chart.
        limits: of y, where they are fixed.
        log: whether y may be logarithmic, as it is where the curves spread far.
        behind: another curve of the same runs, drawn behind in grey, and what it is called.
    """

    name: str
    title: str
    x: str
    y: str
    caption: str
    limits: tuple[float, float] | None = None
    log: bool = False
    behind: tuple[str, str] | None = None


SUCCESS = Kind(
    "success",
    "Success rate while fine-tuning",
    ENVIRONMENT_STEPS,
    "success rate, interquartile mean",
    "Success rate of the evaluations during fine-tuning, at the steps that all runs of a setting have.",
    limits=(0.0, 1.0),
)
RETURN = Kind(
    "return",
    "Return while fine-tuning",
    ENVIRONMENT_STEPS,
    "return, interquartile mean",
    "Return of the evaluations during fine-tuning, at the steps that all runs of a setting have.",
)
PREDICTION = Kind(
    "prediction",
    "Open-loop prediction error on held-out clips",
    "frames ahead",
    "prediction error, mean squared",
    "Mean squared error on held-out clips, pixels in [0, 1].",
    behind=("prediction_copy", "copying the last frame seen"),
)
OFFLINE = (
    Kind(
        "offline_pretrained_error",
        "Prediction error of the fitted world model",
        "updates",
        "prediction error, mean squared",
        "Mean squared error of the images of held-out episodes, pixels in [0, 1].",
        log=True,
        behind=("offline_scratch_error", "from scratch"),
    ),
    Kind(
        "offline_pretrained_reward_error",
        "Reward error of the fitted world model",
        "updates",
        "reward error, mean squared",
        "Mean squared error of the rewards of held-out episodes, which lie between 0 and 10.",
        log=True,
        behind=("offline_scratch_reward_error", "from scratch"),
    ),
)
PRETRAINING = tuple(
    Kind(
        f"pretrain_{name}",
        f"{loss.title} during pre-training",
        "updates",
        loss.axis,
        f"{loss.title}. {loss.caption}",
        log=True,
    )
    for name, loss in LOSSES.items()
)


def charts(variants: Sequence[Variant], kind: Kind, behind: Sequence[Series] = ()) -> list[Figure]:
    """Charts of a curve, so many that each has lines that can be told apart; none where no run has it.

    A setting has the same line in the charts of every kind. `behind` is drawn behind in grey.
    """
    figures = []
    for part, begin in enumerate(range(0, len(variants), len(DASHES))):
        chosen = variants[begin : begin + len(DASHES)]
        found = [(style, variant, *aggregate(variant, kind.name)) for style, variant in enumerate(chosen)]
        drawn = [item for item in found if item[2]]
        if not drawn:
            continue
        lines, others = [_series(*item) for item in drawn], [*behind, *_others(chosen, kind)]
        values = [value for line in (*lines, *others) for value in line.y]
        chart = line_chart(
            lines,
            identifier=f"{kind.name.replace('_', '-')}-{part}",
            title=kind.title,
            description=" ".join(trend(line.label, list(line.x), list(line.y), kind.x) for line in lines),
            x_label=kind.x,
            y_label=kind.y,
            y_range=kind.limits,
            log=kind.log and spreads(values),
            behind=others,
        )
        rows = [row for _, variant, steps, estimates in drawn for row in _rows(variant, steps, estimates)]
        headings = ("Setting", kind.x.capitalize(), "IQM", "95%", "Mean")
        figures.append(Figure(Markup(chart), kind.caption, headings, tuple(rows)))
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


def _others(variants: Sequence[Variant], kind: Kind) -> list[Series]:
    """The curves behind those of some settings; settings that share one have it once."""
    if kind.behind is None:
        return []
    name, called = kind.behind
    shared: dict[Curve, list[str]] = {}
    for variant in variants:
        steps, estimates = aggregate(variant, name)
        if steps:
            shared.setdefault((tuple(steps), tuple(e.iqm for e in estimates)), []).append(variant.label)
    if len(shared) == 1:
        return [Series(called, steps, values) for steps, values in shared]
    return [Series(f"{'; '.join(who)}, {called}", curve[0], curve[1]) for curve, who in shared.items()]


def _rows(variant: Variant, steps: list[float], estimates: list[Estimate]) -> list[tuple[str, ...]]:
    return [
        (variant.label, number(steps[i]), number(e.iqm), interval(e), number(e.mean))
        for i in evenly(len(steps), TABLE_ROWS)
        for e in [estimates[i]]
    ]
