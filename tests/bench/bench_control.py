"""Fine-tuning end to end, and its replay at full size.

The world is the task reach, the sizes are those of `scale: smoke`. One environment in this process is paired
with several in processes of their own, which step while updates run. The replay is a sparse file of a million
steps, so what is measured of it is our own work and the page cache, not the disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch

from prelar.config import Finetune, load_config
from prelar.control.replay import Replay
from prelar.envs.metaworld import ACTION_DIM, Simulator
from prelar.finetune import Speed, learn
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.train.checkpoint import Snapshots
from prelar.train.loop import set_up

PAIRS = 3
CROWD = 5
STEPS = {"env_steps": 500, "prefill": 250, "pretrain_updates": 0, "time_limit": 50, "eval_every": 500}
CAPACITY = 1_000_000
EPISODE = 501
BATCHES = 30


def run() -> dict[str, float]:
    """`finetune_steps_per_s` with one environment, `finetune_crowd_ratio`, and the replay's figures."""
    readings = [(reading(1), reading(CROWD)) for _ in range(PAIRS)]
    ratios = [crowd / single for single, crowd in readings]
    print(
        f"finetune_crowd_ratio: {CROWD} environments in processes against one here: "
        f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}, {PAIRS} pairs)"
    )
    return {
        "finetune_steps_per_s": statistics.median(single for single, _ in readings),
        "finetune_crowd_ratio": statistics.median(ratios),
    } | replay()


def reading(envs: int) -> float:
    """Environment steps a second of a short run, without its start; its shares of time are printed."""
    config = load_config()
    preset = Finetune(**(config.finetune.model_dump() | STEPS | {"envs": envs}))
    fabric = set_up(device=config.device, precision=config.precision, threads=config.threads)
    torch.manual_seed(0)
    names = ("cnn_depth", "hidden", "deter", "stoch", "discrete")
    model = build_model(
        ModelSpec(
            stage="finetune",
            method=config.method,
            action_dim=config.action_dim or config.pretrain.action_dim,
            robot_action_dim=ACTION_DIM,
            units=preset.units,
            layers=preset.layers,
            **{name: getattr(config.pretrain, name) for name in names},
        )
    )
    speeds: list[Speed] = []
    with tempfile.TemporaryDirectory() as folder:
        learn(
            fabric,
            model,
            lambda: Simulator("reach", time_limit=50),
            preset,
            seed=0,
            snapshots=Snapshots("bench", root=Path(folder)),
            log_folder=Path(folder) / "log",
            on_end=speeds.append,
        )
    print(f"{envs} environments: {speeds[0]}", flush=True)
    return speeds[0].rate


def replay() -> dict[str, float]:
    """Size of a million steps, sequences of 50 steps a second in batches of 50, and the memory they take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.bin"
        held = Replay(path, capacity=CAPACITY, margin=0, action_dim=ACTION_DIM)
        os.truncate(path, CAPACITY * held.records.itemsize)
        spans = [[start, EPISODE] for start in range(0, CAPACITY - EPISODE, EPISODE)]
        held.load_state_dict({"written": CAPACITY, "spans": spans})
        before = psutil.Process().memory_info().rss
        begin = time.perf_counter()
        for update in range(BATCHES):
            held.read(held.choose(batch=50, length=50, seed=0, update=update), 50)
        seconds = time.perf_counter() - begin
        grown = psutil.Process().memory_info().rss - before
        size = path.stat().st_size
        held.close()
    print(f"replay: a million steps are {size / 1e9:.2f} GB on disk")
    return {
        "replay_gigabytes": size / 1e9,
        "replay_sequences_per_s": 50 * BATCHES / seconds,
        "replay_resident_megabytes": grown / 1e6,
    }
