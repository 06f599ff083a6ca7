"""`make bench-learning`: does the agent learn? Fine-tuning on Meta-World tasks against chance.

Each run is the stage `finetune` as it is at `scale: small`, from pixels, in a project folder of its own. They
go seed by seed, so that what is finished is balanced over the tasks; what was interrupted goes on where it
was. The curves go to reports/learning, where `python -m prelar report` finds them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ruamel.yaml import YAML

from prelar import finetune, pretrain
from prelar.config import PARAMS, Config, load_config
from prelar.envs import make_env
from prelar.evaluation.controllability import interval
from prelar.stages import code_digest
from prelar.train.checkpoint import resume_key, save_parts
from prelar.utils.errors import UserError, run_main
from prelar.utils.files import remove, write_text
from prelar.utils.processes import processors
from prelar.utils.seeds import RngStream, episode_seed
from prelar.utils.tables import read_tsv, write_tsv

ROOT = Path(__file__).parents[2]
WORK = Path("data/.learning")
OUTPUT = Path("reports/learning")
TASKS = ("reach", "window-close", "plate-slide")
SETTINGS: dict[str, Any] = {
    "method": "dreamerv2",
    "scale": "small",
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
}
CHANCE_EPISODES = 20
LAST = 3

Curve = Mapping[str, Sequence[float]]
Doubles = npt.NDArray[np.float64]


def main() -> None:
    """Run what is missing, write the curves, and say of every task whether the agent rose above chance."""
    parser = argparse.ArgumentParser(prog="make bench-learning", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"Meta-World tasks ({' '.join(TASKS)})")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (5)")
    parser.add_argument("--jobs", type=int, default=min(2, processors()), help="runs at once")
    given = parser.parse_args()
    params = (ROOT / PARAMS).read_text(encoding="utf-8")
    key = resume_key("learning", code_digest(["prelar/"]), known=SETTINGS | {"params": params}, inputs=[])
    runs = [(task, seed) for seed in range(given.seeds) for task in given.tasks]
    with ThreadPoolExecutor(given.jobs) as pool:
        curves = dict(zip(runs, pool.map(lambda run: run_task(WORK / key, *run), runs), strict=True))
    report({task: [curves[task, seed] for seed in range(given.seeds)] for task in given.tasks})
    for path in WORK.iterdir():
        remove(path)


def project(folder: Path, task: str, seed: int) -> Config:
    """A project folder with the settings of this bench, and a world model as it is born."""
    params = YAML(typ="safe", pure=True).load((ROOT / PARAMS).read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    YAML().dump(params | SETTINGS | {"task": task, "seed": seed}, folder / PARAMS)
    config = load_config(folder / PARAMS)
    model = pretrain.build(config)
    save_parts(
        folder / finetune.PRETRAINED, model.state(), {"stage": "pretrain", "model": model.spec, "step": 0}
    )
    return config


def run_task(folder: Path, task: str, seed: int) -> Curve:
    """The learning curve of a run: step, return and success. What is done already is not done again."""
    place = folder / f"{task}-{seed}"
    evaluations = place / finetune.LOGS / "plots/metrics/eval"
    if not (place / finetune.OUTPUT).exists():
        steps = project(place, task, seed).finetune.env_steps
        print(f"{task}, seed {seed}: {steps} steps, log in {place}/log", flush=True)
        with (place / "log").open("ab") as log:
            done = subprocess.run(
                [sys.executable, "-m", "prelar", "finetune"],
                cwd=place,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=False,
            )
        if done.returncode:
            raise UserError(f"{task}, seed {seed}: ended with status {done.returncode}; see {place}/log")
    names = ("return", "success")
    tables = {name: read_tsv(evaluations / f"{name}.tsv") for name in names}
    return {"step": tables["return"]["step"]} | {name: tables[name][name] for name in names}


def play(config: Config, seeds: int, *, expert: bool) -> Doubles:
    """Returns of `CHANCE_EPISODES` episodes a seed like the curve's, of random actions or the expert.

    Random actions have the agent's pace, the expert the simulator's own.
    """
    preset = config.finetune
    repeat = None if expert else preset.action_repeat
    totals = []
    with make_env(config.task, time_limit=preset.time_limit, action_repeat=repeat) as simulator:
        for seed in range(seeds):
            draw = np.random.default_rng([seed, 1])
            for episode in range(CHANCE_EPISODES):
                simulator.reset(episode_seed(RngStream.CURVE_EPISODES, seed), episode)
                total, done = 0.0, False
                while not done:
                    action = simulator.expert() if expert else draw.uniform(-1, 1, simulator.action_dim)
                    answer = simulator.step(action)
                    total, done = total + answer.reward, answer.done
                totals.append(total)
    return np.array(totals)


def report(curves: Mapping[str, Sequence[Curve]]) -> None:
    """Write the table and the summary, and print a line a task. Raises `UserError` where one did not learn.

    A task is learnt where the lower end of the 95% interval of the agent's return, a bootstrap over seeds of
    their last evaluations, lies above the upper end of random actions'.
    """
    config = load_config(ROOT / PARAMS)
    preset = config.scales.small.finetune
    seeds = len(next(iter(curves.values())))
    columns: dict[str, Sequence[float]] = {}
    tasks = []
    for task, runs in curves.items():
        columns["step"] = runs[0]["step"]
        for name in ("return", "success"):
            columns |= {f"{task} {name} {seed}": run[name] for seed, run in enumerate(runs)}
        cfg = config.model_copy(update=SETTINGS | {"task": task})
        chance, expert = play(cfg, seeds, expert=False), play(cfg, 1, expert=True)
        ends = np.array([np.mean(run["return"][-LAST:]) for run in runs])
        tasks.append(
            {
                "task": task,
                "ends": ends.tolist(),
                "interval": interval(ends),
                "chance": float(chance.mean()),
                "chance_interval": interval(chance),
                "chance_episodes": len(chance),
                "expert": float(expert.mean()),
            }
        )
    write_tsv(OUTPUT / "curves.tsv", columns)
    summary = {
        "method": SETTINGS["method"],
        "time_limit": preset.time_limit,
        "episodes": preset.eval_episodes,
        "seeds": seeds,
        "last": LAST,
        "tasks": tasks,
    }
    write_text(OUTPUT / "summary.json", json.dumps(summary, indent=2) + "\n")
    for row in tasks:
        low, high = row["interval"]
        least, most = row["chance_interval"]
        print(
            f"{row['task']}, {seeds} seeds: return {np.mean(row['ends']):.0f} (95%: {low:.0f} to {high:.0f}) "
            f"over the last {LAST} points; random actions {row['chance']:.0f} "
            f"(95%: {least:.0f} to {most:.0f}); the scripted expert {row['expert']:.0f} -> {OUTPUT}"
        )
    missed = [row["task"] for row in tasks if row["interval"][0] <= row["chance_interval"][1]]
    if missed:
        raise UserError(f"learning: not above random actions on {', '.join(missed)}; look at the curves")


if __name__ == "__main__":
    run_main(main)
