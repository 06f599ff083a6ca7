"""The flow `pipeline`: a DVC experiment with changed params, run outside the workspace."""

from __future__ import annotations

import json
import os
from typing import Any, get_origin

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
)

from flows.dvc import dvc, overrides
from flows.runtime import PAGES, PAGES_URL
from prelar.config import Config, keys, load_config
from prelar.utils.errors import UserError
from prelar.utils.files import write_text


class Form(BaseModel):
    """A form whose fields may stay empty; an empty field is no change."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialise(self).items() if value is not None}


def _no_default(schema: dict[str, Any]) -> None:
    del schema["default"]


def _fields(group: str | None = None) -> dict[str, Any]:
    """The fields of a group of params.yaml, or its flat keys, those apart that map names of one's own."""
    model: Any = Config.model_fields[group].annotation if group else Config
    flat = {name: field for name, field in model.model_fields.items() if name in keys(model)}
    return {name: field for name, field in flat.items() if get_origin(field.annotation) is not dict}


def one_of_each(group: str | None = None) -> type[Form]:
    """A value for each flat key of params.yaml, or for each key of a group.

    The UI shows a switch that is off for a boolean without default, and sends it; None keeps it empty.
    """
    fields: dict[str, Any] = {}
    for key, field in _fields(group).items():
        if field.annotation is bool:
            fields[key] = (bool | None, Field(default=None, title=key, description=field.description))
        else:
            empty = Field(
                default=None, title=key, description=field.description, json_schema_extra=_no_default
            )
            fields[key] = (field.rebuild_annotation(), empty)
    return create_model(group or "params", __base__=Form, **fields)


def several_of_each() -> type[Form]:
    """A list of values for each flat key of params.yaml."""
    fields: dict[str, Any] = {
        key: (
            list[field.rebuild_annotation()],  # type: ignore[misc]
            Field(
                default=None,
                title=key,
                description=field.description,
                min_length=1,
                json_schema_extra=_no_default,
            ),
        )
        for key, field in _fields().items()
    }
    return create_model("grid", __base__=Form, **fields)


EXPERIMENTS_LINE = "Ran experiment(s):"
Params = one_of_each()
UNCHANGED = Params()


@flow(name="pipeline")
def pipeline(params: Params = UNCHANGED, targets: tuple[str, ...] = ()) -> str:  # type: ignore[valid-type]
    """Run the stages of dvc.yaml that the changed params affect, as a DVC experiment. Returns its name.

    Args:
        params: Changes to the keys of params.yaml. Empty fields keep the file's value.
        targets: Stages to run, with the stages that they need. Empty: the whole pipeline.
    """
    load_config()
    changes = params.model_dump()  # type: ignore[attr-defined]
    experiment = run_experiment(changes, targets)
    publish_result(experiment, changes, whole=not targets)
    return experiment


@task(name="dvc-exp-run", cache_policy=NO_CACHE)
def run_experiment(changes: dict[str, Any], targets: tuple[str, ...]) -> str:
    """Run `dvc exp run` in a folder of its own, its output to the log; returns the experiment's name.

    The workspace and its stores stay as they are, whatever else runs meanwhile.
    """
    logger = get_run_logger()
    words = ["exp", "run", "--temp", *overrides(changes), *targets]
    logger.info("dvc %s", " ".join(words))
    lines = dvc(*words, on_line=logger.info)
    named = [
        line.removeprefix(EXPERIMENTS_LINE).strip() for line in lines if line.startswith(EXPERIMENTS_LINE)
    ]
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
    parts.append(f"To bring it into the workspace: `dvc exp apply {experiment}`")
    create_markdown_artifact("\n\n".join(parts), key="result", description=f"Experiment {experiment}")


def table(head: str, rows: dict[str, Any]) -> str:
    """A markdown table of names and values."""
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {key} | {rows[key]} |" for key in rows)])


Ssv2 = one_of_each("ssv2")
Demos = one_of_each("demos")
SSV2, DEMOS = Ssv2(), Demos()


@flow(name="store-ssv2")
def ssv2(settings: Ssv2 = SSV2) -> str:  # type: ignore[valid-type]
    """Make the store of the videos in ssv2.source, as a DVC experiment. Returns its name.

    Args:
        settings: Changes to the keys of the group ssv2. Empty fields keep the value in params.yaml.
    """
    return _store("ssv2", settings)


@flow(name="store-demos")
def demos(settings: Demos = DEMOS) -> str:  # type: ignore[valid-type]
    """Make the store of demonstrations, as a DVC experiment. Returns its name.

    Args:
        settings: Changes to the keys of the group demos. Empty fields keep the value in params.yaml.
    """
    return _store("demos", settings)


def _store(group: str, settings: Form) -> str:
    load_config()
    changes = {f"{group}.{key}": value for key, value in settings.model_dump().items()}
    experiment = run_experiment(changes, (group,))
    publish_result(experiment, changes, whole=False)
    return experiment
