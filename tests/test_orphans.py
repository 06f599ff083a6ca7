"""DVC is killed: its stage ends with it, writes nothing over what the cache puts back, and loses no work."""

from __future__ import annotations

import functools
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

import flows.ssv2  # noqa: F401  Prefect makes its folder where it is first imported, which is here
from prelar.config import Config, read_yaml
from prelar.utils import parents
from prelar.utils.files import LOCKS, remove
from tests.conftest import ROOT, Project
from tests.test_pretrain import data, outputs, project, run

__all__ = ["data"]

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]
CHILD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from prelar.utils.parents import end_with_dvc
end_with_dvc()
print("at work", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(600)
"""


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}


def dvc(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["dvc", *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def pipeline(folder: Path, data: Path) -> Config:
    """A project of DVC's whose one stage is the real `pretrain`, without its dependencies on code."""
    cfg = project(folder, data, steps=60, checkpoint_every=5, log_every=7, video_every=60)
    stage = read_yaml(ROOT / "dvc.yaml")["stages"]["pretrain"]
    stage["deps"] = [path for path in stage["deps"] if not path.startswith("prelar/")]
    YAML().dump({"stages": {"pretrain": stage}}, folder / "dvc.yaml")
    assert dvc(folder, "init", "--no-scm").returncode == 0
    return cfg


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def ended(process: int) -> bool:
    """Whether a process has ended, collected or not."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Tied(Exception):
    """A process asked to end with another."""


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_ties_itself_to_dvc_before_anything_else(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tie(parent: int, number: int) -> None:
        assert (parent, number) == (os.getppid(), signal.SIGKILL)
        raise Tied

    command = STAGES[name].get("do", STAGES[name])["cmd"]
    _, _, _, module, *words = command.replace("${item.kind}", "demos").replace("${key}", "more").split()
    monkeypatch.setattr(parents, "end_with_parent", tie)
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", name)
    with pytest.raises(Tied):
        file = "prelar/__main__.py" if module == "prelar" else f"{module.replace('.', '/')}.py"
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variable", "stopped"), [("DVC_STAGE", False), ("DVC_STAGE", True), ("X", False)])
def test_a_stage_ends_with_dvc_even_while_it_is_stopped_and_others_live_on(
    variable: str, stopped: bool
) -> None:
    settings = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        env={**settings, variable: "pretrain"},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().split()[0])
        if stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
    if variable == "DVC_STAGE":
        until(lambda: ended(child), "the end of a stage without DVC")
        return
    time.sleep(0.5)
    assert not ended(child)
    os.kill(child, signal.SIGKILL)


@pytest.mark.long
def test_a_stage_without_dvc_is_gone_when_the_cache_answers_and_goes_on_later(
    tmp_path: Path, data: Path
) -> None:
    folder = tmp_path / "run"
    cfg = pipeline(folder, data)
    assert dvc(folder, "repro").returncode == 0
    first = outputs(folder)
    other = cfg.model_copy(update={"beta_a": 0.37})
    YAML().dump(other.model_dump(), folder / "params.yaml")
    killed = subprocess.Popen(["dvc", "repro"], cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: list(folder.glob("data/.resume/*/step-*.pt")), "a first snapshot")
    child = int((folder / LOCKS / "data-pretrain.lock").read_text())
    killed.kill()
    killed.wait()
    until(lambda: ended(child), "the end of the stage")
    YAML().dump(cfg.model_dump(), folder / "params.yaml")
    answered = dvc(folder, "repro")
    assert answered.returncode == 0 and "cached" in answered.stdout, answered.stdout
    assert outputs(folder) == first
    YAML().dump(other.model_dump(), folder / "params.yaml")
    last = dvc(folder, "repro")
    assert last.returncode == 0 and "going on from step" in last.stdout, last.stderr
    assert not list(folder.glob("data/.resume/*"))
    assert run(tmp_path / "whole", data, other) == 0
    assert outputs(folder) == outputs(tmp_path / "whole")


CHANGES: dict[str, dict[str, Any]] = {
    "sample": {"sample": {"seed": 5}},
    "ssv2": {"ssv2": {"clip_seconds": 4.0, "min_frames": 7}},
    "demos": {"demos": {"seed": 5}},
    "pretrain": {"beta_a": 0.37},
    "finetune": {"seed": 5},
    "evaluate": {"scales": {"smoke": {"evaluate": {"probe_updates": 3}}}},
}
"""A change of params.yaml by which each stage that writes for long does something else."""


def contents(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Every file of a stage's outputs, by path."""
    places = [folder / name for name in names]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.long
def test_no_stage_writes_over_what_the_cache_puts_back(
    tmp_path: Path, make_project: Callable[[Path], Project]
) -> None:
    project = make_project(tmp_path / "project")
    project.run("dvc", "repro", timeout=900)
    params, locks = project.root / "params.yaml", project.root / LOCKS
    plain = params.read_text(encoding="utf-8")
    for name, change in CHANGES.items():
        words = ("dvc", "repro", "--single-item", name)
        before = contents(project.root, STAGES[name]["outs"])
        remove(locks)
        project.edit(**change)
        settings = {"cwd": project.root, "env": project.environment, "stdout": subprocess.DEVNULL}
        killed = subprocess.Popen(words, **settings, stderr=subprocess.DEVNULL)  # type: ignore[call-overload]
        until(lambda: list(locks.glob("*.lock")), f"{name} at work")
        time.sleep(2)
        begun = psutil.Process(killed.pid).children(recursive=True)
        assert begun, f"{name} had ended before DVC was killed"
        killed.kill()
        killed.wait()
        for process in begun:
            until(functools.partial(ended, process.pid), f"the end of {name} and its workers")
        params.write_text(plain, encoding="utf-8")
        assert "is cached" in project.run(*words).stdout, name
        assert contents(project.root, STAGES[name]["outs"]) == before, name
