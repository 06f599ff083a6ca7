"""Small untrained models of every method, and worlds of made-up frames for them to start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prelar.control.actor_critic import Actor
from prelar.methods import METHODS, build_model
from prelar.model.layers import MLP, initialise
from prelar.model.spec import ModelSpec
from prelar.simulator.page import Entry, digest
from prelar.simulator.step import Step, export, export_look, load_step
from prelar.simulator.world import World, robot_world, video_world
from prelar.train.checkpoint import save_parts

KINDS = [
    (method, stage)
    for method in METHODS
    for stage in ("pretrain", "finetune")
    if stage == "finetune" or METHODS[method].pretrains
]
FRAMES = 6


def make_checkpoint(folder: Path, method: str, stage: str, **changes: object) -> None:
    """Write a checkpoint as the stage does."""
    torch.manual_seed(3)
    sizes = {"cnn_depth": 4, "hidden": 16, "deter": 16, "stoch": 4, "discrete": 4, "units": 16, "layers": 2}
    spec = ModelSpec(method=method, stage=stage, **{"action_dim": 8, **sizes, **changes})  # type: ignore[arg-type]
    model = build_model(spec)
    parts = model.state()
    if stage == "finetune":
        heads = {"units": spec.units, "layers": spec.layers}
        actor, critic = Actor(model.feature_dim, 4, **heads), MLP(model.feature_dim, 1, **heads)
        initialise(critic)
        parts |= {"actor": actor.state_dict(), "critic": critic.state_dict()}
    about = {"stage": stage, "model": spec, "method": method, "task": "reach", "eval_action": "mean"}
    save_parts(folder, parts, about)


def make_world(step: Step, labels: tuple[str, ...] = ("one", "two")) -> World:
    """A world of random frames, a clip for each label."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (len(labels), FRAMES, 64, 64, 3), np.uint8)
    if step.actor is None:
        return video_world(step, frames, list(labels), frames)
    return robot_world(step, frames, random.uniform(-1, 1, (len(labels), FRAMES - 1, 4)).astype(np.float32))


def make_entry(
    folder: Path, method: str, stage: str, *, labels: tuple[str, ...] = ("one", "two"), **sizes: int
) -> Entry:
    """What a page holds of such a model."""
    make_checkpoint(folder, method, stage, **sizes)
    step = load_step(folder)
    world = make_world(step, labels)
    context = world.context(0)
    graphs = export(step, context), export_look(step, context)
    return Entry(f"{method}, {stage}", ["A small model."], world, *graphs, digest(step))
