"""Batches read ahead of the steps that take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")
Batch = Mapping[str, Tensor]


class BatchPrefetcher(Generic[Choice]):
    """The batch of each step, `read(choose(step))`, read by a background thread up to `depth` steps ahead.

    What a step reads is chosen in the thread that takes batches, at the latest when step - depth is taken: it
    is a function of the run's steps and not of time, and goes into the state. Only in order do batches come
    early. device: where they go; for a GPU they lie in memory from which it copies by itself.
    """

    def __init__(
        self,
        read: Callable[[Choice], Batch],
        *,
        choose: Callable[[int], Choice],
        device: torch.device,
        depth: int = 1,
    ) -> None:
        self._read, self._choose, self._depth = read, choose, depth
        self._pinned = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[int, tuple[Choice, Future[Batch]]] = {}

    def take(self, step: int) -> Batch:
        """The batch of `step`. An error of `read` is raised here."""
        for stale in [number for number in self._ahead if not step <= number <= step + self._depth]:
            self._ahead.pop(stale)[1].cancel()
        for number in range(step, step + self._depth + 1):
            if number not in self._ahead:
                self._submit(number, self._choose(number))
        return self._ahead.pop(step)[1].result()

    def close(self) -> None:
        """Drop what is not read yet and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """What is chosen for the steps ahead, by step."""
        return {"chosen": {step: choice for step, (choice, _) in self._ahead.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, and read it."""
        for step, choice in state["chosen"].items():
            self._submit(step, choice)

    def _submit(self, step: int, choice: Choice) -> None:
        self._ahead[step] = choice, self._thread.submit(self._fetch, choice)

    def _fetch(self, choice: Choice) -> Batch:
        batch = self._read(choice)
        return {name: part.pin_memory() for name, part in batch.items()} if self._pinned else batch

    def __enter__(self) -> BatchPrefetcher[Choice]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
