"""What is known of a run: of the workspace, or of any revision, read from git and DVC's cache in place."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from prelar.config import parse_yaml
from prelar.report.catalog import CURVES, EVALUATE, METRICS, Curve
from prelar.report.provenance import commands, data_stages, flatten, git, modified_files, parse_lock, redact
from prelar.utils.errors import UserError
from prelar.utils.files import parse_json
from prelar.utils.tables import parse_tsv

WORKSPACE = "workspace"
PARAMS = "params.yaml"
LOCK = "dvc.lock"
EXPERIMENT = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(.+)")
_ABSENT = object()


@dataclass(frozen=True)
class Files:
    """The files of one run, by path from the top of the project.

    Attributes:
        run: the run's name, for errors.
        system: where they are read.
        missing: the errors by which `system` says that a file is not there.
    """

    run: str
    system: AbstractFileSystem
    missing: tuple[type[Exception], ...] = (OSError,)

    def read(self, path: str | Path) -> bytes | None:
        """A file's content; None where it is not there."""
        try:
            content: bytes = self.system.cat_file(str(path))
        except self.missing:
            return None
        return content

    def find(self, folder: str | Path) -> list[str]:
        """The paths of the files below a folder, sorted."""
        return sorted(self.system.find(str(folder)))

    def load(self, path: str | Path) -> dict[str, Any] | None:
        """The mapping in a JSON or YAML file, None where there is no file; broken it raises `UserError`."""
        content = self.read(path)
        if content is None:
            return None
        try:
            parse = parse_json if Path(path).suffix == ".json" else parse_yaml
            found = parse(content) or {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.run}: its {path} cannot be read; run it again")
        return found

    def table(self, path: str | Path) -> dict[str, list[float]]:
        """The columns of a table of numbers, none where there is no file; broken it raises `UserError`."""
        content = self.read(path)
        return parse_tsv(content.decode("utf-8"), Path(path)) if content else {}

    def curve(self, path: str | Path, column: str) -> Curve | None:
        """A column against the column `step`, finite points only; None where there are none."""
        table = self.table(path)
        points = zip(table.get("step", ()), table.get(column, ()), strict=False)
        finite = [point for point in points if all(map(math.isfinite, point))]
        return (tuple(step for step, _ in finite), tuple(value for _, value in finite)) if finite else None


def workspace_files(root: Path = Path()) -> Files:
    """The files under the top of a project."""
    return Files(WORKSPACE, DirFileSystem(path=str(root.absolute()), fs=LocalFileSystem()))


def revision_files(name: str, root: Path, commit: str) -> Files:
    """The files of a commit: those that git has, and those of which DVC's cache has the content."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexError

    return Files(
        name, DVCFileSystem(str(root.absolute()), rev=commit), (OSError, DvcException, DataIndexError)
    )


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: as the user named it.
        commit: full hash; None for the workspace.
        baseline: full hash of the commit that the run started from: an experiment's baseline, the commit
            itself for other revisions, the one checked out for the workspace; None outside of git.
        modified: files that differ from the baseline, without those that every run writes.
        params: dotted key → value of the run's parameters.
        changed: those of `params` that are not so in the baseline's params.yaml.
        outputs: stage → path → hash of what it made, as dvc.lock has them.
        stale: stages whose entry in dvc.lock was made with other parameters than `params`.
        metrics: the figures of the evaluation.
        curves: name as in `CURVES` → steps and values, as far as they were measured.
        files: what else the run left.
    """

    name: str
    commit: str | None
    baseline: str | None
    modified: tuple[str, ...]
    params: Mapping[str, Any]
    changed: Mapping[str, Any]
    outputs: Mapping[str, Mapping[str, str]]
    stale: tuple[str, ...]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve]
    files: Files

    def points(self, names: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
        """The steps at which one of some curves has a point, and the values there of those that have one."""
        curves = {name: dict(zip(*self.curves[name], strict=True)) for name in names if name in self.curves}
        steps = sorted({step for curve in curves.values() for step in curve})
        return [(step, {name: c[step] for name, c in curves.items() if step in c}) for step in steps]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages before the evaluation."""
        return (*data_stages(self.params), "pretrain", "finetune")

    @property
    def inputs(self) -> dict[str, str]:
        """Path → hash of what the stages before the evaluation made."""
        return {path: digest for name in self.stages for path, digest in self.outputs.get(name, {}).items()}

    @property
    def unrepeated(self) -> tuple[str, ...]:
        """Files that differ from the baseline in what `commands` does not repeat."""
        return tuple(path for path in self.modified if path != PARAMS)

    @property
    def commands(self) -> list[str]:
        """Shell commands that make the run again from a clone of the repository, private values redacted."""
        return commands(self.baseline, {key: redact(value) for key, value in self.changed.items()})

    @property
    def redacted(self) -> bool:
        """Whether `commands` lacks something private."""
        return any(redact(value) != value for value in self.changed.values())


def find_runs(names: Sequence[str], root: Path = Path()) -> list[Run]:
    """The runs of experiments, branches, tags, commits and "workspace", in the order given, each once.

    A name with `*`, `?` or `[` stands for the experiments that it matches.

    Raises:
        UserError: a name is unknown or stands for nothing, or its results are not here.
    """
    experiments = list_experiments(root)
    expanded: dict[str, None] = {}
    for name in names:
        if not any(sign in name for sign in "*?["):
            expanded[name] = None
            continue
        matches = fnmatch.filter(experiments, name)
        if not matches:
            raise UserError(f"{name}: no experiment matches; `dvc exp list --all-commits` names them")
        expanded.update(dict.fromkeys(matches))
    return [
        read_workspace(root) if name == WORKSPACE else _read_revision(name, experiments, root)
        for name in expanded
    ]


def list_experiments(root: Path = Path()) -> dict[str, tuple[str, str]]:
    """Name → (commit, baseline) of the experiments of a repository, newest last.

    Of experiments of one name, made from different baselines, the newest counts.
    """
    listed = git(root, "for-each-ref", "--sort=creatordate", "--format=%(objectname) %(refname)", "refs/exps")
    found = {}
    for line in (listed or "").splitlines():
        commit, _, ref = line.partition(" ")
        if match := EXPERIMENT.fullmatch(ref):
            found[match[3]] = (commit, match[1] + match[2])
    return found


def read_workspace(root: Path = Path(), params: Mapping[str, Any] | None = None) -> Run:
    """The run whose results lie under `root`; `params` are its parameters, by default those of params.yaml.

    Raises:
        UserError: nothing was evaluated yet, or a result is broken.
    """
    head = (git(root, "rev-parse", "HEAD") or "").strip() or None
    return _read_run(workspace_files(root), None, head, root, params)


def _read_revision(name: str, experiments: Mapping[str, tuple[str, str]], root: Path) -> Run:
    commit, baseline = experiments.get(name, (None, None))
    commit = commit or (git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") or "").strip()
    if not commit:
        raise UserError(
            f"{name}: neither an experiment nor a revision; `dvc exp list --all-commits` names experiments"
        )
    return _read_run(revision_files(name, root, commit), commit, baseline or commit, root)


def _read_run(
    files: Files,
    commit: str | None,
    baseline: str | None,
    root: Path,
    params: Mapping[str, Any] | None = None,
) -> Run:
    headline, given = files.load(METRICS), params if params is not None else files.load(PARAMS)
    if headline is None or given is None:
        lacking = PARAMS if given is None else METRICS
        raise UserError(f"{files.run}: has no {lacking}; run it to its end (dvc exp run, or dvc repro)")
    flat = flatten(given)
    before = _committed_params(root, baseline) if baseline else {}
    outputs, stale = parse_lock(files.load(LOCK) or {}, flat)
    metrics = (files.load(EVALUATE / METRICS.name) or {}) | headline
    return Run(
        name=files.run,
        commit=commit,
        baseline=baseline,
        modified=modified_files(root, baseline, commit) if baseline else (),
        params=flat,
        changed={key: value for key, value in flat.items() if before.get(key, _ABSENT) != value}
        if before
        else {},
        outputs=outputs,
        stale=stale,
        metrics={key: float(value) for key, value in metrics.items() if isinstance(value, int | float)},
        curves=read_curves(files),
        files=files,
    )


def read_curves(files: Files) -> dict[str, Curve]:
    """The curves of `CURVES` that a run has, by name."""
    curves = {name: files.curve(spec.file, spec.column) for name, spec in CURVES.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _committed_params(root: Path, commit: str) -> dict[str, Any]:
    """The flat parameters of a commit; none where it has none that can be read."""
    try:
        return flatten(parse_yaml(git(root, "show", f"{commit}:./{PARAMS}") or "") or {})
    except (ValueError, AttributeError):
        return {}
