"""The flow `pipeline`: one experiment of dvc.yaml with changed params, run beside the workspace."""

from __future__ import annotations

import json
import os
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import forms
from flows.dvc_command import busy, dvc, overrides
from flows.runtime import PAGES, PAGES_URL
from prelar.config import load_config
from prelar.errors import UserError
from prelar.files import write_text

NAMED = "Ran experiment(s):"
Params = forms.one_of_each()
UNCHANGED = Params()


@flow(name="pipeline")
def pipeline(params: Params = UNCHANGED, targets: tuple[str, ...] = ()) -> str:  # type: ignore[valid-type]
    """Run the stages of dvc.yaml that changed params concern, as one DVC experiment; returns its name.

    Args:
        params: Changes to the keys of params.yaml. What is left empty stays as the file has it.
        targets: Stages to run, with the stages they need. None: the whole pipeline.
    """
    load_config()
    changes = params.model_dump()  # type: ignore[attr-defined]
    experiment = run_experiment(changes, targets)
    publish_result(experiment, changes, whole=not targets)
    return experiment


@task(name="dvc-exp-run", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30, retry_condition_fn=busy)
def run_experiment(changes: dict[str, Any], targets: tuple[str, ...]) -> str:
    """Run `dvc exp run` in a folder of its own, its output to the log; returns the experiment's name.

    The workspace and its stores stay as they are, whatever else runs meanwhile.
    """
    logger = get_run_logger()
    words = ["exp", "run", "--temp", *overrides(changes), *targets]
    logger.info("dvc %s", " ".join(words))
    lines = dvc(*words, tell=logger.info)
    named = [line.removeprefix(NAMED).strip() for line in lines if line.startswith(NAMED)]
    if not named:
        raise UserError(f"dvc exp run names no experiment: {lines[-1] if lines else 'it printed nothing'}")
    return named[-1]


def publish_result(experiment: str, changes: dict[str, Any], *, whole: bool) -> None:
    """Show what changed in the artifact `result`; of a whole run its numbers too, and its page, which is
    written to `reports/experiments`."""
    parts = [f"# {experiment}", table("changed param", changes or {"none": "as in params.yaml"})]
    if whole:
        import dvc.api

        metrics = json.loads(dvc.api.read("metrics.json", rev=experiment))
        page = PAGES / f"{experiment}.html"
        place = os.environ.get(PAGES_URL) or PAGES.absolute().as_uri()
        write_text(page, dvc.api.read("reports/index.html", rev=experiment))
        parts += [
            table("metric", {name: f"{value:.4g}" for name, value in sorted(metrics.items())}),
            f"Report: [{page}]({place}/{page.name})",
        ]
    parts.append(f"Take it into the workspace: `dvc exp apply {experiment}`")
    create_markdown_artifact("\n\n".join(parts), key="result", description=f"Experiment {experiment}")


def table(head: str, rows: dict[str, Any]) -> str:
    """A markdown table of names and values."""
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {key} | {rows[key]} |" for key in rows)])
