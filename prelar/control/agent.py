"""The agent as a policy over images: the world model filters, the actor chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prelar.config import View, misfits
from prelar.control.actor_critic import Actor
from prelar.envs.pixels import Actions, Image
from prelar.methods import build_model, restore
from prelar.model.images import normalise
from prelar.model.layers import load_weights
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.train.checkpoint import load_parts
from prelar.utils.errors import UserError, remake, shown

State = dict[str, Tensor]


class Memory(TypedDict):
    """What the agent carries from step to step: the filter's state (N, …) and its last action (N, A)."""

    state: State
    action: Tensor


class Agent:
    """World model and actor as a `rollout.Policy`.

    choose: what of the policy's distribution is done: a sample, which explores, its mode or its mean. Latents
    are drawn in any case, from torch's global generator.
    """

    def __init__(
        self,
        model: WorldModel,
        actor: Actor,
        *,
        device: torch.device,
        choose: Literal["sample", "mode", "mean"],
    ) -> None:
        self.model, self.actor = model, actor
        self.device, self.choose = device, choose

    @torch.no_grad()
    def act(
        self, memory: Memory | None, images: Image, is_first: npt.NDArray[np.bool_]
    ) -> tuple[Actions, Memory]:
        """Actions (N, A) for images uint8 (N, 64, 64, 3); see `rollout.Policy`.

        Raises `UserError` where one is not finite, which a GPU's log may tell only later.
        """
        seen = normalise(torch.from_numpy(images).to(self.device))
        starts = torch.from_numpy(is_first).to(self.device)
        state, action = self._recall(memory, len(images))
        state = self.model.act_state(state, seen, action, starts)
        policy = self.actor(self.model.feature(state))
        action = getattr(policy, self.choose)()
        chosen: Actions = action.cpu().numpy()
        if not np.isfinite(chosen).all():
            raise UserError("agent: its action is not finite; lower the learning rates")
        return chosen, Memory(state=state, action=action)

    def _recall(self, memory: Memory | None, count: int) -> tuple[State | None, Tensor]:
        """State and last action on the agent's device; None and zeros where there is no memory."""
        if memory is None:
            return None, torch.zeros(count, self.actor.actions, device=self.device)
        state = {name: value.to(self.device) for name, value in memory["state"].items()}
        return state, memory["action"].to(self.device)


def load_agent(folder: Path, *, device: torch.device) -> tuple[Agent, dict[str, Any]]:
    """The agent of a fine-tuning checkpoint, acting as in its evaluations, and the checkpoint's config.

    Raises `UserError` where the folder is no such checkpoint.
    """
    parts, config = load_parts(folder)
    if "model" not in config or "actor" not in parts:
        raise UserError(f"{folder}: no checkpoint of an agent; {remake(folder)}")
    view = config.get("view", {})
    if not isinstance(view, dict) or not view.keys() <= set(View._fields):
        raise UserError(f"{folder}/config.json: view = {shown(view)}: needs {', '.join(View._fields)}")
    acts = {"task": config.get("task"), "action_repeat": config.get("action_repeat", 1)}
    if problem := misfits(acts | view):
        raise UserError(f"{folder}/config.json: {problem}; {remake(folder)}")
    spec = ModelSpec.read(config["model"], stage="finetune", source=str(folder))
    model = restore(lambda: build_model(spec), lambda made: made.load_state(parts))
    source = f"{folder}/actor.safetensors"
    actor = restore(
        lambda: Actor(model.feature_dim, spec.robot_action_dim, units=spec.units, layers=spec.layers),
        lambda made: load_weights(made, parts["actor"], source),
    )
    choose = config.get("eval_action", "mode")
    if choose not in ("sample", "mode", "mean"):
        raise UserError(f"{folder}/config.json: eval_action = {shown(choose)}: choose sample, mode or mean")
    return Agent(model.to(device).eval(), actor.to(device), device=device, choose=choose), config
