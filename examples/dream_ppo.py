"""Train a policy in imagination: PPO of stable-baselines3 in the small trained model that the package ships.

    pip install 'prelar[sim]' stable-baselines3
    python examples/dream_ppo.py

No simulator runs: images, rewards and transitions are imagined, 64 episodes in parallel as one batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

import prelar

DEMO = Path(prelar.__file__).parent / "simulator/demo"


class Batch(VecEnv):
    """A `DreamVectorEnv` as stable-baselines3 wants it."""

    render_mode = "rgb_array"

    def __init__(self, env: prelar.DreamVectorEnv) -> None:
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.env = env

    def reset(self) -> Any:
        return self.env.reset(seed=self._seeds[0])[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        seen, rewards, _, truncated, info = self.env.step(self.actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for number in np.flatnonzero(truncated):
            infos[number] = {"terminal_observation": info["final_obs"][number], "TimeLimit.truncated": True}
        return seen, rewards, truncated, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, name, None)] * self.num_envs

    def set_attr(self, name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env, name, value)

    def env_method(self, name: str, *arguments: Any, indices: Any = None, **options: Any) -> list[Any]:
        return [getattr(self.env, name)(*arguments, **options)] * self.num_envs

    def env_is_wrapped(self, wrapper: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def imagined_return(env: prelar.DreamVectorEnv, policy: Callable[[Any], Any], seed: int) -> float:
    """The mean return of an episode of each rollout."""
    seen, _ = env.reset(seed=seed)
    total = np.zeros(env.num_envs)
    ended = np.zeros(env.num_envs, bool)
    while not ended.any():
        seen, rewards, _, ended, _ = env.step(policy(seen))
        total += rewards
    return float(total.mean())


def main() -> tuple[float, float]:
    """Train, and print the imagined return of random actions and of the trained policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=DEMO, help="a fine-tuned model with frames to start from")
    parser.add_argument("--steps", type=int, default=60_000, help="imagined steps; default: 60000")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    env = prelar.DreamVectorEnv(
        options.checkpoint, num_envs=64, observation="features", horizon=25, device=options.device
    )
    env.action_space.seed(0)
    chance = imagined_return(env, lambda seen: env.action_space.sample(), seed=1)
    learner = PPO("MlpPolicy", Batch(env), n_steps=25, batch_size=400, seed=0, device=options.device)
    learner.learn(options.steps)
    learnt = imagined_return(env, lambda seen: learner.predict(seen, deterministic=True)[0], seed=1)
    print(f"imagined return of 25 steps: random actions {chance:.1f}, PPO {learnt:.1f}")
    return chance, learnt


if __name__ == "__main__":
    main()
