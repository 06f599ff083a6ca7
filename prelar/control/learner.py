"""One update of everything that learns from experience: world model, exploration bonus, actor and critic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from lightning_fabric import Fabric
from torch import Tensor, nn

from prelar.control.actor_critic import ActorCritic
from prelar.control.exploration import Bonus
from prelar.model.images import normalise
from prelar.model.world_model import WorldModel
from prelar.train.loop import Stateful, adam, descend


@contextlib.contextmanager
def without_parameter_gradients(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through a module without computing those of its parameters."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class Learner:
    """Model, actor, critic and bonus with their optimisers.

    lr, actor_lr, critic_lr: learning rates. freeze_updates: updates during which the model's frozen group has
    rate 0. actor_after: updates before actor and critic learn too.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: WorldModel,
        actor_critic: ActorCritic,
        bonus: Bonus | None,
        *,
        lr: float,
        actor_lr: float,
        critic_lr: float,
        freeze_updates: int,
        actor_after: int = 0,
    ) -> None:
        self.fabric, self.model, self.actor_critic, self.bonus = fabric, model, actor_critic, bonus
        self.lr, self.freeze_updates, self.actor_after = lr, freeze_updates, actor_after
        groups = model.groups()
        self._groups = [{"params": groups[name], "name": name} for name in ("frozen", "rest") if groups[name]]
        self._wrapped_model, self._model_optimizer = fabric.setup(model, adam(self._groups, lr))
        self._wrapped_actor_critic, self._actor_optimizer, self._critic_optimizer = fabric.setup(
            actor_critic,
            adam(actor_critic.actor.parameters(), actor_lr),
            adam(actor_critic.critic.parameters(), critic_lr),
        )
        self._wrapped_model.mark_forward_method("finetune_losses")
        self._wrapped_actor_critic.mark_forward_method("losses")

    def update(self, batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Do update `number` (from 0) on a batch of `Replay.read`; returns scalars by name."""
        data = {name: value.to(self.fabric.device, non_blocking=True) for name, value in batch.items()}
        post, metrics = self._update_model(data, number)
        return metrics if number < self.actor_after else metrics | self._update_actor_critic(post, number)

    def _update_model(
        self, data: Mapping[str, Tensor], number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fit the world model and its heads; returns the posterior states (B, T, …) and metrics."""
        for group in self._model_optimizer.param_groups:
            group["lr"] = 0.0 if group["name"] == "frozen" and number < self.freeze_updates else self.lr
        self._wrapped_model.train()
        images = normalise(data["image"])
        with self.fabric.autocast():
            losses, outputs = self._wrapped_model.finetune_losses(
                images, data["action"], data["reward"], data["is_first"], bonus=self.bonus
            )
        norm = descend(self.fabric, self._model_optimizer, self.model.total(losses))
        metrics = {f"loss/{name}": value.detach() for name, value in losses.items()}
        metrics |= {f"model/{name}": value for name, value in outputs["metrics"].items()}
        if "bonus" in outputs:
            metrics["bonus/mean"] = outputs["bonus"].mean()
        return outputs["post"], metrics | {"norm/model": norm}

    def _update_actor_critic(self, post: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """Improve the policy in imagination from every posterior state of the batch; returns metrics."""
        with without_parameter_gradients(self.model):
            start = self.model.start(post)
            with self.fabric.autocast():
                actor_loss, critic_loss, found = self._wrapped_actor_critic.losses(self.model, start)
            actor_norm = descend(self.fabric, self._actor_optimizer, actor_loss)
        critic_norm = descend(self.fabric, self._critic_optimizer, critic_loss)
        self.actor_critic.refresh(number)
        losses = {"loss/actor": actor_loss.detach(), "loss/critic": critic_loss.detach()}
        metrics = {f"behaviour/{name}": value for name, value in found.items()}
        return losses | metrics | {"norm/actor": actor_norm, "norm/critic": critic_norm}

    def stateful(self) -> dict[str, Stateful]:
        """Everything that updates change, by name, for the loop's snapshots."""
        parts: dict[str, Stateful] = {
            "model": self.model,
            "actor_critic": self.actor_critic,
            "model_optimizer": self._model_optimizer,
            "actor_optimizer": self._actor_optimizer,
            "critic_optimizer": self._critic_optimizer,
        }
        return parts if self.bonus is None else parts | {"bonus": self.bonus}
