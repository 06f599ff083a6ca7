"""What a page can show of a run: the curves that stages log, how each is drawn, and what methods are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
METRICS = Path("metrics.json")
EVALUATE = Path("reports/evaluate")

EVALUATION_CURVES = Path("reports/finetune/plots/metrics/eval")

PRETRAINING_CURVES = Path("reports/pretrain/plots/metrics")


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
CURVES: Mapping[str, tuple[str, str]] = {
    **{name: (f"{EVALUATION_CURVES}/{name}.tsv", name) for name in ("success", "return")},
    **{
        f"pretrain_{name}": (f"{PRETRAINING_CURVES}/{loss.place}/{name}.tsv", name)
        for name, loss in LOSSES.items()
    },
    **{
        f"offline_{start}_{error}": (f"{EVALUATE}/offline_{start}.tsv", error)
        for start in ("pretrained", "scratch")
        for error in ("error", "reward_error")
    },
    "prediction": (f"{EVALUATE}/prediction.tsv", "model"),
    "prediction_copy": (f"{EVALUATE}/prediction.tsv", "copy"),
}  # each curve's file, and the column that is drawn against its steps

Curve = tuple[Sequence[float], Sequence[float]]

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
