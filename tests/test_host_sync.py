"""No step waits for the device: none reads a tensor's value on the host, lets it decide a shape, or copies a
number over.

On a GPU such an operation stops the host until everything launched before has ended. Here those that do so
are refused wherever the tensors lie.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prelar.control.actor_critic import ActorCritic
from prelar.control.learner import Learner
from prelar.finetune import make_bonus
from prelar.methods import METHODS, build_model
from prelar.model.images import first_steps, normalise
from prelar.model.spec import ModelSpec
from prelar.train.loop import adam, descend, set_up
from prelar.utils.distributed import Processes

BATCH, TIME = 2, 8
SIZES = {"cnn_depth": 2, "hidden": 6, "deter": 5, "stoch": 3, "discrete": 4, "action_dim": 8}
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class NoNumbers(TorchFunctionMode):
    """Refuses tensors made of numbers on the host: from there to a device they are copied while it waits."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function in (torch.tensor, torch.as_tensor) and not isinstance(arguments[0], Tensor):
            raise AssertionError(f"{function.__name__} of numbers waits for the device")
        return function(*arguments, **(named or {}))


class NoReads(TorchDispatchMode):
    """Refuses what waits for a device: reads of values, and shapes that depend on them."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in arguments[1]
        )
        if name in READS or by_mask:
            raise AssertionError(f"{name} waits for the device")
        return function(*arguments, **(named or {}))


def frames() -> Tensor:
    return torch.randint(256, (BATCH, TIME, 64, 64, 3), dtype=torch.uint8)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.pretrains])
def test_a_step_of_pretraining_reads_nothing(method: str) -> None:
    fabric = set_up(device="cpu", precision="fp32", threads=1)
    model = build_model(ModelSpec(method=method, **SIZES)).train()
    optimizer = adam(model.parameters(), 1e-3)
    module, wrapped = fabric.setup(model, optimizer)
    module.mark_forward_method("pretrain_losses")
    images, is_first = frames(), first_steps(BATCH, TIME)
    with NoReads(), NoNumbers():
        for _ in range(2):
            with fabric.autocast():
                losses, outputs = module.pretrain_losses(normalise(images), is_first)
            norm = descend(fabric, wrapped, model.total(losses))
            Processes(fabric).mean(losses | outputs["metrics"] | {"norm": norm})


def learner(method: str) -> Learner:
    """What updates a small model of a method."""
    fabric = set_up(device="cpu", precision="fp32", threads=1)
    augment = "erase" if method == "contextwm" else "none"
    model = build_model(
        ModelSpec(
            stage="finetune",
            method=method,
            robot_action_dim=4,
            units=6,
            layers=2,
            context_augment=augment,
            **SIZES,
        )
    )
    actor_critic = ActorCritic(
        model.feature_dim,
        4,
        units=6,
        layers=2,
        horizon=3,
        discount=0.99,
        lam=0.95,
        entropy=1e-4,
        slow_every=2,
    )
    bonus = make_bonus(model, seed=0, device=fabric.device)
    return Learner(
        fabric, model, actor_critic, bonus, lr=1e-3, actor_lr=1e-3, critic_lr=1e-3, freeze_updates=1
    )


def experience() -> dict[str, Tensor]:
    """A batch of a robot's experience."""
    return {
        "image": frames(),
        "action": torch.zeros(BATCH, TIME, 4),
        "reward": torch.zeros(BATCH, TIME),
        "is_first": first_steps(BATCH, TIME),
    }


@pytest.mark.parametrize("method", METHODS)
def test_an_update_of_finetuning_reads_nothing(method: str) -> None:
    learning, batch = learner(method), experience()
    with NoReads(), NoNumbers():
        for number in range(2):
            learning.update(batch, number)


@pytest.mark.parametrize(
    "method", ["prelar", *(pytest.param(name, marks=pytest.mark.long) for name in ("dreamerv2", "apv"))]
)
def test_updates_compile_at_first_alone_and_each_part_to_one_graph(method: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    learning, batch = learner(method), experience()
    learning.model.compile_training(backend="eager", dynamic=False)
    compiled = []
    for number in range(3):
        learning.update(batch, number)
        compiled.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert not counters["graph_break"]
    assert compiled[0] > 0 and compiled[1:] == [compiled[0]] * 2


def test_what_waits_is_noticed() -> None:
    values = torch.rand(3)
    for wait in (
        lambda: values.sum().item(),
        lambda: values[values > 0.5],
        lambda: bool(values[0]),
        lambda: torch.as_tensor(0.5, device=values.device),
        lambda: torch.tensor([0, 1]),
    ):
        with NoReads(), NoNumbers(), pytest.raises(AssertionError, match="waits for the device"):
            wait()
