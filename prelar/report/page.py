"""The page that shows a run: reports/index.html, one file that needs nothing else.

The page is a function of the files that the stages left behind, of params.yaml and of git: it holds no time
and nothing of the machine. Of the parameters it shows addresses without user, password and query, and of
absolute paths the last part. What a run does not have (DreamerV2 has no pre-training, a store may lack a
validation split) is said in a sentence where it would stand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prelar.config import Config
from prelar.report import sections
from prelar.report.figures import number
from prelar.report.runs import PAGE, Results
from prelar.report.sections import Section
from prelar.utils.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    sections.task,
    sections.learning,
    sections.prediction,
    sections.offline,
    sections.action,
    sections.pretraining,
    sections.data,
    sections.origin,
)


def run(config: Config, root: Path = Path()) -> None:
    """Write reports/index.html under `root` from the results at hand.

    Raises:
        UserError: there is no metrics.json, so nothing was evaluated yet.
    """
    write_text(root / PAGE, render(config, root))
    print(f"report: {root / PAGE}", flush=True)


def render(config: Config, root: Path = Path()) -> str:
    """The page's text."""
    results = Results(config, root)
    common = results.values()
    templates = environment()
    shown = [section for make in SECTIONS if (section := make(results)) is not None]
    bodies = [
        Markup(
            templates.get_template(f"sections/{section.name}.html.jinja").render(
                {**common, **section.values, "section": section}
            )
        )
        for section in shown
    ]
    page: str = templates.get_template("report.html.jinja").render(
        {**common, "sections": shown, "bodies": bodies}
    )
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
