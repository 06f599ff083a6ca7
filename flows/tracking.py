"""DVC hears of what a flow made that was started by hand: `dvc status` is clean after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prelar.config import read_yaml
from prelar.errors import printable

IN_STAGE = ("DVC_STAGE", "DVC_ROOT")
PIPELINE, PARAMS = Path("dvc.yaml"), Path("params.yaml")


Stamps = dict[Path, list[tuple[str, int, int, int]]]


def stamps(stage: str) -> Stamps:
    """What the outputs of `stage` are made of, as it lies there now: inode, size and time of every file.

    Nothing where the current folder is not the top of a DVC project with that stage, and inside a stage,
    whose outputs DVC commits itself.
    """
    stages = read_yaml(PIPELINE).get("stages", {}) if Path(".dvc").is_dir() and PIPELINE.is_file() else {}
    if any(name in os.environ for name in IN_STAGE) or stage not in stages:
        return {}
    return {path: _stamps(path) for path in (PARAMS, *map(Path, stages[stage]["deps"]))}


def record(stage: str, begun: Stamps) -> None:
    """Let DVC commit the outputs of `stage`, which a flow has just made with the values of params.yaml.

    begun: `stamps` of when it began; nothing happens where there were none. Where one of them differs now, or
    DVC cannot (it is busy, or a dependency is missing), a line says so: the outputs are whole all the same,
    and the next `dvc repro` makes them again.
    """
    if not begun:
        return
    for path, before in begun.items():
        if _stamps(path) != before:
            print(f"{stage}: not recorded with DVC: {path} changed meanwhile", file=sys.stderr)
            return
    command = [sys.executable, "-m", "dvc", "commit", "--force", stage]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(f"{stage}: recorded with DVC; `dvc status` tells what depends on it")
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason")
    reason = printable(told.removeprefix("ERROR: "))
    print(
        f"{stage}: not recorded with DVC: {reason}; mend that and run `dvc commit {stage}`", file=sys.stderr
    )


def _stamps(path: Path) -> list[tuple[str, int, int, int]]:
    """Inode, size and time of a file, or of every file in a folder; none where there is none."""
    inside = [item for item in path.rglob("*") if "__pycache__" not in item.parts] if path.is_dir() else []
    states = [(str(item), item.stat()) for item in sorted((path, *inside)) if item.is_file()]
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]
