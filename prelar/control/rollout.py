"""Whole episodes under a policy: for learning curves, for the evaluation and for videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from prelar.envs.pixels import Actions, Image, PixelEnv
from prelar.utils.seeds import RngStream, seed_torch


class Policy(Protocol):
    """Maps images to actions, with a memory that it alone understands."""

    def act(self, memory: Any, images: Image, is_first: npt.NDArray[np.bool_]) -> tuple[Actions, Any]:
        """Choose actions (N, A) for images uint8 (N, 64, 64, 3).

        memory: what the last call returned, None at first. is_first (N,): where an episode starts.
        """


@dataclass(frozen=True)
class Episode:
    """One finished episode of T actions.

    rewards float32 (T,); actions float32 (T, A); success: whether the task was solved at any step, None where
    it tells no success; frames uint8 (T + 1, 64, 64, 3), or None where they were not kept.
    """

    rewards: npt.NDArray[np.float32]
    actions: Actions
    success: bool | None
    frames: Image | None

    @property
    def total(self) -> float:
        """Undiscounted return: the sum of the rewards."""
        return float(self.rewards.sum(dtype=np.float64))


class RandomPolicy:
    """Uniform actions in [-1, 1]^A, drawn from torch's global generator, without a memory."""

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def act(self, memory: None, images: Image, is_first: npt.NDArray[np.bool_]) -> tuple[Actions, None]:
        """Draw actions (N, A)."""
        return torch.empty(len(images), self.action_dim).uniform_(-1, 1).numpy(), None


def play(env: PixelEnv, policy: Policy, *, episode: int, seed: int, keep_frames: bool = False) -> Episode:
    """Play one episode to its end: a pure function of (env's seed, episode, policy, seed).

    seed: for the latents and actions that the policy samples. torch's global generators are left as they
    were.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        seed_torch(RngStream.EPISODE, seed, episode)
        image, _ = env.reset(options={"episode": episode})
        frames = [image]
        actions: list[Actions] = []
        rewards: list[float] = []
        success = ended = False
        memory: Any = None
        while not ended:
            action, memory = policy.act(memory, image[None], np.array([not actions]))
            image, reward, terminated, truncated, info = env.step(action[0])
            ended = terminated or truncated
            success = success or bool(info.get("success"))
            actions.append(action[0])
            rewards.append(reward)
            if keep_frames:
                frames.append(image)
    kept = np.stack(frames) if keep_frames else None
    return Episode(
        np.asarray(rewards, np.float32), np.stack(actions), success if env.succeeds else None, kept
    )


def play_episodes(
    env: PixelEnv, policy: Policy, *, episodes: int, seed: int, first: int = 0, keep_frames: int = 0
) -> list[Episode]:
    """Play `episodes` episodes of the environment's seed, from number `first` on; keep frames of a few."""
    return [
        play(env, policy, episode=first + n, seed=seed, keep_frames=n < keep_frames) for n in range(episodes)
    ]


def summarise(played: Sequence[Episode]) -> dict[str, float]:
    """Share of episodes with success, where the task tells it, and mean return."""
    solved = [episode.success for episode in played if episode.success is not None]
    success = {"success": float(np.mean(solved))} if solved else {}
    return success | {"return": float(np.mean([episode.total for episode in played]))}
