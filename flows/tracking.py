"""DVC hears of what a flow made that was started by hand: `dvc status` is clean after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prelar.config import read_yaml

IN_STAGE = ("DVC_STAGE", "DVC_ROOT")
PIPELINE, PARAMS = Path("dvc.yaml"), Path("params.yaml")


def record(stage: str, begun: float) -> None:
    """Let DVC commit the outputs of `stage`, which a flow has just made with the values of params.yaml.

    Nothing happens inside a stage, whose outputs DVC commits itself, and where the current folder is not the
    top of a DVC project with that stage. Where something that the outputs are made of changed since the time
    `begun` (seconds since 1970), or DVC cannot (it is busy, or a dependency is missing), a line says so: the
    outputs are whole all the same, and the next `dvc repro` makes them again.
    """
    stages = read_yaml(PIPELINE).get("stages", {}) if Path(".dvc").is_dir() and PIPELINE.is_file() else {}
    if any(name in os.environ for name in IN_STAGE) or stage not in stages:
        return
    for path in (PARAMS, *map(Path, stages[stage]["deps"])):
        if _changed(path) > begun:
            print(f"{stage}: not recorded with DVC: {path} changed meanwhile", file=sys.stderr)
            return
    command = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet", stage]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(f"{stage}: recorded with DVC; `dvc status` tells what depends on it")
    else:
        told = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")), "ERROR: no reason"
        )
        print(f"{stage}: not recorded with DVC: {told.partition(': ')[2]}", file=sys.stderr)


def _changed(path: Path) -> float:
    """When a file, or the latest in a folder, was last written; 0 where there is none."""
    inside = [item for item in path.rglob("*") if "__pycache__" not in item.parts] if path.is_dir() else []
    return max((item.stat().st_mtime for item in (path, *inside) if item.exists()), default=0.0)
