"""The small trained model that the package ships: it is small, says what made it, and imagines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prelar.__main__ import build_parser
from prelar.simulator import demo
from prelar.simulator.step import gumbel_noise, load_step
from prelar.simulator.world import WORLD, read_world
from prelar.train.checkpoint import load_config


def test_it_is_small_and_says_what_made_it() -> None:
    weights = [path for path in demo.DEMO.glob("*.safetensors") if path.name != WORLD]
    assert sum(path.stat().st_size for path in weights) <= 2e6
    made = load_config(demo.DEMO)["made_by"]
    assert len(made["commit"]) == 40 and made["seed"] == made["params"]["seed"]


def test_it_foresees_its_own_episodes_better_than_the_last_frame() -> None:
    """Over eight steps under the recording's actions, from several starts of either episode."""
    step, world = load_step(demo.DEMO), read_world(demo.DEMO / WORLD)
    frames = world.arrays["frames"].astype(np.float32) / 255
    shape = (1, step.spec.stoch, step.spec.discrete)
    imagined, copied = [], []
    for clip in range(len(frames)):
        for begin in (4, 8, 12):
            stoch, deter = world.start(clip, begin, step.spec.discrete)
            for ahead in range(8):
                action = torch.from_numpy(world.arrays["actions"][clip, begin + ahead : begin + ahead + 1])
                noise = torch.from_numpy(gumbel_noise(0, ahead, shape))
                stoch, deter, frame, *_ = step(stoch, deter, action, noise)
            true = frames[clip, begin + 8]
            imagined.append(np.square(frame[0].numpy() / 255 - true).mean())
            copied.append(np.square(frames[clip, begin] - true).mean())
    assert np.mean(imagined) < np.mean(copied)


def test_it_is_what_plays_where_nothing_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prelar import __main__ as command
    from prelar.simulator import play

    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    monkeypatch.setattr(play, "run", lambda *given: asked.append(given))
    command.run_play(build_parser().parse_args(["play"]))
    assert asked == [(None, demo.DEMO, 8390)]
