"""`make bench-learning`: does the agent learn? Fine-tuning on a Meta-World task against chance.

Each seed is a run of the stage `finetune` as it is, from pixels, in a project folder of its own whose
params.yaml has `SETTINGS`. What was interrupted goes on where it was. The curves go to reports/learning,
where `python -m prelar report` finds them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ruamel.yaml import YAML

from prelar import finetune, pretrain
from prelar.config import PARAMS, Config, load_config
from prelar.envs.metaworld import ACTION_DIM, Simulator
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
SCALE = "smoke"
SETTINGS: dict[str, Any] = {
    "method": "dreamerv2",
    "task": "reach",
    "scale": SCALE,
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
}
SIZES = {"cnn_depth": 8, "hidden": 128, "deter": 128, "stoch": 8, "discrete": 8}
PRESET: dict[str, Any] = {
    "env_steps": 8000,
    "prefill": 1000,
    "pretrain_updates": 100,
    "train_every": 5,
    "batch": 10,
    "length": 16,
    "lr": 1e-3,
    "actor_lr": 5e-4,
    "critic_lr": 5e-4,
    "freeze_updates": 0,
    "actor_after": 0,
    "action_repeat": None,
    "beta": 1.0,
    "bonus": 1.0,
    "horizon": 10,
    "discount": 0.95,
    "lam": 0.95,
    "entropy": 1e-4,
    "units": 128,
    "layers": 2,
    "slow_every": 50,
    "replay": 20000,
    "envs": 1,
    "eval_every": 1000,
    "eval_episodes": 5,
    "time_limit": 100,
    "log_every": 200,
    "checkpoint_every": 1000,
}
CHANCE_EPISODES = 20
LAST = 3
RESAMPLES = 10_000

Doubles = npt.NDArray[np.float64]


def main() -> None:
    """Run what is missing, write the curves, and say whether every seed rose above chance."""
    parser = argparse.ArgumentParser(prog="make bench-learning", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (3)")
    parser.add_argument("--jobs", type=int, default=min(2, processors()), help="runs at once")
    options = parser.parse_args()
    key = resume_key("learning", code_digest(["prelar/"]), known=SETTINGS | SIZES | PRESET, inputs=[])
    seeds = range(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        curves = list(pool.map(lambda seed: run_seed(WORK / key, seed), seeds))
    report(curves, np.concatenate([play(seed, expert=False) for seed in seeds]))
    for path in WORK.iterdir():
        remove(path)


def project(folder: Path, seed: int) -> Config:
    """A project folder with the settings of this bench, and a world model as it is born."""
    params = YAML(typ="safe", pure=True).load((ROOT / PARAMS).read_text(encoding="utf-8"))
    params |= SETTINGS | {"seed": seed}
    params["scales"][SCALE]["pretrain"] |= SIZES
    params["scales"][SCALE]["finetune"] = PRESET
    folder.mkdir(parents=True, exist_ok=True)
    YAML().dump(params, folder / PARAMS)
    config = load_config(folder / PARAMS)
    model = pretrain.build(config)
    save_parts(
        folder / finetune.PRETRAINED, model.state(), {"stage": "pretrain", "model": model.spec, "step": 0}
    )
    return config


def run_seed(folder: Path, seed: int) -> dict[str, list[float]]:
    """The learning curve of one seed: step, return and success. What is done already is not done again."""
    place = folder / f"seed-{seed}"
    curve = place / finetune.LOGS / "plots/metrics/eval"
    if not (place / finetune.OUTPUT).exists():
        project(place, seed)
        print(
            f"seed {seed}: {PRESET['env_steps']} steps of {SETTINGS['task']}, log in {place}/log", flush=True
        )
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
            raise UserError(f"seed {seed}: ended with status {done.returncode}; see {place}/log, then go on")
    names = ("return", "success")
    tables = {name: read_tsv(curve / f"{name}.tsv") for name in names}
    return {"step": tables["return"]["step"]} | {name: tables[name][name] for name in names}


def play(seed: int, *, expert: bool) -> Doubles:
    """Returns of `CHANCE_EPISODES` episodes like the curve's, of random actions or the scripted expert."""
    draw = np.random.default_rng([seed, 1])
    totals = []
    with Simulator(SETTINGS["task"], time_limit=PRESET["time_limit"]) as simulator:
        for episode in range(CHANCE_EPISODES):
            simulator.reset(episode_seed(RngStream.CURVE_EPISODES, seed), episode)
            total, done = 0.0, False
            while not done:
                action = simulator.expert() if expert else draw.uniform(-1, 1, ACTION_DIM)
                answer = simulator.step(action)
                total, done = total + answer.reward, answer.done
            totals.append(total)
    return np.array(totals)


def interval(values: Doubles) -> tuple[float, float]:
    """Bootstrap 95% interval of the mean."""
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def report(curves: list[dict[str, list[float]]], chance: Doubles) -> None:
    """Write the table and the summary, and print a line. Raises `UserError` where a seed did not learn."""
    low, high = interval(chance)
    ends = [float(np.mean(curve["return"][-LAST:])) for curve in curves]
    columns: dict[str, list[float]] = {"step": curves[0]["step"]}
    for name in ("return", "success"):
        columns |= {f"{name}_{seed}": curve[name] for seed, curve in enumerate(curves)}
    write_tsv(OUTPUT / "curves.tsv", columns)
    summary = {
        "method": SETTINGS["method"],
        "task": SETTINGS["task"],
        "time_limit": PRESET["time_limit"],
        "episodes": PRESET["eval_episodes"],
        "seeds": len(curves),
        "chance": float(chance.mean()),
        "chance_interval": [low, high],
        "chance_episodes": len(chance),
        "expert": float(np.mean(play(0, expert=True))),
        "ends": ends,
        "last": LAST,
    }
    write_text(OUTPUT / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"{SETTINGS['task']}, {len(curves)} seeds: return {np.mean(ends):.0f} "
        f"({min(ends):.0f} to {max(ends):.0f}) over the last {LAST} points; "
        f"random actions {chance.mean():.0f} (95%: {low:.0f} to {high:.0f}); "
        f"the scripted expert {summary['expert']:.0f} -> {OUTPUT}"
    )
    if min(ends) <= high:
        raise UserError("learning: a seed did not rise above random actions; look at its log")


if __name__ == "__main__":
    run_main(main)
