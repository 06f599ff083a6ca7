"""A trained world model as an environment of gymnasium: `prelar.DreamEnv`, and its vector form.

What happens in it is imagined: an episode begins where frames end, each step draws the next state from the
prior, and the reward is what the model's head says. Episodes end by truncation after `horizon` steps; none
terminates. A rollout is a function of its seed and its actions, whatever rolls beside it, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box, MultiDiscrete
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional as F

from prelar import api
from prelar.model.actions import CLASSES
from prelar.model.images import denormalise, first_steps, normalise
from prelar.model.losses import straight_through
from prelar.store.store import Store
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME

Array = npt.NDArray[Any]
Starts = str | Path | Store | Array | tuple[Array, Array] | None
"""What episodes begin with: see `Dream`."""
Start = tuple[Array, Array | None]
"""Frames uint8 (T, 64, 64, 3), and the robot's actions between them (T-1, A) where they are known."""
BESIDE = "world.safetensors"
"""Of a checkpoint's folder, frames to start from that travel with it."""


class Dream:
    """N rollouts of a model, stepped as one batch on its device: what both environments are made of.

    model: a checkpoint, as `prelar.load` takes it, or what that returned.
    starts: a video, uint8 (T, 64, 64, 3), or C of them, (C, T, 64, 64, 3), or such frames and the robot's
        actions between them (…, T-1, A); a store, its path or its URL; None: what lies beside the checkpoint.
    horizon: steps of an episode, at least 2.
    observed: neighbouring frames that are seen before the first step, drawn from a clip; of a store, as far
        apart as those of pre-training. A fine-tuned model that is given no actions sees a single one.
    observation: `frames`, uint8 (64, 64, 3), or `features`, float32 (F,), what heads and policy see.
    action_limit: bound of the latent actions of pre-trained models; groups of classes have none.
    device: where the model is loaded to.

    The actions of a fine-tuned model are the robot's, in [-1, 1]; of a pre-trained one, latent ones: numbers,
    or a class for each group. Raises `UserError` for models and stores that cannot be dreamt in, and
    `ValueError` for frames and sizes that do not fit.
    """

    def __init__(
        self,
        model: str | Path | api.Loaded,
        starts: Starts = None,
        *,
        horizon: int = 15,
        observed: int = 5,
        observation: Literal["frames", "features"] = "frames",
        action_limit: float = 3.0,
        device: str = "cpu",
    ) -> None:
        if horizon < 2 or observed < 1:
            raise ValueError(f"horizon = {horizon}, observed = {observed}: give at least 2 and 1")
        if observation not in ("frames", "features"):
            raise ValueError(f"observation = {observation!r}: give frames or features")
        loaded = model if isinstance(model, api.Loaded) else api.load(model, device)
        self.model, self.spec, self.horizon, self.time = loaded.model, loaded.spec, horizon, 0
        self.device, self.looks = loaded.device, observation == "frames"
        self.robot = loaded.stage == "finetune"
        if not self.robot and self.spec.method != "prelar":
            raise UserError(
                f"method = {self.spec.method}, stage pretrain: takes no actions; "
                "fine-tune it, or pre-train with method prelar"
            )
        if starts is None and not isinstance(model, api.Loaded):
            starts = _beside(Path(model))
        robot_dim = loaded.action_dim if self.robot else None
        self._draw = _opened(starts, robot_dim, observed, self.spec.frame_gap)
        width = self.spec.feature_dim
        self.observation_space: Box = (
            Box(0, 255, FRAME, np.uint8) if self.looks else Box(-1.0, 1.0, (width,), np.float32)
        )
        self.groups = (
            loaded.action_dim // CLASSES if self.spec.action_kind == "discrete" and not self.robot else 0
        )
        limit = 1.0 if self.robot else action_limit
        self.action_space: Box | MultiDiscrete = (
            MultiDiscrete([CLASSES] * self.groups)
            if self.groups
            else Box(-limit, limit, (loaded.action_dim,), np.float32)
        )
        self._limit = limit

    @torch.no_grad()
    def reset(self, generators: Sequence[np.random.Generator]) -> Array:
        """Begin a rollout with each generator, which draws where; returns observations (N, …)."""
        drawn = [self._draw(generator) for generator in generators]
        images = normalise(torch.from_numpy(np.stack([frames for frames, _ in drawn])).to(self.device))
        led = None
        if self.robot:
            led = torch.zeros(*images.shape[:2], self.spec.robot_action_dim, device=self.device)
            if drawn[0][1] is not None:
                given = np.stack([actions for _, actions in drawn if actions is not None])
                led[:, 1:] = torch.from_numpy(given).to(self.device)
        seen = self.model.observe(
            images, first_steps(len(images), images.shape[1], self.device), led, sample=False
        )
        self._state = {key: seen.post[key][:, -1] for key in ("logit", "stoch", "deter")}
        self._context, self.time = seen.context, 0
        return self.observe()

    @torch.no_grad()
    def step(self, actions: Array, generators: Sequence[np.random.Generator]) -> npt.NDArray[np.float32]:
        """Take an action in each rollout (N, …), each of which draws its latents; returns rewards (N,)."""
        before, shape = self._state, (self.spec.stoch, self.spec.discrete)
        prior = self.model.imagine_step(before, self._given(actions), sample=False)
        noise = np.stack([generator.gumbel(size=shape) for generator in generators]).astype(np.float32)
        stoch = straight_through(prior["logit"], torch.from_numpy(noise).to(self.device))
        self._state = {"logit": prior["logit"], "stoch": stoch, "deter": prior["deter"]}
        self.time += 1
        if not self.robot:
            return np.zeros(len(noise), np.float32)
        predicted = self.model.predict_plain_reward(self.model.feature(self._state))
        rewards: npt.NDArray[np.float32] = predicted.cpu().numpy()
        return rewards

    def observe(self) -> Array:
        """What each rollout shows now (N, …)."""
        return self.draw() if self.looks else self.model.feature(self._state).float().cpu().numpy()

    @torch.no_grad()
    def draw(self) -> Array:
        """The picture of each rollout now, uint8 (N, 64, 64, 3)."""
        images = self.model.decode(self.model.feature(self._state)[:, None], self._context)
        pictures: Array = denormalise(images[:, 0]).cpu().numpy()
        return pictures

    def _given(self, actions: Array) -> Tensor:
        """Actions (N, …) as the model takes them, float (N, A)."""
        if self.groups:
            classes = torch.as_tensor(np.asarray(actions), dtype=torch.int64, device=self.device)
            return F.one_hot(classes, CLASSES).float().flatten(-2)
        given = torch.as_tensor(np.asarray(actions, dtype=np.float32), device=self.device)
        return given.clamp(-self._limit, self._limit)


class DreamEnv(gymnasium.Env[Array, Array]):
    """One rollout at a time of a trained model; the arguments are those of `Dream`.

    `render()` draws the picture, whatever is observed.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own form

    def __init__(self, model: str | Path | api.Loaded, starts: Starts = None, **options: Any) -> None:
        self.render_mode = "rgb_array"
        self.dream = Dream(model, starts, **options)
        self.observation_space, self.action_space = self.dream.observation_space, self.dream.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode at a start that is drawn."""
        super().reset(seed=seed)
        return self.dream.reset([self.np_random])[0], {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Imagine one step."""
        reward = float(self.dream.step(np.asarray(action)[None], [self.np_random])[0])
        return self.dream.observe()[0], reward, False, self.dream.time >= self.dream.horizon, {}

    def render(self) -> Array:
        """The picture now, uint8 (64, 64, 3)."""
        picture: Array = self.dream.draw()[0]
        return picture


class DreamVectorEnv(VectorEnv[Array, Array, Array]):
    """`num_envs` rollouts at once, as one batch; the other arguments are those of `Dream`.

    All episodes end together, after `horizon` steps, and the next begin in the same step: the last
    observations are `final_obs` of its info. Rollout i of `reset(seed=s)` is that of a `DreamEnv` with the
    seed s + i, up to rounding.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, model: str | Path | api.Loaded, starts: Starts = None, *, num_envs: int, **options: Any
    ) -> None:
        self.num_envs, self.render_mode = num_envs, "rgb_array"
        self.dream = Dream(model, starts, **options)
        self.single_observation_space = self.dream.observation_space
        self.single_action_space = self.dream.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [seeding.np_random(None)[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in each rollout, from a seed for all or one for each, else `ValueError`."""
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
            if len(seeds) != self.num_envs:
                raise ValueError(f"seed: {len(seeds)} of them; give one, or {self.num_envs}")
            super().reset(seed=seeds[0])
            self._generators = [seeding.np_random(one)[0] for one in seeds]
        return self.dream.reset(self._generators), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Imagine one step in each rollout."""
        rewards = self.dream.step(actions, self._generators)
        observations, info = self.dream.observe(), {}
        ended = np.full(self.num_envs, self.dream.time >= self.dream.horizon)
        if ended.any():
            info = {"final_obs": observations, "_final_obs": ended.copy()}
            observations = self.dream.reset(self._generators)
        return observations, rewards, np.zeros_like(ended), ended, info

    def render(self) -> tuple[Array, ...]:
        """The pictures now, each uint8 (64, 64, 3)."""
        return tuple(self.dream.draw())


def _beside(folder: Path) -> tuple[Array, Array] | Array:
    """The frames, and the actions where there are any, in a checkpoint's folder."""
    path = folder / BESIDE
    if not path.is_file():
        raise UserError(f"{folder}: has no {BESIDE} to start from; give frames or a store as `starts`")
    found = load_file(path)
    return (found["frames"], found["actions"]) if "actions" in found else found["frames"]


def _opened(
    starts: Starts, robot_dim: int | None, observed: int, gap: float | None
) -> Callable[[np.random.Generator], Start]:
    """What draws a start from `starts`, with actions of `robot_dim` numbers, None: without actions."""
    robot = robot_dim is not None
    if starts is None:
        raise ValueError("starts: none; give frames, or a store")
    if isinstance(starts, str | Path | Store):
        store = starts if isinstance(starts, Store) else Store.open(starts)
        return _of_store(store, 1 if robot else observed, None if robot else gap)
    frames, actions = starts if isinstance(starts, tuple) else (starts, None)
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-3:] != FRAME or not frames.size:
        raise ValueError(
            f"starts: {frames.dtype} {frames.shape}; give uint8 (T, 64, 64, 3) or (C, T, 64, 64, 3)"
        )
    if actions is not None:
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape[:-1] != (*frames.shape[:-4], frames.shape[-4] - 1):
            raise ValueError(f"starts: actions {actions.shape} of frames {frames.shape}; give (…, T-1, A)")
        if robot and actions.shape[-1] != robot_dim:
            raise ValueError(f"starts: actions {actions.shape}; this model's have {robot_dim} numbers each")
    if frames.ndim == 4:
        frames, actions = frames[None], None if actions is None else actions[None]
    length = min(1 if robot and actions is None else observed, frames.shape[1])

    def draw(generator: np.random.Generator) -> Start:
        clip, first = generator.integers(len(frames)), generator.integers(frames.shape[1] - length + 1)
        led = None if actions is None or not robot else actions[clip, first : first + length - 1]
        return frames[clip, first : first + length], led

    return draw


def _of_store(store: Store, length: int, gap: float | None) -> Callable[[np.random.Generator], Start]:
    """What draws a start of `length` frames, `gap` seconds apart, from the clips of a store."""
    clips, strides = store.clips(min_length=length, gap=gap), store.strides(gap)
    if not len(clips):
        raise UserError(f"{store.path}: no clip has {length} frames to start from; lower `observed`")

    def draw(generator: np.random.Generator) -> Start:
        clip = clips[generator.integers(len(clips))]
        spare = store.clip_length[clip] - (length - 1) * strides[clip]
        begin = store.clip_start[clip] + generator.integers(spare)
        return store.read_many([begin], length, strides=strides[clip : clip + 1])[0], None

    return draw
