"""Where a result comes from: commit, differences from it, hashes of the inputs, commands that repeat it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from httpx import InvalidURL

from prelar.config import Config, parse_yaml, read_yaml
from prelar.videos.download import shown


def redact(value: Any) -> Any:
    """A parameter's value without what is private; lists item by item, other values as they are.

    An address loses user, password, query and fragment. A path from the root or from a home folder keeps its
    last part alone, since the folders above it name the user and the machine.
    """
    if isinstance(value, list):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "file:")):
        return f"…/{PurePath(value).name}"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
        try:
            return shown(value)
        except InvalidURL:
            return "…"
    return value


WRITTEN_BY_RUNS = ("dvc.lock", "metrics.json")


@dataclass(frozen=True)
class Provenance:
    """The origin of a run.

    Attributes:
        commit: full hash of the commit that was checked out; None outside a git repository.
        modified: tracked files that differ from it, without those that every run writes.
        changed: dotted key → value, as it may be shown, of the parameters that differ from the commit's
            params.yaml.
        withheld: whether a value in `changed` stands there without what is private.
        hashes: (path, hash) of what the stages before the evaluation made, as dvc.lock has them.
        stale: stages whose entry in dvc.lock was made with other parameters than the present ones.
    """

    commit: str | None
    modified: tuple[str, ...]
    changed: Mapping[str, Any]
    withheld: bool
    hashes: tuple[tuple[str, str], ...]
    stale: tuple[str, ...]

    @property
    def needs_more(self) -> bool:
        """Whether files differ from the commit whose changes `commands` does not repeat."""
        return any(path != "params.yaml" for path in self.modified)

    @property
    def commands(self) -> list[str]:
        """Shell commands that make the run again from a clone of the repository."""
        return commands(self.commit, self.changed)


def commands(commit: str | None, changed: Mapping[str, Any]) -> list[str]:
    """Shell commands that make a run again from a commit, with some parameters changed."""
    lines = [f"git checkout {commit}"] if commit else []
    settings = [f"-S {shlex.quote(f'{key}={override(value)}')}" for key, value in changed.items()]
    return lines + (
        ["make setup", ".venv/bin/dvc exp run " + " ".join(settings)] if settings else ["make repro"]
    )


def find_provenance(config: Config, root: Path = Path()) -> Provenance:
    """Ask git and dvc.lock under `root`; what cannot be found is left empty."""
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    modified = tuple(line[3:].strip('"') for line in (status or "").splitlines())
    stages = ("sample", config.dataset, "pretrain", "finetune")
    hashes, stale = _read_lock(root / "dvc.lock", stages, config.model_dump(mode="json"))
    changed = _changed_params(root, config) if commit else {}
    shown = {key: redact(value) for key, value in changed.items()}
    return Provenance(
        commit=commit.strip() if commit else None,
        modified=tuple(path for path in modified if path not in WRITTEN_BY_RUNS),
        changed=shown,
        withheld=shown != changed,
        hashes=hashes,
        stale=stale,
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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


def _changed_params(root: Path, config: Config) -> dict[str, Any]:
    committed = _git(root, "show", "HEAD:./params.yaml")
    if committed is None:
        return {}
    try:
        before = flatten(parse_yaml(committed) or {})
    except (ValueError, AttributeError):
        return {}
    now = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in now.items() if key not in before or before[key] != value}


def _read_lock(
    path: Path, stages: tuple[str, ...], params: Mapping[str, Any]
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Hashes of the outputs of `stages` in dvc.lock, and those of the stages that had other parameters."""
    if not path.exists():
        return (), ()
    now = flatten(params)
    locked_stages = read_yaml(path).get("stages") or {}
    hashes: dict[str, str] = {}
    stale = []
    for name in stages:
        stage = locked_stages.get(name) or {}
        locked = flatten((stage.get("params") or {}).get("params.yaml") or {})
        if any(key in now and now[key] != value for key, value in locked.items()):
            stale.append(name)
        for item in stage.get("outs") or []:
            if "path" in item and "md5" in item:
                hashes[item["path"]] = item["md5"]
    return tuple(hashes.items()), tuple(stale)


def override(value: Any) -> str:
    """A value as `dvc exp run -S` reads it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "[" + ",".join(override(item) for item in value) + "]"
    return json.dumps(value)
