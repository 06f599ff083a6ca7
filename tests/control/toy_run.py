"""Fine-tune a small model on the toy world: `python -m tests.control.toy_run [KEY=VALUE …]`.

Leaves the weights in `out/` and the log in `log/` of the working folder. Tests run it in this process, or in
one of its own to kill.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from prelar.config import Finetune
from prelar.finetune import learn
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.train.checkpoint import Snapshots, resume_key, save_parts
from prelar.train.loop import set_up
from tests.control.toy import ACTIONS, DotWorld

TINY: dict[str, Any] = {
    "env_steps": 60,
    "prefill": 14,
    "pretrain_updates": 2,
    "train_every": 4,
    "batch": 3,
    "length": 6,
    "lr": 1e-3,
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "freeze_updates": 3,
    "actor_after": 0,
    "action_repeat": None,
    "beta": 1.0,
    "bonus": 1.0,
    "horizon": 4,
    "discount": 0.95,
    "lam": 0.95,
    "entropy": 1e-3,
    "units": 16,
    "layers": 2,
    "slow_every": 3,
    "replay": 40,
    "envs": 2,
    "eval_every": 25,
    "eval_episodes": 1,
    "eval_action": "mode",
    "time_limit": 7,
    "log_every": 5,
    "checkpoint_every": 9,
}
SIZES = {"cnn_depth": 4, "hidden": 16, "deter": 16, "stoch": 4, "discrete": 4}


def build(method: str, preset: Finetune, sizes: dict[str, int], bonus: float) -> WorldModel:
    heads = {"units": preset.units, "layers": preset.layers, "bonus": bonus}
    return build_model(
        ModelSpec(stage="finetune", method=method, robot_action_dim=ACTIONS, action_dim=8, **heads, **sizes)
    )


def run(
    root: Path,
    *,
    method: str = "prelar",
    bonus: float = 1.0,
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    action_repeat: int = 1,
    **changes: Any,
) -> None:
    """Fine-tune in `root`, going on from what a killed run left there."""
    preset = Finetune(**(TINY | changes))
    fabric = set_up(device="cpu", precision="fp32", threads=1)
    torch.manual_seed(0)
    model = build(method, preset, SIZES if sizes is None else sizes, bonus)
    snapshots = Snapshots(
        resume_key("toy", "", known=changes | {"action_repeat": action_repeat}, inputs=[]),
        root=root / "resume",
    )
    actor_critic = learn(
        fabric,
        model,
        functools.partial(DotWorld, preset.time_limit, action_repeat),
        preset,
        seed=seed,
        snapshots=snapshots,
        log_folder=root / "log",
    )
    save_parts(root / "out", model.state() | {"actor_critic": actor_critic.state_dict()}, {})
    snapshots.remove()


if __name__ == "__main__":
    run(Path.cwd(), **{key: int(value) for key, _, value in (word.partition("=") for word in sys.argv[1:])})
