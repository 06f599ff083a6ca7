"""A project with a pipeline of the real one's shape whose stages take no time and leave a line each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from tests.conftest import ROOT, prefect_home

STAGE = """\
import json, os, pathlib, signal, sys, time
from ruamel.yaml import YAML
from prelar.utils.parents import end_with_dvc
end_with_dvc()
signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background of a shell
name, keys, *outs = sys.argv[1:]
snapshot = pathlib.Path(os.environ.get("PRELAR_RESUME", "data/.resume")) / name
with open(os.environ["TOY_RUNS"], "a") as runs:
    resumed = f"{name}-resumed\\n" if snapshot.exists() else ""
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    snapshot.touch()
    runs.write(f"{resumed}{name}\\n")
time.sleep(float(os.environ.get("TOY_SECONDS", "0.2")))
params = YAML(typ="safe").load(pathlib.Path("params.yaml"))
if {name, params["task"] if name == "finetune" else ""} & set(os.environ.get("TOY_BROKEN", "").split()):
    sys.exit("broken on purpose")
figures = {"success_rate": 0.5, "prediction_error": 0.1}
made = figures if name == "evaluate" else {key: params[key] for key in keys.split(",")}
for out in outs:
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))
"""
STAGES = {
    "ssv2": {"params": ["ssv2", "dataset"], "outs": ["data/ssv2.zarr"]},
    "pretrain": {
        "deps": ["data/${dataset}.zarr"],
        "params": ["method", "dataset", "seed", "beta_a", "scales.${scale}.pretrain"],
        "outs": ["data/pretrain"],
    },
    "finetune": {"deps": ["data/pretrain"], "params": ["method", "task", "bonus"], "outs": ["data/finetune"]},
    "evaluate": {
        "deps": ["data/finetune"],
        "params": ["method", "seed"],
        "metrics": [{"metrics.json": {"cache": False}}],
    },
    "report": {"deps": ["metrics.json"], "params": ["method"], "outs": ["reports/index.html"]},
}


@dataclass(frozen=True)
class Toy:
    """The project, and the file that its stages write their names to."""

    root: Path
    runs: Path

    def environment(self, **changes: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        gone = ("PREFECT_API_URL", "PREFECT_HOME")
        kept = {key: value for key, value in os.environ.items() if key not in gone}
        return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "TOY_RUNS": str(self.runs)} | changes

    def command(self, *words: str, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.root,
            env=self.environment(**changes),
            check=check,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def sweep(self, *words: str, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
        return self.command(sys.executable, "-m", "flows.experiments", *words, check=check, **changes)

    def ran(self, stage: str) -> int:
        """How often a stage was really run."""
        return self.runs.read_text(encoding="utf-8").split().count(stage) if self.runs.exists() else 0


def make_toy(folder: Path) -> Toy:
    """A committed project in a folder that is empty."""
    toy = Toy(folder / "project", folder / "runs")
    toy.root.mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", toy.root)
    shutil.copytree(prefect_home(), toy.root / ".prefect")
    (toy.root / "stage.py").write_text(STAGE, encoding="utf-8")
    stages = {}
    for name, stage in STAGES.items():
        outs = [*stage.get("outs", []), *(["metrics.json"] if "metrics" in stage else [])]
        keys = ",".join(key for key in stage["params"] if "." not in key)
        stages[name] = {"cmd": f"exec python stage.py {name} {keys} {' '.join(outs)}", **stage}
        stages[name]["deps"] = ["stage.py", *stage.get("deps", [])]
    YAML().dump({"stages": stages}, toy.root / "dvc.yaml")
    (toy.root / ".gitignore").write_text("/data\n/reports\n/.prefect\n", encoding="utf-8")
    for words in (
        ("git", "init", "-q", "-b", "main"),
        ("git", "config", "user.email", "tests@localhost"),
        ("git", "config", "user.name", "tests"),
        ("dvc", "init", "-q"),
    ):
        toy.command(*words)
    settings = "[core]\n    autostage = true\n    analytics = false\n"
    (toy.root / ".dvc/config").write_text(settings, encoding="utf-8")
    toy.command("git", "add", "-A")
    toy.command("git", "commit", "-q", "-m", "Start")
    return toy
