"""One step of imagination with all that a person sees of it, for torch and as an ONNX graph.

The step draws nothing itself: the noise of its categoricals is an input, and follows from a seed and the
step's number. So a rollout is replayed by its start, its seed and its actions, in Python as in a browser.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prelar.control.agent import Agent, load_agent
from prelar.methods import build_model, restore
from prelar.model.images import denormalise, normalise
from prelar.model.layers import MLP, load_weights
from prelar.model.losses import straight_through
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.train.checkpoint import load_config, load_parts
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE

Floats = npt.NDArray[np.float32]

STAGES = ("pretrain", "finetune")
JUDGED = ("reward", "value", "policy")


class Step(nn.Module):
    """A trained model as a function from a state to the next one and its picture.

    `described` is what the checkpoint says of itself. `agent` and `critic` are those of fine-tuning, None of
    a pre-trained model, whose step ends with the picture.
    """

    def __init__(
        self,
        model: WorldModel,
        described: dict[str, Any],
        agent: Agent | None = None,
        critic: MLP | None = None,
    ) -> None:
        super().__init__()
        self.model, self.critic = model, critic
        self.actor, self.agent = (agent.actor if agent else None), agent
        self.spec, self.described = model.spec, described

    @property
    def action_dim(self) -> int:
        """Numbers of an action: the robot's after fine-tuning, else a latent one's."""
        return int(self.spec.robot_action_dim if self.actor else self.model.action.action_dim)

    def forward(
        self, stoch: Tensor, deter: Tensor, action: Tensor, noise: Tensor, *context: Tensor
    ) -> tuple[Tensor, ...]:
        """One-hots (1, S, K), deter (1, D), action (1, A), Gumbel noise (1, S, K) and the context's maps.

        Returns the next one-hots and deter, the picture uint8 (1, 64, 64, 3) and, after fine-tuning,
        `judge` of them. Without noise, zeros, the most likely state comes next.
        """
        before = {"logit": noise, "stoch": stoch, "deter": deter}
        prior = self.model.imagine_step(before, action, sample=False)
        stoch, deter = straight_through(prior["logit"], noise), prior["deter"]
        feature = self.model.feature({"stoch": stoch, "deter": deter})
        frame = denormalise(self.model.decode(feature[:, None], context)[:, 0])
        return stoch, deter, frame, *self.judge(feature)

    def judge(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Features (…, F) -> plain reward (…), value (…), the policy's action (…, A); () of pre-training."""
        if self.agent is None or self.critic is None:
            return ()
        policy = self.agent.actor(feature)
        action = policy.mean() if self.agent.choose == "mean" else policy.mode()
        return self.model.predict_plain_reward(feature), self.critic(feature).squeeze(-1).float(), action


class Look(nn.Module):
    """The state that a trained model takes a picture for, which nothing came before."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        """A picture uint8 (1, 64, 64, 3).

        Returns the most likely one-hots (1, S, K), deter (1, D), after fine-tuning `Step.judge` of them, and
        the context's maps, if the model has a context.
        """
        images, model = normalise(frame)[:, None], self.step.model
        embed, context = model.encode(images)
        action = frame.new_zeros(1, self.step.action_dim, dtype=torch.float32)
        before = model.dynamics.initial(1, frame.device)
        first = torch.ones(1, dtype=torch.bool)
        post = model.dynamics.obs_step(before, model.action.step(action), embed[:, 0], first, False)
        return post["stoch"], post["deter"], *self.step.judge(model.feature(post)), *context


def load_step(folder: Path) -> Step:
    """The step of a checkpoint of pre-training or fine-tuning, on the CPU and without gradients.

    Raises `UserError` where the folder holds no model that imagines.
    """
    described = load_config(folder)
    stage = described.get("stage")
    if stage not in STAGES or "model" not in described or "dynamics" not in described["parts"]:
        raise UserError(f"{folder}: holds no world model; give the folder that a stage has written")
    if stage == "pretrain":
        parts, _ = load_parts(folder)
        spec = ModelSpec.read(described["model"], stage=stage, source=str(folder))
        model = restore(lambda: build_model(spec), lambda made: made.load_state(parts))
        return Step(model, described).eval().requires_grad_(False)
    agent, _ = load_agent(folder, device=torch.device("cpu"))
    weights = load_parts(folder, ["critic"])[0]["critic"]
    spec, source = agent.model.spec, f"{folder}/critic.safetensors"
    critic = restore(
        lambda: MLP(spec.feature_dim, 1, units=spec.units, layers=spec.layers),
        lambda made: load_weights(made, weights, source),
    )
    return Step(agent.model, described, agent, critic).eval().requires_grad_(False)


def export(step: Step, context: Sequence[Tensor] = ()) -> bytes:
    """The step as an ONNX graph: inputs `stoch`, `deter`, `action`, `noise`, `context0`, …; outputs
    `next_stoch`, `next_deter`, `frame` and, after fine-tuning, `reward`, `value`, `policy`.

    `context` are maps of the shapes to come.
    """
    spec = step.spec
    latent = torch.zeros(1, spec.stoch, spec.discrete)
    inputs = latent, torch.zeros(1, spec.deter), torch.zeros(1, step.action_dim), latent.clone(), *context
    names = ["stoch", "deter", "action", "noise", *_contexts(context)]
    return _graph(step, inputs, names, ["next_stoch", "next_deter", "frame", *_judged(step)])


def export_look(step: Step, context: Sequence[Tensor] = ()) -> bytes:
    """`Look` as an ONNX graph: input `frame`; outputs `stoch`, `deter`, after fine-tuning `reward`, `value`,
    `policy`, and `context0`, …, as many as `context` has."""
    frame = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
    return _graph(Look(step), (frame,), ["frame"], ["stoch", "deter", *_judged(step), *_contexts(context)])


def _judged(step: Step) -> Sequence[str]:
    return JUDGED if step.actor else ()


def _contexts(context: Sequence[Tensor]) -> list[str]:
    return [f"context{i}" for i in range(len(context))]


def _graph(
    module: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """A module as an ONNX graph with its weights; the same one gives the same bytes, without path or time."""
    with _quiet():
        program = torch.onnx.export(
            module,
            inputs,
            input_names=names,
            output_names=outputs,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for place in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del place.metadata_props[:]
        place.doc_string = ""
    found: bytes = model.SerializeToString(deterministic=True)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it does without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def gumbel_noise(seed: int, number: int, shape: tuple[int, ...]) -> Floats:
    """Gumbel noise of step `number` of a rollout with `seed`, each below 2^32.

    Integers of a counter, mixed; templates/core.js draws the same ones.
    """
    counter = np.arange(int(np.prod(shape)), dtype=np.uint64) * 0x9E3779B1
    mixed = _mix(counter + _mix(np.array(seed, np.uint64)) + 0x85EBCA6B * _mix(np.array(number, np.uint64)))
    uniform = (mixed + 0.5) / 2**32
    return (-np.log(-np.log(uniform))).astype(np.float32).reshape(shape)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of integers, of which the last 32 bits count, to 32 bits."""
    x = x & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))
