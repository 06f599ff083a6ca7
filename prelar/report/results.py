"""What a sweep found, kept with the project: results/NAME.csv and, beside it, NAME.json.

The table has a row for each point of a run's learning curve; the last row of a run has the figures of its
evaluation too. The description says what the runs are of: the code, its params.yaml, what each run changes,
CPU seconds, further curves, and the runs that failed. From both, `prelar report results/NAME.csv` draws its
page without running anything.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from prelar.report.catalog import EVALUATE, Curve
from prelar.report.runs import Files, Run
from prelar.report.variants import group
from prelar.utils.errors import UserError
from prelar.utils.files import parse_json, write_text

COLUMNS = (
    "run",
    "variant",
    "pretrained_on",
    "pretrain_seed",
    "task",
    "seed",
    "env_steps",
    "return",
    "success",
)
LEARNING = ("return", "success")
EVALUATED = {"return": "return_evaluated"}
"""Columns of metrics whose own name a column of the learning curve has."""
CONTROLS = {"random actions": "random", "scripted expert": "expert"}
"""Policies whose mean return stands beside the agent's, and how their columns end."""
KEPT_CURVES = (
    "offline_pretrained_error",
    "offline_scratch_error",
    "prediction",
    "prediction_copy",
    "probe_gaps",
    "probe_gaps_difference",
)


@dataclass
class Results:
    """The results of a sweep.

    Attributes:
        commit: the hash of the commit whose code made them; a tag's name another clone need not have.
        params: the values of its params.yaml, by dotted key.
        changes: run → the keys that it changes. Runs that are planned and neither done nor failed count too.
        runs: those that are done, by name.
        failed: run → the error that it ended with.
        cpu_seconds: run, or stages that several runs share → what its processes took.
    """

    commit: str
    params: Mapping[str, Any]
    changes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        """Take in a run that is done."""
        self.failed.pop(run.name, None)
        curves = {name: run.curves[name] for name in (*LEARNING, *KEPT_CURVES) if name in run.curves}
        episodes = (run.files.load(EVALUATE / "summary.json") or {}).get("episodes", {})
        controls = {
            f"return_{CONTROLS[row['name']]}": float(row["return"])
            for row in episodes.get("policies", ())
            if row["name"] in CONTROLS
        }
        self.runs[run.name] = self._run(run.name, {**run.metrics, **controls}, curves)

    def planned(self) -> list[Run]:
        """A run for each of `changes`, without figures where it is not done."""
        return [self.runs.get(name) or self._run(name, {}, {}) for name in self.changes]

    def _run(self, name: str, metrics: Mapping[str, float], curves: Mapping[str, Curve]) -> Run:
        changes = self.changes[name]
        nothing = Files(name, DirFileSystem(path=f"/{name}", fs=MemoryFileSystem()))
        return Run(
            name=name,
            commit=None,
            baseline=self.commit,
            modified=(),
            params={**self.params, **changes},
            changed=changes,
            outputs={},
            stale=(),
            metrics=metrics,
            curves=curves,
            files=nothing,
        )

    def write(self, path: Path) -> None:
        """Write the table to `path`, and the description beside it."""
        labels = {run.name: variant.label for variant in group(self.planned())[0] for run in variant.runs}
        metrics = sorted({EVALUATED.get(name, name) for run in self.runs.values() for name in run.metrics})
        text = io.StringIO()
        table = csv.DictWriter(text, (*COLUMNS, *metrics), restval="", lineterminator="\n")
        table.writeheader()
        for name in self.changes:
            if name in self.runs:
                table.writerows(_rows(self.runs[name], labels.get(name, "a repetition")))
        write_text(path, text.getvalue())
        described = {
            "commit": self.commit,
            "cpu_seconds": self.cpu_seconds,
            "failed": self.failed,
            "params": self.params,
            "runs": {
                name: {"changes": changes, "curves": self._further(name)}
                for name, changes in self.changes.items()
            },
        }
        write_text(path.with_suffix(".json"), json.dumps(described, indent=1, ensure_ascii=False) + "\n")

    def _further(self, name: str) -> dict[str, Any]:
        """The curves of a run that are not in the table."""
        curves = self.runs[name].curves if name in self.runs else {}
        return {
            kind: [[float(f"{value:.6g}") for value in column] for column in curves[kind]]
            for kind in KEPT_CURVES
            if kind in curves
        }

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote. Raises `UserError` where a file is missing or is none of these."""
        described = path.with_suffix(".json")
        try:
            held = parse_json(described.read_bytes())
            found = cls(
                commit=str(held["commit"]),
                params=dict(held["params"]),
                changes={name: dict(run["changes"]) for name, run in held["runs"].items()},
                failed=dict(held["failed"]),
                cpu_seconds=dict(held["cpu_seconds"]),
            )
            rows: dict[str, list[dict[str, str]]] = {}
            with path.open(encoding="utf-8", newline="") as table:
                for row in csv.DictReader(table):
                    rows.setdefault(row["run"], []).append(row)
            for name, points in rows.items():
                found.runs[name] = found._run(name, *_parse(points, held["runs"][name]["curves"]))
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: missing; it belongs to the results of a sweep, {path}"
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, {described}: not the results of a sweep ({error!r})") from None
        return found


def _rows(run: Run, label: str) -> list[dict[str, Any]]:
    """The rows of a run, one at least."""
    params = run.params
    pretrained = params["method"] != "dreamerv2" and params[f"scales.{params['scale']}.pretrain.steps"] > 0
    about = {
        "run": run.name,
        "variant": label,
        "pretrained_on": params["dataset"] if pretrained else "",
        "pretrain_seed": params["seed"] if pretrained else "",
        "task": params["task"],
        "seed": params["seed"],
    }
    rows = [
        {**about, "env_steps": f"{step:g}", **{name: _cell(value) for name, value in values.items()}}
        for step, values in run.points(LEARNING)
    ] or [about]
    rows[-1] |= {EVALUATED.get(name, name): _cell(value) for name, value in run.metrics.items()}
    return rows


def _cell(value: float) -> str:
    return f"{value:.9g}"


def _parse(
    rows: Sequence[Mapping[str, str]], further: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Curve]]:
    """The metrics and curves of a run from its rows, and from its curves in the description."""
    names = {column: name for name, column in EVALUATED.items()}
    metrics = {names.get(k, k): float(cell) for k, cell in rows[-1].items() if k not in COLUMNS and cell}
    curves: dict[str, Curve] = {name: (tuple(x), tuple(y)) for name, (x, y) in further.items()}
    for name in LEARNING:
        points = [(float(row["env_steps"]), float(row[name])) for row in rows if row[name]]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = (steps, values)
    return metrics, curves
