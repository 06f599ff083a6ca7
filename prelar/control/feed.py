"""Batches from the replay, read while the update before them runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from prelar.control.replay import Replay

Batch = dict[str, Tensor]


class Feed:
    """The batch of each update, read one update ahead by a thread of its own.

    Which sequences a batch holds is settled when the batch before it is taken, so that it is a function of
    the run's steps and not of time, and goes into the state; only reading them is left to the thread. pinned:
    whether batches lie in memory from which a GPU copies by itself.
    """

    def __init__(self, replay: Replay, *, batch: int, length: int, seed: int, pinned: bool) -> None:
        self.replay, self.batch, self.length, self.seed = replay, batch, length, seed
        self._pinned = pinned
        self._starts: list[int] = []
        self._pending: Future[Batch] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed")

    def take(self, update: int) -> Batch:
        """The batch of update `update`: image, action, reward and is_first of `Replay.read`, as tensors."""
        if self._pending is None:
            self._request(self._choose(update))
        assert self._pending is not None
        ready = self._pending.result()
        self._request(self._choose(update + 1))
        return ready

    def close(self) -> None:
        """Wait for the reading under way, and drop what it read."""
        self._reader.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is read."""
        return {"starts": list(self._starts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the replay's file holds the steps."""
        if state["starts"]:
            self._request(list(state["starts"]))

    def _choose(self, update: int) -> list[int]:
        return self.replay.choose(batch=self.batch, length=self.length, seed=self.seed, update=update)

    def _request(self, starts: list[int]) -> None:
        self._starts = starts
        self._pending = self._reader.submit(self._read, starts)

    def _read(self, starts: list[int]) -> Batch:
        found = {
            name: torch.from_numpy(value) for name, value in self.replay.read(starts, self.length).items()
        }
        return {name: value.pin_memory() for name, value in found.items()} if self._pinned else found
