"""How much the training stages are going to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from prelar import pretrain
from prelar.config import Config
from prelar.space import FRAME_BYTES, require

STEP_BYTES = FRAME_BYTES + 64
WEIGHT_BYTES = 4
SNAPSHOTS = 3
"""Snapshots on the disk at once: two that are kept and one that is being written."""
ADAM = 3
"""Numbers that a snapshot holds for each weight: the weight and Adam's two moments."""


def check_stage(stage: str, config: Config) -> None:
    """Raise `UserError` where there is clearly too little room for what a training stage is to write."""
    needed = estimates(config).get(stage)
    if needed:
        require(Path("data") / stage, needed, f"{stage} at scale {config.scale}")


def estimates(config: Config) -> Mapping[str, int]:
    """Bytes that each stage is to write at most at once, for stages that write much.

    Data sets are left out: only their source tells how large they are.
    """
    model = weights(config) * WEIGHT_BYTES
    preset = config.finetune
    steps = min(preset.replay, preset.env_steps) + 3 * (preset.checkpoint_every + preset.time_limit)
    return {
        "pretrain": SNAPSHOTS * ADAM * model + model,
        "finetune": SNAPSHOTS * ADAM * 2 * model + steps * STEP_BYTES,
    }


def weights(config: Config) -> int:
    """Weights of the world model that the parameters ask for; it is built without memory for them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(weight.numel() for weight in pretrain.build(config).parameters())
