"""Demonstrations."""

from collections.abc import Iterator
from typing import Any


class Demo:
    """A sequence of observations."""

    def __init__(self, observations: list[Any], random_seed: Any = None) -> None:
        self._observations = observations
        self.random_seed = random_seed
        self.num_reset_attempts = 1

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, number: int) -> Any:
        return self._observations[number]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._observations)
