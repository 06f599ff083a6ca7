"""The files of a run that its page is made from, and the record of one section of the page."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelar.config import Config
from prelar.errors import UserError
from prelar.files import parse_json

PAGE = Path("reports/index.html")
METRICS = Path("metrics.json")
EVALUATE = Path("reports/evaluate")
SAMPLE = Path("data/sample")

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


@dataclass(frozen=True)
class Results:
    """The results at hand under `root`, of a run with the parameters `config`."""

    config: Config
    root: Path = Path()

    @property
    def folder(self) -> Path:
        """What the evaluation left."""
        return self.root / EVALUATE

    @property
    def pretrains(self) -> bool:
        """Whether this run has a pre-training."""
        return self.config.method != "dreamerv2" and self.config.pretrain.steps > 0

    @property
    def method(self) -> str:
        """The method's name as its authors write it."""
        return METHODS[self.config.method][0]

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """All figures of the evaluation. Raises `UserError` where nothing was evaluated yet."""
        chief = read_json(self.root / METRICS)
        if chief is None:
            raise UserError(f"{self.root / METRICS}: no such file; run `dvc repro evaluate` first")
        return {**(read_json(self.folder / METRICS.name) or {}), **chief}

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """What the evaluation says beside its figures; empty where it said nothing."""
        return dict(read_json(self.folder / "summary.json") or {})

    @functools.cached_property
    def media(self) -> dict[str, str]:
        """Pictures and videos of the evaluation as `data:` addresses, `open_loop.mp4` by `open_loop_mp4`."""
        paths = [path for path in sorted(self.folder.glob("*")) if path.suffix in (".png", ".mp4")]
        return {path.name.replace(".", "_"): data_uri(path) for path in paths}

    def values(self) -> dict[str, Any]:
        """What every template sees."""
        return {
            "config": self.config,
            "method": self.method,
            "account": METHODS[self.config.method][1],
            "pretrains": self.pretrains,
            "metrics": self.metrics,
            "summary": self.summary,
            "media": self.media,
            "stand_in": stand_in(self.config),
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


def data_uri(path: Path) -> str:
    """A PNG or MP4 file as a `data:` address."""
    kind = {".png": "image/png", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def read_json(path: Path) -> Any:
    """A JSON file's value, None where there is no file. Raises `UserError` where it is not JSON."""
    if not path.exists():
        return None
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run `dvc repro evaluate` again") from None
