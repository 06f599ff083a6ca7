"""Runs made up for the comparison: no results are read for them."""

from __future__ import annotations

from typing import Any

from prelar.config import load_config
from prelar.report.provenance import flatten
from prelar.report.runs import Files, Run, workspace_files
from tests.conftest import ROOT

PARAMS = flatten(load_config(ROOT / "params.yaml").model_dump(mode="json"))
NO_FILES = workspace_files(ROOT / "tests/none")


def make_run(
    name: str, success: list[float], *, every: int = 10_000, files: Files = NO_FILES, **changed: Any
) -> Run:
    """A run whose evaluations gave `success`, the first one after `every` steps; `__` in keys is a dot."""
    changes = {key.replace("__", "."): value for key, value in changed.items()}
    steps = tuple(float(every * (k + 1)) for k in range(len(success)))
    curves = {"prediction": ((1.0, 2.0), (0.1, 0.2))} | (
        {"success": (steps, tuple(success))} if success else {}
    )
    return Run(
        name=name,
        commit="c" * 40,
        baseline="b" * 40,
        modified=(),
        params=PARAMS | changes,
        changed=changes,
        outputs={"pretrain": {"data/pretrain": "aa.dir"}},
        stale=(),
        metrics={"success_rate": success[-1] if success else 0.0, "return": 12.5},
        curves=curves,
        files=files,
    )
