"""What is known of a run of any revision, read from git and DVC's cache without checking anything out."""

from __future__ import annotations

import base64
import fnmatch
import functools
import math
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelar.config import Config, parse_yaml
from prelar.report.catalog import CURVES, EVALUATE, METHODS, METRICS, Curve
from prelar.report.provenance import WRITTEN_BY_RUNS, flatten
from prelar.utils.errors import UserError
from prelar.utils.files import parse_json
from prelar.utils.tables import parse_tsv

PAGE = Path("reports/index.html")
SAMPLE = Path("data/sample")


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
    if config.dataset == "demos" and config.demos.source == "metaworld":
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


WORKSPACE = "workspace"
PARAMS = "params.yaml"
LOCK = "dvc.lock"
PICTURES = ("open_loop.mp4", "open_loop_poster.png", "action_swap.png")
_ABSENT = object()
EXPERIMENT = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(.+)")
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
    metrics, params = read(str(METRICS)), read(PARAMS)
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
