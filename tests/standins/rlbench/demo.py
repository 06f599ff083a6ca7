"""Demonstrations."""

from typing import Any


class Demo:
    """A sequence of observations."""

    def __init__(
        self, observations: list[Any], random_seed: Any = None, num_reset_attempts: int | None = None
    ) -> None:
        self._observations = observations
        self.random_seed = random_seed
        self.num_reset_attempts = num_reset_attempts

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, i: int) -> Any:
        return self._observations[i]
