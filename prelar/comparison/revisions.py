"""What is known of a run of any revision, read from git and DVC's cache without checking anything out."""

from __future__ import annotations

import fnmatch
import math
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelar.config import parse_yaml
from prelar.errors import UserError
from prelar.files import parse_json
from prelar.report.provenance import WRITTEN_BY_RUNS, flatten
from prelar.report.sections import pretraining, task
from prelar.tables import parse_tsv

WORKSPACE = "workspace"
PARAMS = "params.yaml"
METRICS = "metrics.json"
LOCK = "dvc.lock"
EVALUATE = "reports/evaluate"
CURVES: Mapping[str, tuple[str, str]] = {
    **{name: (f"{task.CURVES}/{name}.tsv", name) for name in ("success", "return")},
    **{
        f"pretrain_{name}": (f"{pretraining.CURVES}/{loss.place}/{name}.tsv", name)
        for name, loss in pretraining.LOSSES.items()
    },
    **{
        f"offline_{start}_{error}": (f"{EVALUATE}/offline_{start}.tsv", error)
        for start in ("pretrained", "scratch")
        for error in ("error", "reward_error")
    },
    "prediction": (f"{EVALUATE}/prediction.tsv", "model"),
    "prediction_copy": (f"{EVALUATE}/prediction.tsv", "copy"),
}
"""Each curve's file, and the column that is drawn against its steps."""
PICTURES = ("open_loop.mp4", "open_loop_poster.png", "action_swap.png")
_ABSENT = object()
EXPERIMENT = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(.+)")

Curve = tuple[tuple[float, ...], tuple[float, ...]]
Read = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: as the user named it.
        commit: full hash; None for the workspace.
        baseline: full hash of the commit that the run started from: an experiment's baseline, the commit
            itself for other revisions; None outside of git.
        modified: files that differ from the baseline, without those that every run writes.
        params: dotted key → value of params.yaml at that revision.
        changed: those of `params` that are not so in the baseline's params.yaml.
        inputs: path → hash of what the stages made, as dvc.lock has them.
        metrics: the figures of the evaluation.
        curves: name as in `CURVES` → steps and values, as far as they were measured.
        media: pictures and videos of the evaluation by file name.
    """

    name: str
    commit: str | None
    baseline: str | None
    modified: tuple[str, ...]
    params: Mapping[str, Any]
    changed: Mapping[str, Any]
    inputs: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve]
    media: Mapping[str, bytes]


def find_runs(names: Sequence[str], root: Path = Path()) -> list[Run]:
    """The runs of experiments, branches, tags, commits and "workspace", in the order given, each once.

    A name with `*`, `?` or `[` stands for the experiments that it matches.

    Raises:
        UserError: a name is unknown or stands for nothing, or its results are not here.
    """
    experiments = list_experiments(root)
    runs: dict[str, Run] = {}
    for name in names:
        for found in _expand(name, experiments):
            if found not in runs:
                runs[found] = _read_run(found, experiments, root)
    return list(runs.values())


def list_experiments(root: Path = Path()) -> dict[str, tuple[str, str]]:
    """Name → (commit, baseline) of the experiments of a repository, newest last.

    Of experiments of one name, made from different baselines, the newest counts.
    """
    listed = _git(
        root, "for-each-ref", "--sort=creatordate", "--format=%(objectname) %(refname)", "refs/exps"
    )
    found = {}
    for line in (listed or "").splitlines():
        commit, _, ref = line.partition(" ")
        if match := EXPERIMENT.fullmatch(ref):
            found[match[3]] = (commit, match[1] + match[2])
    return found


def _expand(name: str, experiments: Mapping[str, tuple[str, str]]) -> list[str]:
    if not any(sign in name for sign in "*?["):
        return [name]
    found = [known for known in experiments if fnmatch.fnmatchcase(known, name)]
    if not found:
        raise UserError(f"{name}: no experiment matches; `dvc exp list --all-commits` names them")
    return found


def _read_run(name: str, experiments: Mapping[str, tuple[str, str]], root: Path) -> Run:
    if name == WORKSPACE:
        head = (_git(root, "rev-parse", "HEAD") or "").strip() or None
        return _parse(name, None, head, root, _workspace_reader(root))
    commit, baseline = experiments.get(name, (None, None))
    commit = commit or (_git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") or "").strip()
    if not commit:
        raise UserError(
            f"{name}: neither an experiment nor a revision; `dvc exp list --all-commits` names experiments"
        )
    return _parse(name, commit, baseline or commit, root, _revision_reader(root, commit))


def _parse(name: str, commit: str | None, baseline: str | None, root: Path, read: Read) -> Run:
    """Make a run of what `read` gives, by path from the top of the project."""
    metrics, params = read(METRICS), read(PARAMS)
    if metrics is None or params is None:
        raise UserError(
            f"{name}: has no {METRICS if params else PARAMS}; run it to its end (dvc exp run, or dvc repro)"
        )
    before = _git(root, "show", f"{baseline}:./{PARAMS}") if baseline else None
    try:
        figures = parse_json(read(f"{EVALUATE}/{METRICS}") or b"{}") | parse_json(metrics)
        flat = _flat(params)
        known = _flat((before or "").encode())
        inputs = _inputs(read(LOCK) or b"")
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{name}: its {METRICS}, {PARAMS} or {LOCK} cannot be read; run it again") from None
    curves = {name: _curve(read, *place) for name, place in CURVES.items()}
    pictures = {file: read(f"{EVALUATE}/{file}") for file in PICTURES}
    return Run(
        name=name,
        commit=commit,
        baseline=baseline,
        modified=_modified(root, baseline, commit) if baseline else (),
        params=flat,
        changed={key: value for key, value in flat.items() if known.get(key, _ABSENT) != value}
        if known
        else {},
        inputs=inputs,
        metrics={key: float(value) for key, value in figures.items() if isinstance(value, float | int)},
        curves={name: curve for name, curve in curves.items() if curve[0]},
        media={file: content for file, content in pictures.items() if content},
    )


def _modified(root: Path, baseline: str, commit: str | None) -> tuple[str, ...]:
    """Tracked files in which a commit, or the workspace where it is None, differs from the baseline."""
    listed = _git(root, "diff", "--name-only", "--relative", baseline, *([commit] if commit else []))
    return tuple(path for path in (listed or "").splitlines() if path not in (*WRITTEN_BY_RUNS, PARAMS))


def _inputs(lock: bytes) -> dict[str, str]:
    """Path → hash of the outputs in a dvc.lock."""
    stages = (parse_yaml(lock) or {}).get("stages") or {}
    outs = [item for stage in stages.values() for item in stage.get("outs") or []]
    return {str(item["path"]): str(item["md5"]) for item in outs if "md5" in item and "path" in item}


def _flat(text: bytes) -> dict[str, Any]:
    return flatten(parse_yaml(text) or {})


def _curve(read: Read, path: str, column: str) -> Curve:
    content = read(path)
    table = parse_tsv(content.decode("utf-8"), Path(path)) if content else {}
    points = zip(table.get("step", ()), table.get(column, ()), strict=False)
    finite = [point for point in points if all(map(math.isfinite, point))]
    return tuple(step for step, _ in finite), tuple(value for _, value in finite)


def _workspace_reader(root: Path) -> Read:
    def read(path: str) -> bytes | None:
        file = root / path
        return file.read_bytes() if file.is_file() else None

    return read


def _revision_reader(root: Path, commit: str) -> Read:
    """Reads files of a commit: those that git has, and those of which DVC's cache has the content.

    A file that the commit lists but the cache lacks counts as one that is not there.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexError

    files = DVCFileSystem(str(root.absolute()), rev=commit)

    def read(path: str) -> bytes | None:
        try:
            content: bytes = files.cat_file(path)
        except (OSError, DvcException, DataIndexError):
            return None
        return content

    return read


def _git(root: Path, *arguments: str) -> str | None:
    """What a git command prints, or None where it fails or git is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
