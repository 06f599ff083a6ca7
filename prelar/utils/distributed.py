"""The processes of a run that share every batch: started by `devices` of params.yaml, or by torchrun.

All take the same steps. The first one alone writes: logs, videos, snapshots and outputs.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor

from prelar.utils.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
LOOPBACK = "127.0.0.1"
INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def launch(*, accelerator: str, precision: str, devices: int | None) -> Fabric:
    """Start, or join, the processes of a run of `devices` processes, a device each.

    Those that are started here meet and talk on this machine's loopback interface. Those that torchrun
    started count instead of `devices`. None stands for a stage of one process. Raises `UserError` where a
    device lacks, and where torchrun starts several processes of a stage of one.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    count, nodes = devices or 1, 1
    place: ClusterEnvironment = LightningEnvironment()  # whatever scheduler started this process
    if dist.is_available() and dist.is_torchelastic_launched():
        place = TorchElasticEnvironment()
        count = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // count
        if devices is None and count * nodes > 1:
            raise UserError("torchrun: this stage runs in one process; start it without torchrun")
    if accelerator == "cuda" and count > torch.cuda.device_count():
        raise UserError(
            f"devices = {count}: this machine has {torch.cuda.device_count()}; lower devices to that"
        )
    shared = DDPStrategy(process_group_backend=BACKENDS[accelerator], forward_sync_buffers=False)
    fabric = Fabric(
        accelerator=accelerator,
        devices=count,
        num_nodes=nodes,
        strategy="auto" if count * nodes == 1 else shared,
        precision=precision,  # type: ignore[arg-type]
        plugins=[place],
    )
    server = _server() if count > 1 and "LOCAL_RANK" not in os.environ else None
    fabric.launch()
    del server  # torch has its own hold on it by now
    if fabric.world_size > 1:
        atexit.register(dist.destroy_process_group)  # while its threads can still be ended in order
    return fabric


def _server() -> dist.TCPStore:
    """The server at which processes of this machine meet, which torch by itself opens on all interfaces."""
    for name, interface in INTERFACE.items():
        os.environ.setdefault(name, interface)
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
    return dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


class Processes:
    """What the processes of a run tell each other. Every call is made by all of them."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        self.fabric = fabric
        self.alone = fabric is None or fabric.world_size == 1
        self.first = fabric is None or fabric.is_global_zero

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; no device is waited for."""
        if self.alone:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means over the processes of 0-d tensors by name, on their device; fp32, in memory of their own.

        A replayed CUDA graph writes over what it returned before.
        """
        means: Any = torch.stack([value.detach().float() for value in values.values()])
        if self.fabric is not None and not self.alone:
            means = self.fabric.all_reduce(means, reduce_op="mean")
        return dict(zip(values, means.unbind(), strict=True))


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the run is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


Shape = tuple[int, ...]


def world() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rows(values: Tensor, dim: int = 0) -> Tensor:
    """This process's rows, along `dim`, of values of the whole batch."""
    if world() == 1:
        return values
    rows = values.shape[dim] // world()
    return values.narrow(dim, dist.get_rank() * rows, rows)


@torch.compiler.disable
def all_gather_rows(values: Tensor) -> Tensor:
    """The rows of all processes (N, …) -> (world · N, …), with gradients to each process's own."""
    if world() == 1:
        return values
    gathered: Tensor = _GatheredRows.apply(values)
    return gathered


class _GatheredRows(torch.autograd.Function):
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
        return local_rows(total)


def sample_global(make: Callable[[Shape], Tensor], shape: Shape, dim: int = 0) -> Tensor:
    """Random values of `shape`, whose rows along `dim` are this process's rows of the batch.

    `make` draws values of a shape, independent along `dim`, from torch's global generator.
    """
    everyone = (*shape[:dim], shape[dim] * world(), *shape[dim + 1 :])
    return local_rows(make(everyone), dim)


def dropout(x: Tensor, chance: float) -> Tensor:
    """Zero entries of (N, …) with `chance`, and scale the others so that the mean stays."""
    drawn = sample_global(lambda shape: torch.rand(shape, device=x.device), tuple(x.shape))
    return x * (drawn >= chance) / (1 - chance)
