"""Experience: a policy acts in environments, and whole episodes go to the replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prelar.control.replay import Records, Replay
from prelar.control.rollout import Policy
from prelar.envs.pixels import Answer, Envs, EpisodeState


class Collector:
    """Environments, the episodes in progress in them, and the acting policy's memory.

    The answer to an action is taken in before the next one is chosen, or earlier by `settle`: when that is
    done decides from which update on a finished episode is learnt from, and must not depend on time.

    `state_dict` holds all of it: the environments as their episodes' numbers and actions, the images of the
    unfinished episodes as they are, so that nothing is drawn again.
    """

    def __init__(self, envs: Envs, replay: Replay) -> None:
        self.envs, self.replay = envs, replay
        self._running: list[list[Records]] = []
        self._solved = np.zeros(envs.count, np.bool_)
        self._memory: Any = None
        self._actions: Any = None
        self._answer: Answer | None = None

    def step(self, policy: Policy) -> dict[str, float]:
        """Take one action in every environment; returns metrics of the episodes that ended before, if any."""
        metrics = self.settle()
        if not self._running:
            self._running = [[self._record(image)] for image in self.envs.reset()]
        images = np.stack([records[-1]["image"] for records in self._running])
        is_first = np.array([len(records) == 1 for records in self._running])
        self._actions, self._memory = policy.act(self._memory, images, is_first)
        self.envs.send(self._actions)
        return metrics

    def settle(self) -> dict[str, float]:
        """Take in the answer to the last action; returns metrics of the episodes that it ended, if any."""
        if self._actions is None:
            return {}
        self._await()
        answer, actions = self._answer, self._actions
        assert answer is not None
        self._answer = self._actions = None
        self._solved |= answer.success
        finished = []
        for i, records in enumerate(self._running):
            records.append(self._record(answer.results[i], actions[i], answer.rewards[i]))
            if answer.ended[i]:
                finished.append((float(self._solved[i]), self._finish(i, answer.images[i])))
        if not finished:
            return {}
        success, total = np.mean(finished, axis=0)
        told = {"train/success": float(success)} if self.envs.succeeds else {}
        return told | {"train/return": float(total)}

    def forget(self) -> None:
        """Drop the policy's memory, as before another kind of policy takes over."""
        self._memory = None

    def _await(self) -> None:
        """Have the answer to the last action at hand, without taking it in."""
        if self._actions is not None and self._answer is None:
            self._answer = self.envs.receive()

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
        """Environments, unfinished episodes, memory and the answer to come, as tensors, numbers and texts."""
        if not self._running:
            return {"running": []}
        self._await()
        states = self.envs.states()
        answer = [] if self._answer is None else [torch.from_numpy(np.array(x)) for x in self._answer]
        return {
            "running": [torch.from_numpy(np.stack(records).view(np.uint8)) for records in self._running],
            "episodes": [state.episode for state in states],
            "actions": [torch.from_numpy(state.actions) for state in states],
            "solved": torch.from_numpy(self._solved.copy()),
            "memory": self._memory,
            "answer": answer,
            "answered": None if self._actions is None else torch.from_numpy(np.array(self._actions)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, repeating the actions of unfinished episodes without drawing."""
        if not state["running"]:
            return
        self.envs.reset()
        pairs = zip(state["episodes"], state["actions"], strict=True)
        self.envs.restore([EpisodeState(episode, actions.numpy()) for episode, actions in pairs])
        self._running = [list(bytes_.numpy().view(self.replay.records)) for bytes_ in state["running"]]
        self._solved = state["solved"].numpy().copy()
        self._memory = state["memory"]
        self._answer = Answer(*(x.numpy() for x in state["answer"])) if state["answer"] else None
        self._actions = None if state["answered"] is None else state["answered"].numpy()
