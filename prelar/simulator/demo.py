"""The small trained model that the package ships, so that there is something to play before any training.

`make demo-model` packs the agent of the run at hand, in half precision, with what it starts from.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from prelar.config import PARAMS, Config, load_config, read_yaml
from prelar.simulator.step import load_step
from prelar.simulator.world import WORLD, episodes_world
from prelar.train.checkpoint import load_parts, save_parts
from prelar.utils.errors import run_main

DEMO = Path(__file__).parent / "demo"
FINETUNE = Path("data/finetune")
EPISODES = 2


def pack(config: Config, target: Path = DEMO) -> None:
    """Write data/finetune in half precision, with params.yaml, the seed and the commit that made it.

    Raises `UserError` where there is no agent.
    """
    parts, described = load_parts(FINETUNE)
    half = {
        name: {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        for name, weights in parts.items()
        if name != "slow_critic"
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    about = {key: value for key, value in described.items() if key not in ("schema", "parts")}
    made = {"seed": config.seed, "commit": commit.stdout.strip(), "params": read_yaml(PARAMS)}
    save_parts(target, half, about | {"made_by": made})
    step = load_step(target)
    world = episodes_world(step, config, episodes=EPISODES)
    (target / WORLD).write_bytes(world.content())
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    print(f"demo-model: {config.method} on {config.task}, seed {config.seed} -> {target}, {size:.1f} MB")


def main() -> None:
    """Pack the agent of the run at hand."""
    pack(load_config())


if __name__ == "__main__":
    run_main(main)
