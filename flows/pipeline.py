"""The flow `pipeline`: one experiment of dvc.yaml with changed params, run beside the workspace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
)

from prelar.config import Config, keys, load_config
from prelar.errors import UserError
from prelar.files import write_text

PAGES = Path("reports/experiments")
NAMED = "Ran experiment(s):"


class _Changes(BaseModel):
    """A form whose fields may stay empty; an empty field is no change."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialise(self).items() if value is not None}


def _form() -> type[BaseModel]:
    """The flat keys of params.yaml as a form, with the types and bounds of `Config`.

    The UI shows a switch that is off for a boolean without default, and sends it; None keeps it empty.
    """

    def no_default(schema: dict[str, Any]) -> None:
        del schema["default"]

    fields: dict[str, Any] = {}
    for key, field in Config.model_fields.items():
        if field.annotation is bool:
            fields[key] = (bool | None, Field(default=None, title=key))
        elif key in keys():
            empty = Field(default=None, title=key, json_schema_extra=no_default)
            fields[key] = (field.rebuild_annotation(), empty)
    return create_model("Params", __base__=_Changes, **fields)


Params = _form()
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
    publish_result(experiment, changes)
    return experiment


def run_experiment(changes: dict[str, Any], targets: tuple[str, ...]) -> str:
    """Run `dvc exp run` in a folder of its own, its output to the log; returns the experiment's name."""
    logger = get_run_logger()
    settings = [word for key, value in changes.items() for word in ("-S", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", *settings, *targets]
    logger.info(" ".join(command[2:]))
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if text := line.strip():
                    logger.info(text)
                    lines.append(text)
        except BaseException:
            process.terminate()
            raise
    named = [line.removeprefix(NAMED).strip() for line in lines if line.startswith(NAMED)]
    if process.returncode != 0 or not named:
        reasons = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        raise UserError(f"dvc exp run ended with status {process.returncode}: {'; '.join(reasons)}")
    return named[-1]


def publish_result(experiment: str, changes: dict[str, Any]) -> None:
    """Write the experiment's page to `reports/experiments`, and its numbers to the artifact `result`."""
    import dvc.api

    metrics = json.loads(dvc.api.read("metrics.json", rev=experiment))
    page = PAGES / f"{experiment}.html"
    write_text(page, dvc.api.read("reports/index.html", rev=experiment))
    create_markdown_artifact(
        key="result",
        description=f"Experiment {experiment}",
        markdown="\n\n".join(
            [
                f"# {experiment}",
                _table("changed param", changes or {"none": "as in params.yaml"}),
                _table("metric", {name: f"{value:.4g}" for name, value in sorted(metrics.items())}),
                f"Report: [{page}]({page.absolute().as_uri()})",
                f"Take it into the workspace: `dvc exp apply {experiment}`",
            ]
        ),
    )


def _table(head: str, rows: dict[str, Any]) -> str:
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {key} | {rows[key]} |" for key in rows)])
