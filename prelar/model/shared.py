"""One batch shared by several processes, each of which holds some of its rows.

What is drawn is drawn for the whole batch by every process from the same state of torch's global generator,
and each takes its own rows, so that the draws of row i are the same however the batch is shared. What is
measured over the batch is measured over the whole one. A process that is alone holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, ...]


def world() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own(values: Tensor, dim: int = 0) -> Tensor:
    """This process's rows, along `dim`, of values of the whole batch."""
    if world() == 1:
        return values
    rows = values.shape[dim] // world()
    return values.narrow(dim, dist.get_rank() * rows, rows)


@torch.compiler.disable
def whole(values: Tensor) -> Tensor:
    """The rows of all processes (N, …) -> (world · N, …), with gradients to each process's own."""
    if world() == 1:
        return values
    gathered: Tensor = _Whole.apply(values)
    return gathered


class _Whole(torch.autograd.Function):
    """Every process's rows, in order. Backward, each gets the gradients that all found for its rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return own(total)


def draw(make: Callable[[Shape], Tensor], shape: Shape, dim: int = 0) -> Tensor:
    """Random values of `shape`, whose rows along `dim` are this process's rows of the batch.

    `make` draws values of a shape, independent along `dim`, from torch's global generator.
    """
    everyone = (*shape[:dim], shape[dim] * world(), *shape[dim + 1 :])
    return own(make(everyone), dim)


def dropout(x: Tensor, chance: float) -> Tensor:
    """Zero entries of (N, …) with `chance`, and scale the others so that the mean stays."""
    drawn = draw(lambda shape: torch.rand(shape, device=x.device), tuple(x.shape))
    return x * (drawn >= chance) / (1 - chance)
