"""The agent as a policy: what it does where its weights have come to nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prelar.config import Finetune
from prelar.control.actor_critic import Actor
from prelar.control.agent import Agent
from prelar.utils.errors import UserError
from tests.control.toy import ACTIONS
from tests.control.toy_run import SIZES, TINY, build


def make() -> Agent:
    torch.manual_seed(0)
    model = build("dreamerv2", Finetune(**TINY), SIZES, 0.0)
    actor = Actor(model.feature_dim, ACTIONS, units=4, layers=1)
    return Agent(model, actor, device=torch.device("cpu"), choose="sample")


def test_memory_goes_on_within_an_episode_and_is_forgotten_at_the_start_of_one() -> None:
    agent, image = make(), np.full((1, 64, 64, 3), 200, np.uint8)

    def deter(memory: object, first: bool) -> torch.Tensor:
        torch.manual_seed(1)
        return agent.act(memory, image, np.array([first]))[1]["state"]["deter"]  # type: ignore[arg-type]

    _, memory = agent.act(None, image, np.array([True]))
    assert torch.equal(deter(memory, True), deter(None, True))
    assert not torch.equal(deter(memory, False), deter(None, True))


def test_an_action_that_is_not_finite_is_told_in_one_line() -> None:
    agent = make()
    torch.nn.init.constant_(agent.actor.mlp.out.bias, math.nan)
    with pytest.raises(UserError, match="not finite; lower the learning rates"):
        agent.act(None, np.zeros((2, 64, 64, 3), np.uint8), np.ones(2, np.bool_))
