"""What the pages show of a run: the methods, and every metric and curve with its file and its texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

METRICS = Path("metrics.json")
EVALUATE = Path("reports/evaluate")
LEARNING = Path("reports/learning")
VALIDATION = Path("reports/validation")
EVALUATION_CURVES = Path("reports/finetune/plots/metrics/eval")
PRETRAINING_CURVES = Path("reports/pretrain/plots/metrics")
COMPARED_MEDIA = ("open_loop.mp4", "open_loop_poster.png", "action_swap.png")

ENVIRONMENT_STEPS = "environment steps"
UPDATES = "updates"

METHODS = {  # name as its authors write it, and what it does
    "dreamerv2": (
        "DreamerV2",
        "DreamerV2 is the baseline: its world model is trained on the task alone, without pre-training.",
    ),
    "apv": (
        "APV",
        "APV pre-trains an action-free world model on video. Fine-tuning stacks a second one on top, "
        "which is conditioned on the robot’s actions.",
    ),
    "contextwm": (
        "ContextWM",
        "ContextWM pre-trains an action-free world model on video. A context frame of each clip carries the "
        "appearance, so that the dynamics can model the motion.",
    ),
    "prelar": (
        "PreLAR",
        "PreLAR infers a latent action between each frame and the next, so that an action-conditional world "
        "model can be pre-trained on video without actions. Fine-tuning encodes the robot’s actions into the "
        "same space.",
    ),
}
METRIC_NAMES = {
    "success_rate": "Success",
    "return": "Return",
    "return_low": "Return, lower end",
    "return_random_high": "Random return, upper end",
    "prediction_error": "Prediction error",
    "prediction_error_policy": "Prediction error, own episodes",
    "probe_r2": "Probe R²",
    "controllability_db": "Controllability, dB",
}

Curve = tuple[Sequence[float], Sequence[float]]  # steps and values


@dataclass(frozen=True)
class CurveSpec:
    """Where a curve is found and how it is drawn.

    Attributes:
        file: table that holds it, by path from the top of the project.
        column: of the table, drawn against its column `step`.
        title: of the chart.
        x, y: names of the axes with their units.
        caption: what stands below the chart.
        limits: of y, where they are fixed.
        log_from: y is logarithmic where the highest value is more than so many times the lowest.
        reference: name and label of another curve of the same run, drawn behind in grey in comparisons.
    """

    file: str
    column: str
    title: str
    x: str
    y: str
    caption: str
    limits: tuple[float, float] | None = None
    log_from: float | None = None
    reference: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        """How a lone line is called: the caption's first words."""
        return re.split("[,.]", self.caption)[0]


def loss_curve(name: str, caption: str = "", y: str | None = None, folder: str = "loss") -> CurveSpec:
    """A metric that pre-training logs; the caption begins with what it is called, else its name does."""
    caption = caption or f"{name.replace('_', ' ').capitalize()}."
    label = caption.split(".")[0]
    file, title = f"{PRETRAINING_CURVES}/{folder}/{name}.tsv", f"{label} during pre-training"
    return CurveSpec(file, name, title, UPDATES, y or label.lower(), caption, log_from=30)


_LOSSES = (
    loss_curve(
        "image",
        "Reconstruction. Half the squared error of the decoded frame, summed over pixels and channels.",
        "reconstruction, squared error / 2 of an image",
    ),
    loss_curve(
        "kl",
        "Dynamics KL. Divergence of the state’s posterior from its prior: what the dynamics did not predict.",
        "dynamics KL, nats",
    ),
    loss_curve(
        "action_kl",
        "Action KL. Divergence of the latent action from N(0, I): how much information it carries.",
        "action KL, nats",
    ),
    loss_curve(
        "consistency",
        "Consistency. How far the order of the action distances disagrees with that of the state distances.",
        "consistency loss",
    ),
    loss_curve(
        "total",
        "Total. The weighted sum of the losses, which is minimised.",
        "total, weighted sum of the losses",
    ),
    loss_curve(
        "prediction_error",
        "Prediction error. Mean squared error of the imagined frames of held-out clips; pixels in [0, 1].",
        "prediction error, mean squared",
        folder="validation",
    ),
)
_PREDICTION = CurveSpec(
    f"{EVALUATE}/prediction.tsv",
    "model",
    "Open-loop prediction error on held-out clips",
    "frames ahead",
    "prediction error, mean squared",
    "Mean squared error on held-out clips, pixels in [0, 1].",
    reference=("prediction_copy", "copying the last observed frame"),
)
_ERROR = CurveSpec(
    f"{EVALUATE}/offline_pretrained.tsv",
    "error",
    "Prediction error of the fitted world model on held-out episodes",
    UPDATES,
    "prediction error, mean squared",
    "Mean squared error of the images of held-out episodes, pixels in [0, 1].",
    log_from=1,
    reference=("offline_scratch_error", "from scratch"),
)
_REWARD_ERROR = CurveSpec(
    f"{EVALUATE}/offline_pretrained.tsv",
    "reward_error",
    "Reward error of the fitted world model on held-out episodes",
    UPDATES,
    "reward error, mean squared",
    "Mean squared error of the rewards of held-out episodes.",
    log_from=1,
    reference=("offline_scratch_reward_error", "from scratch"),
)
_PROBE = CurveSpec(
    f"{EVALUATE}/probe_gaps.tsv",
    "latent",
    "R² of the latent action by the distance between frames",
    "frames apart",
    "R², mean of the four targets",
    "Latent action, R² on held-out episodes of random actions, by the distance between the frames of a pair; "
    "values below 0 are drawn at 0.",
    limits=(0.0, 1.0),
    reference=("probe_gaps_difference", "raw frame difference"),
)
_SCRATCH = f"{EVALUATE}/offline_scratch.tsv"
CURVES: Mapping[str, CurveSpec] = {
    "success": CurveSpec(
        f"{EVALUATION_CURVES}/success.tsv",
        "success",
        "Success rate during fine-tuning",
        ENVIRONMENT_STEPS,
        "success rate, share of the evaluation episodes",
        "Success rate, share of the evaluation episodes.",
        limits=(0.0, 1.0),
    ),
    "return": CurveSpec(
        f"{EVALUATION_CURVES}/return.tsv",
        "return",
        "Return during fine-tuning",
        ENVIRONMENT_STEPS,
        "return, mean of the evaluation episodes",
        "Return, mean of the evaluation episodes.",
    ),
    **{f"pretrain_{spec.column}": spec for spec in _LOSSES},
    "offline_pretrained_error": _ERROR,
    "offline_pretrained_reward_error": _REWARD_ERROR,
    "offline_scratch_error": replace(_ERROR, file=_SCRATCH, reference=None),
    "offline_scratch_reward_error": replace(_REWARD_ERROR, file=_SCRATCH, reference=None),
    "prediction": _PREDICTION,
    "prediction_copy": replace(_PREDICTION, column="copy", reference=None),
    "prediction_policy": replace(
        _PREDICTION,
        file=f"{EVALUATE}/prediction_policy.tsv",
        title="Open-loop prediction error on the agent’s own episodes",
        caption="Mean squared error on the agent’s own episodes, pixels in [0, 1].",
        reference=None,
    ),
    "probe_gaps": _PROBE,
    "probe_gaps_difference": replace(_PROBE, column="difference", reference=None),
}
PRETRAINING = tuple(f"pretrain_{spec.column}" for spec in _LOSSES)
OFFLINE = ("offline_pretrained_error", "offline_pretrained_reward_error")
