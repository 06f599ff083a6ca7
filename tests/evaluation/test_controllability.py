"""How far an action decides what is imagined: the measure, its interval, and the picture of directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prelar.evaluation.controllability import controllability, interval
from prelar.evaluation.probe import swap_directions
from prelar.methods import build_model
from prelar.model.rssm import State
from prelar.model.spec import ModelSpec

SIZES = {"cnn_depth": 2, "hidden": 8, "deter": 8, "stoch": 4, "discrete": 4, "action_dim": 8}
CPU = torch.device("cpu")


class Obedient:
    """A model whose next frame is grey plus its action, and whose actions are those of the frames."""

    def __init__(self, reach: float) -> None:
        self.reach = reach

    def observe(self, images: Tensor, is_first: Tensor, action: Tensor | None, sample: bool) -> object:
        shown = images.mean((2, 3, 4))[..., None] if action is None else action

        class Seen:
            action = shown
            post: State = {"stoch": shown}  # noqa: RUF012

        return Seen()

    def encode(self, images: Tensor) -> tuple[None, tuple[()]]:
        return None, ()

    def imagine_step(self, state: State, action: Tensor, sample: bool) -> State:
        return {"stoch": self.reach * action}

    def feature(self, state: State) -> Tensor:
        return state["stoch"]

    def decode(self, feature: Tensor, context: tuple[()]) -> Tensor:
        return feature[..., None, None].expand(*feature.shape[:-1], 3, 64, 64)


def clips(count: int, length: int = 6) -> np.ndarray:
    """Grey clips that brighten, each at a rate of its own: uint8 (count, length, 64, 64, 3)."""
    shades = 40 * np.arange(length) * (1 + np.arange(count)[:, None]) % 256
    return np.broadcast_to(shades[..., None, None, None], (count, length, 64, 64, 3)).astype(np.uint8)


def test_an_action_that_says_all_is_told_by_much_and_one_that_says_nothing_by_nothing() -> None:
    all_told = controllability(Obedient(1.0), clips(4), observed=2, device=CPU)  # type: ignore[arg-type]
    nothing = controllability(Obedient(0.0), clips(4), observed=2, device=CPU)  # type: ignore[arg-type]
    assert all_told.low > 10 and all_told.pairs == 4 * 4
    assert all_told.changed < 1e-6 < all_told.changed_swapped
    assert nothing.low == nothing.high == 0 and nothing.changed == nothing.changed_swapped > 0


def test_the_gain_is_the_difference_of_two_psnrs() -> None:
    frames = clips(2, length=3)
    found = controllability(Obedient(0.5), frames, observed=2, device=CPU)  # type: ignore[arg-type]
    shown = frames[:, 2].mean((1, 2, 3)) / 255 - 0.5
    own, other = 0.5 * shown - shown, 0.5 * shown[::-1] - shown
    assert np.allclose(found.gain, 10 * np.log10(other**2 / own**2), atol=1e-3)


def test_a_model_is_measured_under_its_own_and_the_robot_s_actions() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 64, 64, 3), dtype=np.uint8)
    video = build_model(ModelSpec(method="prelar", **SIZES))
    assert np.isfinite(controllability(video, frames, observed=2, device=CPU).gain).all()
    robot = build_model(ModelSpec(method="prelar", stage="finetune", units=8, layers=1, **SIZES))
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 5, 4)).astype(np.float32)
    found = controllability(robot, frames, observed=2, device=CPU, actions=actions)
    assert found.gain.shape == (3,) and found.low <= found.gain.mean() <= found.high
    picture = swap_directions(robot, frames, actions, observed=2, device=CPU)
    assert picture.shape == (3 * 66 - 2, 7 * 66 - 2, 3)


def test_one_clip_has_no_other() -> None:
    with pytest.raises(ValueError, match="1 clip has no other"):
        controllability(Obedient(1.0), clips(1), observed=2, device=CPU)  # type: ignore[arg-type]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = [
        low <= 3.0 <= high for low, high in (interval(random.normal(3.0, 2.0, 60)) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99
