"""Distractions change pictures alone, follow from seed, episode and step, and grow with their strength."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prelar.config import View
from prelar.envs import make_env
from prelar.envs.pixels import PixelEnv
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from tests.fake_results import moving

KINDS = ("camera", "colour", "background")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("store") / "clips.zarr"
    with StoreWriter(path) as writer:
        for number in range(3):
            frames = np.roll(moving(9), 11 * number, axis=2)
            writer.append(frames, {"id": str(number), "split": "train", "label": "x", "fps": 12.0})
        writer.finish({"source": "test"})
    return str(path)


def episode(env: PixelEnv, number: int, count: int = 3) -> tuple[np.ndarray, list[float]]:
    """Pictures and rewards of an episode of one action."""
    frames, rewards = [env.reset(options={"episode": number})[0]], []
    for _ in range(count):
        image, reward, *_ = env.step(np.full(env.action_space.shape or (), 0.3, np.float32))
        frames.append(image)
        rewards.append(reward)
    return np.stack(frames).astype(int), rewards


@pytest.mark.parametrize("task", [pytest.param("reach", marks=pytest.mark.long), "dmc/cartpole-swingup"])
def test_only_pictures_change_and_they_repeat(task: str, clips: str) -> None:
    def made(kind: str, strength: float) -> PixelEnv:
        view = View(distract=kind, distract_strength=strength, distract_store=clips)
        return PixelEnv(make_env(task, view=view), seed=3)

    with make_env(task) as simulator:
        plain, rewards = episode(PixelEnv(simulator, seed=3), 1)
    for kind in KINDS:
        weak, env = made(kind, 0.2), made(kind, 0.8)
        other = episode(env, 2, 1)[0]
        frames, earned = episode(env, 1)
        assert earned == rewards and np.array_equal(frames, episode(env, 1)[0])
        assert not np.array_equal(other[0] - plain[0], frames[0] - plain[0]), "each episode has its own"
        faint = np.abs(episode(weak, 1)[0] - plain).mean()
        assert 0.5 < np.abs(frames - plain).mean() > faint > 0, kind
        env.reset(options={"episode": 5})
        again = made(kind, 0.8)
        again.restore(env.state())
        assert np.array_equal(again.render(), env.render()), "after its state was restored"
        for one in (weak, env, again):
            one.close()


def test_a_background_leaves_what_happens_in_front(clips: str) -> None:
    """Of the cart and pole, which cover a part of the picture, nothing changes."""
    view = View(distract="background", distract_strength=1.0, distract_store=clips)
    plain, _ = episode(PixelEnv(make_env("dmc/cartpole-swingup"), seed=0), 0, 1)
    frames, _ = episode(PixelEnv(make_env("dmc/cartpole-swingup", view=view), seed=0), 0, 1)
    same = (plain == frames).all(-1).mean()
    assert 0.01 < same < 0.5


def test_a_background_without_clips_says_so(tmp_path: Path) -> None:
    view = View(distract="background", distract_store=str(tmp_path / "none.zarr"))
    with pytest.raises(UserError, match=r"none\.zarr"):
        make_env("reach", view=view)
