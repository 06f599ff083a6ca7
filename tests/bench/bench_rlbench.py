"""Live demonstrations: our flow against the way of `rlbench-generate-dataset`, both on stand-ins.

A model and not the simulator: the stand-ins sleep for `COSTS`, which fit two readings of the real one in
software: 103 steps of push_button from five cameras, RGB alone, took 5.9 s, and the generator's four episodes
of push_button and open_drawer, about 360 steps if they were like the recorded ones, 47 s. How the seconds
divide is assumed; a mask's include a point cloud. PNG files cost what they cost. Both get as many processes
as there are tasks, so that neither has an idle one. Whoever has CoppeliaSim should time the two themselves:
the flow prints its episodes a minute.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from prelar.config import PARAMS, read_yaml
from prelar.envs.names import RLBENCH_CAMERAS
from tests.conftest import ROOT
from tests.rlbench_standin import standin_env

PAIRS = 3
TASKS = ["push_button", "open_drawer", "reach_target"]
EPISODES = 4
COSTS = {"launch": 0.6, "load": 0.5, "reset": 0.5, "plan": 0.5, "steps": 92}
COSTS |= {"step": 0.010, "picture": 0.0075, "mask": 0.011}


def run() -> dict[str, float]:
    """`rlbench_vs_generator`: the median of the paired ratios of episodes a minute."""
    ratios, ends = [], []
    for _ in range(PAIRS):
        with tempfile.TemporaryDirectory() as name:
            collecting, whole = ours(Path(name))
        with tempfile.TemporaryDirectory() as name:
            ratios.append(theirs(Path(name)) / collecting)
        ends.append(whole - collecting)
    middle = statistics.median(ratios)
    print(
        f"rlbench_vs_generator (a model): {middle:.2f} (from {min(ratios):.2f} to {max(ratios):.2f}, "
        f"{PAIRS} pairs); before and after it the flow takes {statistics.median(ends):.0f} s"
    )
    return {"rlbench_vs_generator": middle}


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that finds the stand-ins, which are as slow as `COSTS` says."""
    changed = {**standin_env(folder / "standin"), "RLBENCH_COSTS": json.dumps(COSTS)}
    changed["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(changed["PYTHONPATH"])])
    both = {**os.environ, **changed}
    return {name: value for name, value in both.items() if value is not None}


def ours(folder: Path) -> tuple[float, float]:
    """Seconds in which the flow collects all episodes, and seconds of its whole run."""
    params = read_yaml(PARAMS)
    params["demos"] |= {"source": "rlbench", "tasks": TASKS, "cameras": list(RLBENCH_CAMERAS)}
    params["demos"] |= {"episodes": EPISODES, "workers": len(TASKS)}
    with (folder / PARAMS.name).open("w", encoding="utf-8") as handle:
        YAML().dump(params, handle)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows.demos"],
        cwd=folder,
        env=environment(folder),
        check=True,
        capture_output=True,
        text=True,
    )
    whole = time.monotonic() - begin
    told = re.search(rf"{EPISODES * len(TASKS)} episodes stored in .*, ([\d.]+) a minute", done.stdout)
    assert told, done.stdout
    return 60 * EPISODES * len(TASKS) / float(told[1]), whole


def theirs(folder: Path) -> float:
    """Seconds of the generator's whole run."""
    place = environment(folder)
    root = place["COPPELIASIM_ROOT"]
    command = [sys.executable, "-m", "tests.bench.rlbench_generator", str(folder / "made")]
    begin = time.monotonic()
    subprocess.run(
        [*command, str(len(TASKS)), str(EPISODES), *TASKS],
        env=place | {"DISPLAY": ":0", "LD_LIBRARY_PATH": root},
        check=True,
        capture_output=True,
    )
    return time.monotonic() - begin
