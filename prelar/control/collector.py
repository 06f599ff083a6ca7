"""Experience: a policy acts in environments, and whole episodes go to the replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv

from prelar.control.envs import EpisodeState
from prelar.control.replay import Records, Replay
from prelar.control.rollout import Policy


class Collector:
    """Environments of `make_envs`, the episodes in progress in them, and the acting policy's memory.

    `state_dict` holds all of it: the environments as their episodes' numbers and actions, the images of the
    unfinished episodes as they are, so that nothing is drawn again.
    """

    def __init__(self, envs: SyncVectorEnv, replay: Replay) -> None:
        self.envs, self.replay = envs, replay
        self._running: list[list[Records]] = []
        self._solved = np.zeros(envs.num_envs, np.bool_)
        self._memory: Any = None

    def step(self, policy: Policy) -> dict[str, float]:
        """Take one action in every environment; returns metrics of the episodes that it ended, if any."""
        if not self._running:
            images, _ = self.envs.reset()
            self._running = [[self._record(image)] for image in images]
        images = np.stack([records[-1]["image"] for records in self._running])
        is_first = np.array([len(records) == 1 for records in self._running])
        actions, self._memory = policy.act(self._memory, images, is_first)
        images, rewards, terminated, truncated, info = self.envs.step(actions)
        ended = terminated | truncated
        last = info.get("final_info", info)
        self._solved |= np.where(ended, last["success"], info["success"]).astype(np.bool_)
        finished = []
        for i, records in enumerate(self._running):
            image = info["final_obs"][i] if ended[i] else images[i]
            records.append(self._record(image, actions[i], rewards[i]))
            if ended[i]:
                finished.append((float(self._solved[i]), self._finish(i, images[i])))
        if not finished:
            return {}
        success, total = np.mean(finished, axis=0)
        return {"train/success": float(success), "train/return": float(total)}

    def forget(self) -> None:
        """Drop the policy's memory, as before another kind of policy takes over."""
        self._memory = None

    def _record(self, image: Any, action: Any = 0, reward: float = 0.0) -> Records:
        """One step as a record of the replay."""
        record = np.zeros((), self.replay.records)
        record["image"], record["action"], record["reward"] = image, action, reward
        return record

    def _finish(self, index: int, image: Any) -> float:
        """Hand a finished episode to the replay, start the next with its first image; returns the return."""
        episode = np.stack(self._running[index])
        self.replay.add(episode)
        self._running[index] = [self._record(image)]
        self._solved[index] = False
        return float(episode["reward"].sum(dtype=np.float64))

    def state_dict(self) -> dict[str, Any]:
        """Environments, unfinished episodes and memory, as tensors, numbers and texts."""
        if not self._running:
            return {"running": []}
        states: tuple[EpisodeState, ...] = self.envs.call("state")
        return {
            "running": [torch.from_numpy(np.stack(records).view(np.uint8)) for records in self._running],
            "episodes": [state.episode for state in states],
            "actions": [torch.from_numpy(state.actions) for state in states],
            "solved": torch.from_numpy(self._solved.copy()),
            "memory": self._memory,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, repeating the actions of unfinished episodes without drawing."""
        if not state["running"]:
            return
        self.envs.reset()
        pairs = zip(state["episodes"], state["actions"], strict=True)
        self.envs.call("restore_own", [EpisodeState(episode, actions.numpy()) for episode, actions in pairs])
        self._running = [list(bytes_.numpy().view(self.replay.records)) for bytes_ in state["running"]]
        self._solved = state["solved"].numpy().copy()
        self._memory = state["memory"]
