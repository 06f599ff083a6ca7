"""What a stage of dvc.yaml follows from: its command, its params, its code and the stages before it."""

from __future__ import annotations

import graphlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prelar.config import PARAMS, read_yaml
from prelar.utils.errors import UserError

PIPELINE = Path("dvc.yaml")
PROJECT = Path(__file__).parents[1]
CODE = ("prelar/", "flows/")

Values = Mapping[str, Any]


class Stages:
    """The stages of a dvc.yaml, each with its code as it lies there when this is made. Those that it has for
    each entry of a key of params.yaml (foreach) are named as DVC does, `stage@entry`.

    `values` below are those of a params.yaml, as `Config.model_dump(mode="json")` gives them. Without the
    file, or of a stage that it does not name, a fingerprint is of all values and all code of the package.
    Raises `UserError` where the file cannot be read.
    """

    def __init__(self, path: Path = PIPELINE) -> None:
        content = read_yaml(path) if path.exists() else {"stages": {}}
        stages = content.get("stages") if isinstance(content, dict) else None
        if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
            raise UserError(f"{path}: has no stages; restore it with git")
        self.stages: dict[str, dict[str, Any]] = stages
        self._code: dict[str, str] = {}

    def fingerprint(self, name: str, values: Values) -> str:
        """Digest of a stage's own command, params and code, in hex. What it reads is not looked at."""
        return self._fingerprint(name, self.resolved(values).get(name, {}), values)

    def _fingerprint(self, name: str, stage: Mapping[str, Any], values: Values) -> str:
        keys = stage.get("params", list(values))
        if name not in self._code:
            deps = stage.get("deps", CODE[:1])
            self._code[name] = code_digest(path for path in deps if path.startswith(CODE))
        return _digest(
            [name, stage.get("cmd"), {key: _lookup(values, key) for key in keys}, self._code[name]]
        )

    def fingerprints(self, values: Values, targets: Iterable[str] = ()) -> dict[str, str]:
        """For each stage, the digest of its fingerprint and of those of all stages before it, in hex.

        With `targets` only for these and the stages before them.
        """
        stages = self.resolved(values)
        above = _upstream(stages)
        needed = set(targets) or set(stages)
        while more := set().union(*(above[name] for name in needed)) - needed:
            needed |= more
        found: dict[str, str] = {}
        graph = {name: before for name, before in above.items() if name in needed}
        for name in graphlib.TopologicalSorter(graph).static_order():
            found[name] = _digest(
                [self._fingerprint(name, stages[name], values), sorted(found[other] for other in above[name])]
            )
        return found

    def upstream(self, values: Values) -> dict[str, set[str]]:
        """For each stage, the stages of whose outputs it reads one, or the folder that one lies in."""
        return _upstream(self.resolved(values))

    def measuring(self) -> tuple[str, ...]:
        """The stages that make metrics."""
        return tuple(name for name, stage in self.stages.items() if stage.get("metrics"))

    def code(self) -> list[str]:
        """The files and folders that stages read and no stage makes, params.yaml apart."""
        stages = [stage.get("do", stage) for stage in self.stages.values()]
        read = {dep for stage in stages for dep in stage.get("deps", [])}
        return sorted(read - {out for stage in stages for out in _outs(stage)} - {PARAMS.name})

    def resolved(self, values: Values) -> dict[str, dict[str, Any]]:
        """The stages by name, with values filled in."""
        found = {}
        for name, stage in self.stages.items():
            if "foreach" not in stage:
                found[name] = _filled(stage, values)
                continue
            for key, item in _lookup(values, stage["foreach"][2:-1]).items():
                found[f"{name}@{key}"] = _filled(stage["do"], {**values, "key": key, "item": item})
        return found


def stage_fingerprint(name: str, values: Values) -> str:
    """`Stages.fingerprint` by the dvc.yaml of the current folder."""
    return Stages().fingerprint(name, values)


def code_digest(paths: Iterable[str]) -> str:
    """Digest of Python files and folders of the code that runs, given as paths such as `prelar/model`."""
    digest = hashlib.sha256()
    for path in paths:
        source = PROJECT / path
        for file in [source] if source.is_file() else sorted(source.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"\0{file.relative_to(PROJECT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _upstream(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """`Stages.upstream` of stages with values filled in."""
    makers: dict[str, set[str]] = {}
    for name, stage in stages.items():
        for out in _outs(stage):
            for place in (out, *map(str, PurePosixPath(out).parents)):
                makers.setdefault(place, set()).add(name)
    return {
        name: {made for dep in stage.get("deps", []) for made in makers.get(dep, ())}
        for name, stage in stages.items()
    }


def _outs(stage: Mapping[str, Any]) -> list[str]:
    """What a stage makes."""
    return [
        next(iter(out)) if isinstance(out, dict) else out
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]
    ]


def _filled(stage: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A stage with values filled in where it names them."""
    lists = {key: [_fill(text, values) for text in stage[key]] for key in ("deps", "params") if key in stage}
    outs = {"outs": [_fill(out, values) for out in _outs(stage)]} if _outs(stage) else {}
    cmd = stage.get("cmd")
    return {"cmd": _fill(cmd, values) if isinstance(cmd, str) else cmd, **lists, **outs}


def _fill(text: str, values: Values) -> str:
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(_lookup(values, match[1])), text)


def _lookup(values: Values, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
