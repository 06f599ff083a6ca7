"""The update of everything that learns: what is clipped, and what stays in float32 under mixed precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from prelar.control.actor_critic import ActorCritic
from prelar.control.learner import Learner
from prelar.finetune import make_bonus
from prelar.methods import build_model
from prelar.model.images import first_steps, normalise
from prelar.model.layers import MLP
from prelar.model.losses import image_loss, kl_loss, squared_error
from prelar.model.spec import ModelSpec
from prelar.train.loop import CLIP_NORM, set_up

BATCH, TIME, ACTIONS = 3, 8, 4
SIZES = {"cnn_depth": 2, "hidden": 16, "deter": 16, "stoch": 4, "discrete": 4, "action_dim": 8}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def make(method: str, precision: str = "fp32") -> Learner:
    fabric = set_up(device="cpu", precision=precision, threads=1)
    torch.manual_seed(0)
    model = build_model(
        ModelSpec(stage="finetune", method=method, robot_action_dim=ACTIONS, units=16, layers=2, **SIZES)
    )
    settings = {"horizon": 3, "discount": 0.99, "lam": 0.95, "entropy": 1e-4, "slow_every": 100}
    actor_critic = ActorCritic(model.feature_dim, ACTIONS, units=16, layers=2, **settings)  # type: ignore[arg-type]
    bonus = make_bonus(model, seed=0, device=fabric.device)
    return Learner(
        fabric, model, actor_critic, bonus, lr=1e-3, actor_lr=1e-3, critic_lr=1e-3, freeze_updates=0
    )


def experience() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(256, (BATCH, TIME, 64, 64, 3), dtype=torch.uint8, generator=draw),
        "action": torch.rand(BATCH, TIME, ACTIONS, generator=draw),
        "reward": torch.rand(BATCH, TIME, generator=draw),
        "is_first": first_steps(BATCH, TIME),
    }


def norm(parameters: Iterable[nn.Parameter]) -> float:
    """Of the gradients that an update left."""
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item()


@pytest.mark.parametrize("method", ["dreamerv2", "apv", "prelar"])
def test_each_of_the_published_optimisers_is_clipped_by_itself(method: str) -> None:
    """The frozen part of the model, the rest of it, actor and critic, all beyond the limit at once."""
    learner = make(method)
    model, actor_critic = learner.model, learner.actor_critic
    model.weights = {name: 1e4 * weight for name, weight in model.weights.items()}
    with torch.no_grad():
        model.heads["reward"].out.weight.mul_(1e4)  # type: ignore[union-attr,operator]
    found = learner.update(experience(), 0)
    clipped = [group for group in model.groups().values() if group]
    assert len(clipped) == (1 if method == "dreamerv2" else 2)
    clipped += [list(actor_critic.actor.parameters()), list(actor_critic.critic.parameters())]
    assert [norm(group) for group in clipped] == pytest.approx([CLIP_NORM] * len(clipped), rel=1e-4)
    assert min(found[f"norm/{name}"].item() for name in ("model", "actor", "critic")) > 2 * CLIP_NORM


def test_last_layers_are_in_float32_under_mixed_precision() -> None:
    """Those of reward heads, actor and critic; the layers before them are rounded."""
    learner = make("prelar", "bf16")
    seen: dict[str, set[torch.dtype]] = {"hidden": set(), "last": set()}
    count = 0
    for part in (learner.model.heads, learner.actor_critic):
        for mlp in part.modules():
            if isinstance(mlp, MLP):
                count += 1
                mlp.out.register_forward_hook(lambda _, __, out: seen["last"].add(out.dtype))
                mlp.hidden[0].register_forward_hook(lambda _, __, out: seen["hidden"].add(out.dtype))
    learner.update(experience(), 0)
    assert count == 5, "reward, dual reward, actor, critic, slow critic"
    assert seen == {"hidden": {torch.bfloat16}, "last": {torch.float32}}


def test_losses_are_computed_in_float32_under_mixed_precision() -> None:
    """They equal those of the same outputs in double precision, far closer than bfloat16 tells apart."""
    draw = torch.Generator().manual_seed(1)
    images, predicted = (torch.rand(2, 3, 3, 64, 64, generator=draw).to(torch.bfloat16) for _ in range(2))
    post, prior = (torch.randn(2, 3, 4, 4, generator=draw).to(torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = (image_loss(predicted, images), kl_loss(post, prior)[0], squared_error(predicted, images))
    gap = (predicted.double() - images.double()).square()
    p, q = post.double().log_softmax(-1), prior.double().log_softmax(-1)
    exact = (0.5 * gap.sum((-3, -2, -1)).mean(), (p.exp() * (p - q)).sum((-2, -1)).mean(), 0.5 * gap.mean())
    assert {loss.dtype for loss in found} == {torch.float32}
    assert [loss.item() for loss in found] == pytest.approx([loss.item() for loss in exact], rel=1e-5)
    learner = make("prelar", "bf16")
    batch = experience()
    with learner.fabric.autocast():
        losses, outputs = learner.model.train().finetune_losses(
            normalise(batch["image"]), batch["action"], batch["reward"], batch["is_first"]
        )
        actor, critic, _ = learner.actor_critic.losses(learner.model, learner.model.start(outputs["post"]))
    assert {loss.dtype for loss in (*losses.values(), actor, critic)} == {torch.float32}
