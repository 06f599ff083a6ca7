"""dvc.yaml against the code: what a stage imports is what it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grimp
import pytest

from prelar.__main__ import WRITES
from prelar.config import read_yaml

ROOT = Path(__file__).parents[1]
STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items()
}
# Wiring and helpers whose edits change no result: they never make a stage run again.
FREE = {
    "prelar",
    "prelar.__main__",
    "prelar.config",
    "prelar.demos",
    "prelar.stages",
    "prelar.store",
    "prelar.train",
    "prelar.utils",
    "prelar.validation",
    "prelar.videos",
    "prelar.utils.errors",
    "prelar.utils.files",
    "prelar.envs.names",
    "prelar.utils.parents",
    "prelar.utils.disk",
    "prelar.utils.overrides",
    "prelar.utils.own",
    "prelar.utils.urls",
    "flows",
    "flows.access",
    "flows.dvc",
}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("prelar", "flows", cache_dir=None)


def modules_of(stage: dict[str, Any]) -> list[str]:
    """What a stage runs; that of a further source is a flow of whatever kind."""
    _, _, _, *words = [word for word in stage["cmd"].split() if word != "${key}"]
    if words[0] == "flows.${item.kind}":
        return ["flows.ssv2", "flows.demos"]
    return [words[0] if words[0].startswith("flows.") else ".".join(words)]


def modules_under(path: str) -> set[str]:
    if path.endswith(".py"):
        return {path.removesuffix(".py").replace("/", ".")}
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / path).rglob("*.py")
    }


@pytest.mark.parametrize("name", STAGES)
def test_no_shell_stands_between_dvc_and_a_stage(name: str) -> None:
    """A stage ends with its parent, which is to be DVC; not every shell gives way to its last command."""
    assert STAGES[name]["cmd"].startswith("exec python -m ")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_what_it_imports(graph: grimp.ImportGraph, name: str) -> None:
    modules = modules_of(STAGES[name])
    imported = set(modules).union(*(graph.find_upstream_modules(module) for module in modules)) - FREE
    code = [path for path in STAGES[name]["deps"] if path.startswith(("prelar/", "flows/"))]
    tracked = set().union(*(modules_under(path) for path in code))
    assert imported - tracked == set(), "imported, but not among the stage's deps"
    folders = {path for path in code if not path.endswith(".py")}
    idle = {
        path for path in set(code) - folders if not modules_under(path) & imported and path.endswith(".py")
    }
    assert idle == set(), "among the stage's deps, but not imported"


def test_the_lock_of_a_stage_is_on_what_it_writes() -> None:
    for name, path in WRITES.items():
        assert path in STAGES[name]["outs"]


def test_editing_the_actor_does_not_pretrain_again() -> None:
    assert not any(path.startswith("prelar/control") for path in STAGES["pretrain"]["deps"])


def test_every_path_of_the_code_exists() -> None:
    for name, stage in STAGES.items():
        missing = [
            path
            for path in stage["deps"]
            if path.startswith(("prelar/", "flows/")) and not (ROOT / path).exists()
        ]
        assert missing == [], name
