"""The page that shows a run: reports/index.html, one file that needs nothing else.

The page is a function of the files that the stages left behind, of params.yaml and of git: it holds no time
and nothing of the machine. Of the parameters it shows addresses without user, password and query, and of
absolute paths the last part. What a run does not have (DreamerV2 has no pre-training, a store may lack a
validation split) is said in a sentence where it would stand.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prelar.config import Config
from prelar.envs.names import suite_of
from prelar.report.catalog import EVALUATE, METHODS
from prelar.report.charts import number
from prelar.report.provenance import SAMPLE, flatten
from prelar.report.runs import Files, read_workspace
from prelar.report.sections import PAGE, SECTIONS
from prelar.utils.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
MEDIA_TYPES = {".png": "image/png", ".mp4": "video/mp4"}


def run(config: Config, root: Path = Path()) -> None:
    """Write reports/index.html under `root` from the results at hand.

    Raises:
        UserError: there is no metrics.json, so nothing was evaluated yet.
    """
    write_text(root / PAGE, render(config, root))
    print(f"report: {root / PAGE}", flush=True)


def render(config: Config, root: Path = Path()) -> str:
    """The page's text."""
    found = read_workspace(root, flatten(config.model_dump(mode="json")))
    method, account = METHODS[config.method]
    suite = suite_of(config.task)
    common = {
        "config": config,
        "suite": suite.title if suite else None,
        "method": method,
        "account": account,
        "pretrains": config.method != "dreamerv2" and config.pretrain.steps > 0,
        "metrics": found.metrics,
        "summary": found.files.load(EVALUATE / "summary.json") or {},
        "media": embed_media(found.files, map(Path, found.files.find(EVALUATE))),
        "stand_in": stand_in(config),
    }
    made = {
        name: values
        for name, (_, section) in SECTIONS.items()
        if (values := section(config, found)) is not None
    }
    shown = {"sections": {name: SECTIONS[name][0] for name in made}}
    for values in made.values():
        shown |= values
    page: str = environment().get_template("report.html.jinja").render({**common, **shown})
    return page


def environment() -> Environment:
    """The templates, with the filters that they use."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = number
    templates.filters["score"] = lambda value: f"{round(value, 2) + 0.0:.2f}".replace("-", "\u2212")
    templates.filters["grouped"] = lambda value: f"{value:,}"
    return templates


def embed_media(files: Files, paths: Iterable[Path]) -> dict[str, str]:
    """The pictures and videos of the evaluation among `paths` as `data:` addresses.

    Their names are their paths below the evaluation's folder, `open_loop_mp4` for `open_loop.mp4`.
    """
    media = {}
    for path in paths:
        if path.suffix in MEDIA_TYPES and (content := files.read(path)):
            name = re.sub("[./]", "_", path.relative_to(EVALUATE).as_posix())
            media[name] = (
                f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(content).decode('ascii')}"
            )
    return media


def stand_in(config: Config) -> str | None:
    """What the data are where they are not those that the data set's name promises."""
    if config.dataset == "ssv2" and config.ssv2.source == SAMPLE:
        return (
            "These are not clips of Something-Something V2 but the rendered sample, which is packed like it: "
            "Meta-World’s scripted experts and random motion."
        )
    if config.dataset == "demos" and config.demos.source == "metaworld":
        return "These are demonstrations of Meta-World’s scripted experts, not of RLBench."
    return None
