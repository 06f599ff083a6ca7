"""The exploration bonus: novelty of short windows of features (APV, section 3.3 and appendix)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TINY = 1e-8


class Bonus:
    """Distance of each window of features to its nearest neighbours among the latest ones.

    features: size F of a feature, projected at random to `size` numbers by a matrix drawn from N(0, 1/size²)
    with `seed`. window: frames in a window. capacity: windows that the queue remembers. neighbours: how many
    count. momentum: of the running magnitude by which distances are divided. weight: factor of the result.
    """

    def __init__(
        self,
        features: int,
        *,
        weight: float,
        seed: int,
        device: torch.device,
        size: int = 128,
        window: int = 5,
        capacity: int = 4096,
        neighbours: int = 16,
        momentum: float = 0.99,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.projection = (torch.randn(features, size, generator=draw) / size).to(device)
        self.queue = torch.zeros(capacity, size, device=device)
        self.magnitude = torch.ones((), device=device)
        self.count = 0
        self.weight, self.window = weight, window
        self.neighbours, self.momentum = neighbours, momentum

    @torch.no_grad()
    def __call__(self, feature: Tensor) -> Tensor:
        """Features (B, T, F) -> bonus (B, T - window + 1) of the windows that start at each step.

        The queue takes the windows before the search, so each finds itself at distance 0. All of it is in
        float32, whatever the precision of training. Raises `ValueError` where the sequences are shorter than
        a window.
        """
        if feature.shape[1] < self.window:
            raise ValueError(f"sequences of {feature.shape[1]} steps: need {self.window} or more")
        with torch.autocast(feature.device.type, enabled=False):
            projected = feature.float() @ self.projection
        windows = projected.unfold(1, self.window, 1).mean(-1)
        flat = windows.flatten(0, 1)
        self._remember(flat)
        distance = nearest(flat, self.queue[: min(self.count, len(self.queue))], self.neighbours)
        self.magnitude.lerp_(distance.mean(), 1 - self.momentum)
        return (self.weight * distance / (self.magnitude + _TINY)).view(windows.shape[:2])

    def _remember(self, windows: Tensor) -> None:
        """Overwrite the oldest entries of the queue by windows (N, size), or by the latest that fit."""
        capacity = len(self.queue)
        latest = windows[-capacity:]
        slots = (self.count + torch.arange(len(latest), device=windows.device)) % capacity
        self.queue[slots] = latest
        self.count += len(latest)

    def state_dict(self) -> dict[str, Any]:
        """Queue, running magnitude and number of windows seen; the projection follows from the seed."""
        return {"queue": self.queue, "magnitude": self.magnitude, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.queue.copy_(state["queue"])
        self.magnitude.copy_(state["magnitude"])
        self.count = int(state["count"])


def nearest(points: Tensor, others: Tensor, neighbours: int) -> Tensor:
    """Mean Euclidean distance of points (N, D) to their nearest ones among others (M, D): (N,).

    Differences are taken before they are squared, so that a point is at distance exactly 0 from itself.
    """
    distance = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(min(neighbours, len(others)), largest=False).values.mean(-1)
