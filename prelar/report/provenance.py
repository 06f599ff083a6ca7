"""Where a result comes from: what git and dvc.lock know of it, and the commands that repeat it."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from httpx import InvalidURL

from prelar.utils.overrides import override
from prelar.videos.download import shown

WRITTEN_BY_RUNS = ("dvc.lock", "metrics.json")
SAMPLE = "data/sample"


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


def git(root: Path, *arguments: str) -> str | None:
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


def modified_files(root: Path, baseline: str, commit: str | None) -> tuple[str, ...]:
    """Tracked files in which a commit, or the workspace where it is None, differs from the baseline.

    Those that every run writes are left out.
    """
    listed = git(root, "diff", "--name-only", "-z", "--relative", baseline, *([commit] if commit else []))
    return tuple(path for path in (listed or "").split("\0") if path and path not in WRITTEN_BY_RUNS)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as dotted keys; one without entries is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def data_stages(params: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The stages of dvc.yaml that make a run's data set, each with the groups of params.yaml that it reads.

    `params` are all of the run's, by dotted key. A mixture has those of its members too.
    """
    dataset = str(params.get("dataset"))
    prefix = f"mixtures.{dataset}."
    members = [key.removeprefix(prefix) for key in params if key.startswith(prefix)]
    stages: dict[str, tuple[str, ...]] = {}
    for name in members or [dataset]:
        if f"unions.{name}" in params:
            stages[f"union@{name}"] = (f"unions.{name}",)
            continue
        kind = params.get(f"sources.{name}.kind")
        archive = params.get(f"sources.{name}.source", params.get("ssv2.source"))
        if (kind or name) == "ssv2" and archive == SAMPLE:
            stages["sample"] = ("sample",)
        stages |= {f"source@{name}": (f"sources.{name}", str(kind))} if kind else {name: (name,)}
    if members:
        stages[f"mixture@{dataset}"] = (f"mixtures.{dataset}",)
    return stages


def data_prefixes(params: Mapping[str, Any]) -> tuple[str, ...]:
    """What the dotted keys begin with that decide a run's data set, a dot at the end of each key included."""
    return tuple(f"{group}." for groups in data_stages(params).values() for group in groups)


def parse_lock(
    lock: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Of a dvc.lock: stage → path → hash of what it made, and the stages that had other parameters."""
    outputs: dict[str, dict[str, str]] = {}
    stale = []
    for name, stage in (lock.get("stages") or {}).items():
        outputs[name] = {
            str(item["path"]): str(item["md5"])
            for item in stage.get("outs") or []
            if "path" in item and "md5" in item
        }
        locked = flatten((stage.get("params") or {}).get("params.yaml") or {})
        if any(key in params and params[key] != value for key, value in locked.items()):
            stale.append(name)
    return outputs, tuple(stale)


def commands(commit: str | None, changed: Mapping[str, Any]) -> list[str]:
    """Shell commands that make a run again from a commit, with some parameters changed."""
    lines = [f"git checkout {commit}"] if commit else []
    settings = [f"-S {shlex.quote(f'{key}={override(value)}')}" for key, value in changed.items()]
    return lines + (
        ["make setup", ".venv/bin/dvc exp run " + " ".join(settings)] if settings else ["make repro"]
    )
