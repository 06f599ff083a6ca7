"""A checkpoint as an environment: seeded, one rollout like many, its rewards and starts the model's own."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import prelar
from prelar.dream import DreamEnv, DreamVectorEnv
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from tests.conftest import ROOT
from tests.fake_results import moving
from tests.test_api import save_finetuned, save_pretrained

FRAMES = np.stack([moving(9), moving(9)[::-1]])
ACTIONS = np.linspace(-1, 1, 2 * 8 * 4, dtype=np.float32).reshape(2, 8, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, prelar.api.Loaded]:
    folder = tmp_path_factory.mktemp("models")
    save_finetuned(folder / "robot", "prelar")
    save_finetuned(folder / "stacked", "contextwm")
    save_pretrained(folder / "latent", frame_gap=0.1)
    save_pretrained(folder / "classes", action_kind="discrete")
    return {path.name: prelar.load(path) for path in folder.iterdir()}


def make(model: Any, **options: Any) -> DreamEnv:
    given = (FRAMES, ACTIONS) if model.stage == "finetune" else FRAMES
    return DreamEnv(model, given, **options)


def played(env: DreamEnv, seed: int, steps: int = 4) -> list[Any]:
    env.action_space.seed(0)
    found = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observation, reward, *_ = env.step(env.action_space.sample())
        found += [observation, reward]
    return found


@pytest.mark.parametrize("observation", ["frames", "features"])
@pytest.mark.parametrize("name", ["robot", "stacked", "latent", "classes"])
def test_gymnasium_finds_nothing_wrong(models: dict[str, Any], name: str, observation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", ".*symmetric and normalized"
        )  # latent actions are as they are inferred
        check_env(make(models[name], observation=observation), skip_render_check=True)


@pytest.mark.parametrize("name", ["robot", "classes"])
def test_a_rollout_is_a_function_of_its_seed(models: dict[str, Any], name: str) -> None:
    env = make(models[name], observation="features")
    torch.manual_seed(1)
    first = played(env, 3)
    torch.manual_seed(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, played(env, 3), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, played(env, 4), strict=True))


@pytest.mark.parametrize("name", ["robot", "latent"])
def test_rollouts_of_a_batch_are_those_of_their_seeds(models: dict[str, Any], name: str) -> None:
    single = make(models[name], observation="features", horizon=3)
    many = DreamVectorEnv(models[name], (FRAMES, ACTIONS), num_envs=3, observation="features", horizon=3)
    with pytest.raises(ValueError, match="seed: 2 of them; give one, or 3"):
        many.reset(seed=[7, 8])
    assert np.array_equal(many.reset(seed=[7, 8, 9])[0], many.reset(seed=7)[0])
    many.action_space.seed(0)
    actions = [many.action_space.sample() for _ in range(5)]
    found = [many.reset(seed=7)[0]]
    for action in actions:
        observation, rewards, _, truncated, info = many.step(action)
        assert truncated.all() == (len(found) == 3) == ("final_obs" in info)
        found.append((info.get("final_obs", observation), rewards))
    for number in range(3):
        assert np.allclose(single.reset(seed=7 + number)[0], found[0][number], atol=1e-5)
        for action, (observations, rewards) in zip(actions, found[1:], strict=True):
            observation, reward, _, truncated, _ = single.step(action[number])
            assert np.allclose(observation, observations[number], atol=1e-4)
            assert np.allclose(reward, rewards[number], atol=1e-4)
            if truncated:
                single.reset()


def test_an_episode_ends_at_its_horizon_and_the_next_begins_at_a_start(models: dict[str, Any]) -> None:
    many = DreamVectorEnv(models["robot"], FRAMES[:1, :1], num_envs=2, horizon=2, observation="features")
    assert many.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    start, _ = many.reset(seed=0)
    step = np.ones((2, 4), np.float32)
    assert not many.step(step)[3].any()
    observations, _, terminated, truncated, info = many.step(step)
    assert truncated.all() and info["_final_obs"].all() and not terminated.any()
    assert (observations == start).all() and (info["final_obs"] != start).any()


def test_the_reward_is_what_the_head_says_of_what_is_seen(models: dict[str, Any]) -> None:
    model = models["robot"].model
    env = make(models["robot"], observation="features")
    env.reset(seed=0)
    seen, reward, *_ = env.step(np.full(4, 0.5, np.float32))
    with torch.no_grad():
        assert reward == pytest.approx(float(model.predict_dual_reward(torch.from_numpy(seen))), abs=1e-5)
    assert played(make(models["latent"]), 0)[2::2] == [0.0] * 4


def test_the_next_state_is_drawn_from_the_prior(models: dict[str, Any]) -> None:
    """1,024 rollouts from one start under one action: how often a class comes is its probability."""
    loaded, count = models["robot"], 1024
    env = DreamVectorEnv(loaded, FRAMES[:1, :1], num_envs=count, observation="features")
    before, _ = env.reset(seed=0)
    action = torch.full((1, 4), 0.5)
    spec = loaded.spec
    split = spec.stoch * spec.discrete
    state = {"stoch": torch.from_numpy(before[:1, :split]).unflatten(-1, (spec.stoch, spec.discrete))}
    state |= {"deter": torch.from_numpy(before[:1, split:]), "logit": state["stoch"]}
    with torch.no_grad():
        logit = loaded.model.imagine_step(state, action, sample=False)["logit"][0]
    drawn = env.step(action.expand(count, -1).numpy())[0][:, :split].mean(0)
    assert np.abs(drawn.reshape(logit.shape) - logit.softmax(-1).numpy()).max() < 0.06


def test_actions_beyond_the_space_count_as_its_bound(models: dict[str, Any]) -> None:
    env = make(models["latent"], observation="features", action_limit=2.0)
    assert env.action_space.high.tolist() == [2.0] * 8

    def after(action: float) -> Any:
        env.reset(seed=0)
        return env.step(np.full(8, action, np.float32))[0]

    assert (after(2.0) == after(9.0)).all() and (after(2.0) != after(1.0)).any()


def test_an_episode_begins_where_the_frames_end(models: dict[str, Any]) -> None:
    robot, latent = models["robot"], models["latent"]
    seen, _ = DreamEnv(robot, (FRAMES[0], ACTIONS[0]), observed=9, observation="features").reset(seed=0)
    assert np.allclose(seen, robot.encode(FRAMES[0], ACTIONS[0]).features[-1], atol=1e-5)
    seen, _ = DreamEnv(latent, FRAMES[1], observed=9, observation="features").reset(seed=0)
    assert np.allclose(seen, latent.encode(FRAMES[1]).features[-1], atol=1e-5)


def test_a_store_gives_starts_as_far_apart_as_in_pretraining(tmp_path: Path, models: dict[str, Any]) -> None:
    with StoreWriter(tmp_path / "x.zarr") as writer:
        for number, clip in enumerate((moving(9), moving(3))):
            writer.append(clip, {"id": str(number), "split": "train", "fps": 20.0})
        writer.finish({"source": {}, "resize": "rule", "ffmpeg": "7"})
    latent, robot = models["latent"], models["robot"]
    seen, _ = DreamEnv(latent, tmp_path / "x.zarr", observation="features").reset(seed=0)
    assert np.allclose(seen, latent.encode(moving(9)[::2]).features[-1], atol=1e-5)
    known = [robot.encode(frame[None], np.zeros((0, 4))).features[-1] for frame in (*moving(9), *moving(3))]
    env = DreamEnv(robot, str(tmp_path / "x.zarr"), observation="features")
    for seed in range(4):
        seen, _ = env.reset(seed=seed)
        assert any(np.allclose(seen, one, atol=1e-5) for one in known)
    with pytest.raises(UserError, match="no clip has 6 frames to start from; lower `observed`"):
        DreamEnv(latent, tmp_path / "x.zarr", observed=6)


def test_the_model_that_the_package_ships_brings_its_starts() -> None:
    env = prelar.DreamEnv(Path(prelar.__file__).parent / "simulator/demo")
    assert env.reset(seed=0)[0].shape == (64, 64, 3) and env.render().dtype == np.uint8


def test_what_cannot_be_dreamt_in_says_so(tmp_path: Path, models: dict[str, Any]) -> None:
    save_pretrained(tmp_path / "apv", "apv")
    with pytest.raises(UserError, match="method = apv, stage pretrain: takes no actions"):
        DreamEnv(tmp_path / "apv", FRAMES)
    with pytest.raises(UserError, match=r"has no world\.safetensors to start from; give frames or a store"):
        save_finetuned(tmp_path / "robot", "prelar")
        DreamEnv(tmp_path / "robot")
    narrow, single = (FRAMES, ACTIONS[..., :3]), (FRAMES, ACTIONS[..., :1])
    for starts in (
        None,
        FRAMES.astype(np.float32),
        FRAMES[:, :, :32],
        (FRAMES, ACTIONS[:, 1:]),
        narrow,
        single,
    ):
        with pytest.raises(ValueError, match="starts: "):
            DreamEnv(models["robot"], starts)
    for options in ({"horizon": 1}, {"observed": 0}, {"observation": "pixels"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(models["robot"], **options)


def test_without_gymnasium_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "prelar.dream")
    monkeypatch.delattr(prelar, "dream", raising=False)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="gymnasium is not installed; run"):
        prelar.DreamEnv  # noqa: B018


@pytest.mark.long
def test_ppo_learns_in_the_dream_what_random_actions_do_not_find() -> None:
    done = subprocess.run(
        [sys.executable, "examples/dream_ppo.py"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"random actions ([\d.-]+), PPO ([\d.-]+)", done.stdout)
    assert found and float(found[2]) > 1.5 * float(found[1]) > 0
