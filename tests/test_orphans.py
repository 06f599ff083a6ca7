"""A stage that lives on after DVC was killed: its work is not lost, and never mixed up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from prelar.config import Config, read_yaml
from tests.conftest import ROOT
from tests.test_pretrain import data, outputs, project, run

__all__ = ["data"]


def surroundings() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}


def dvc(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["dvc", *words], cwd=folder, env=surroundings(), capture_output=True, text=True, timeout=300
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


def test_a_stage_that_outlived_dvc_is_taken_up_by_the_next_repro(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    cfg = pipeline(folder, data)
    first = subprocess.Popen(["dvc", "repro"], cwd=folder, env=surroundings(), stdout=subprocess.DEVNULL)
    until(lambda: list(folder.glob("data/.resume/*/step-*.pt")), "a first snapshot")
    child = int((folder / "data/.locks/data-pretrain.lock").read_text())
    os.kill(child, signal.SIGSTOP)
    first.kill()
    first.wait()
    try:
        refused = dvc(folder, "repro")
        assert refused.returncode != 0
        assert f"data/pretrain: process {child} is writing it; wait for it or stop it" in refused.stderr
        assert not (folder / "reports/pretrain").exists(), "DVC removed what the stage had written so far"
    finally:
        os.kill(child, signal.SIGCONT)
    until(lambda: (folder / "data/pretrain").exists(), "the checkpoint of the stage that lives on")
    until(lambda: not Path(f"/proc/{child}").exists(), "its end")
    last = dvc(folder, "repro")
    assert last.returncode == 0, last.stderr
    assert "going on from step 60 of 60" in last.stdout
    assert not list(folder.glob("data/.resume/*"))
    assert run(tmp_path / "whole", data, cfg) == 0
    assert outputs(folder) == outputs(tmp_path / "whole")
    again = dvc(folder, "repro", "-f")
    assert again.returncode == 0 and "going on" not in again.stdout
    assert outputs(folder) == outputs(tmp_path / "whole")
