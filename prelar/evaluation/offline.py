"""Does pre-training help? The fine-tuning world model, fitted to a fixed set of a robot's episodes.

From the pre-trained weights and from scratch, with the same batches in the same order, the world model of
fine-tuning learns episodes of the task, half of them random and half of the scripted expert, or all random
where there is none. How well it foresees the images and rewards of held-out episodes is measured against
updates. No policy is learnt, so that nothing but the world model's start tells the curves apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from prelar.envs.simulator import Simulator
from prelar.model.images import first_steps, normalise
from prelar.model.world_model import WorldModel
from prelar.train.loop import adam, descend, seed_step
from prelar.utils.seeds import RngStream, generator
from prelar.utils.tables import evenly_spaced_indices

Floats = npt.NDArray[np.float32]

STEPS = 100
HELD = 5
NOISE = 0.1
SHARE = 3
POINTS = 10
CHUNK = 32
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Experience:
    """E sequences of T steps: image uint8 (E, T, 64, 64, 3), action (E, T, A), reward (E, T).

    `action[e, t]` led to `image[e, t]` and earned `reward[e, t]`; both are 0 at the start of an episode.
    """

    image: npt.NDArray[np.uint8]
    action: Floats
    reward: Floats

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images in [-0.5, 0.5] (E, T, 3, 64, 64), actions, rewards and `is_first` (E, T)."""
        image, action, reward = (
            torch.from_numpy(array).to(device) for array in (self.image, self.action, self.reward)
        )
        return normalise(image), action, reward, first_steps(len(reward), reward.shape[1], device)


def collect(
    simulator: Simulator, *, episodes: int, seed: int, steps: int = STEPS
) -> tuple[Experience, Experience]:
    """Play episodes by turns at random, each action held, and as the expert with some noise.

    Where there is no expert all are random. Episodes have `steps` actions, or as many as the time limit
    allows. Returns those to learn from and those held out, a third of either kind: a pure function of
    arguments and task.
    """
    repeat = simulator.action_repeat
    steps, held = min(steps, -(-simulator.time_limit // repeat)), -(-HELD // repeat)
    images, actions, rewards = [], [], []
    for episode in tqdm(range(episodes), desc="evaluate: episodes to fit", unit="episode", disable=None):
        random = np.random.default_rng([seed, episode])
        drawn = random.uniform(-1, 1, (-(-steps // held), simulator.action_dim)).repeat(held, axis=0)
        noise = NOISE * random.normal(size=(steps, simulator.action_dim))
        simulator.reset(seed, episode)
        seen, taken, earned = [simulator.render()], [np.zeros(simulator.action_dim)], [0.0]
        for step in range(steps):
            alone = episode % 2 == 0 or not simulator.scripted
            action = drawn[step] if alone else simulator.expert() + noise[step]
            taken.append(action.clip(-1, 1))
            earned.append(simulator.step(taken[-1]).reward)
            seen.append(simulator.render())
        images.append(np.stack(seen))
        actions.append(np.stack(taken))
        rewards.append(earned)
    whole = np.stack(images), np.asarray(actions, np.float32), np.asarray(rewards, np.float32)
    held_out = np.arange(episodes) // 2 % SHARE == 1
    return Experience(*(array[~held_out] for array in whole)), Experience(
        *(array[held_out] for array in whole)
    )


def segments(held_out: Experience, length: int) -> Experience:
    """Episodes cut into pieces of `length` steps, what is left over at their ends dropped."""
    count = held_out.reward.shape[1] // length

    def cut(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        kept = array[:, : count * length]
        return kept.reshape(len(array) * count, length, *array.shape[2:])

    return Experience(*(cut(array) for array in (held_out.image, held_out.action, held_out.reward)))  # type: ignore[arg-type]


def draw(learnt: Experience, *, batch: int, length: int, seed: int, update: int) -> Experience:
    """A batch of random segments, a pure function of the arguments."""
    random = generator(RngStream.OFFLINE, seed, update)
    rows = random.integers(len(learnt.reward), size=batch)[:, None]
    times = random.integers(learnt.reward.shape[1] - length + 1, size=batch)[:, None] + np.arange(length)
    return Experience(learnt.image[rows, times], learnt.action[rows, times], learnt.reward[rows, times])


@torch.no_grad()
def open_loop_error(
    model: WorldModel, held_out: Experience, *, observed: int, device: torch.device
) -> tuple[float, float]:
    """Errors of open-loop prediction after `observed` steps: of images and of rewards.

    Both are means of squares: of pixels in [0, 1], predictions clipped to that range, and of the suite's
    own rewards, of Meta-World 0 to 10 an environment step.
    """
    image_error = reward_error = 0.0
    for begin in range(0, len(held_out.reward), CHUNK):
        rows = slice(begin, begin + CHUNK)
        part = Experience(held_out.image[rows], held_out.action[rows], held_out.reward[rows])
        images, actions, rewards, is_first = part.tensors(device)
        seen = model.observe(
            images[:, :observed], is_first[:, :observed], actions[:, :observed], sample=False
        )
        state = {key: value[:, -1] for key, value in seen.post.items()}
        features = []
        for action in actions[:, observed:].unbind(1):
            state = model.imagine_step(state, action, sample=False)
            features.append(model.feature(state))
        feature = torch.stack(features, 1)
        decoded = model.decode(feature, seen.context).float().clamp(-0.5, 0.5)
        image_error += len(images) * float((decoded - images[:, observed:]).square().mean())
        reward_error += len(images) * float(
            (model.predict_reward(feature) - rewards[:, observed:]).square().mean()
        )
    return image_error / len(held_out.reward), reward_error / len(held_out.reward)


def fit(
    fabric: Fabric,
    model: WorldModel,
    learnt: Experience,
    held_out: Experience,
    *,
    updates: int,
    batch: int,
    observed: int,
    seed: int,
) -> npt.NDArray[np.float64]:
    """Fit a model to fine-tune in place; returns rows of updates done, image error, reward error.

    Segments are as long as those held out. What an update draws depends on `seed` and its number alone, so
    that every start sees the same. Measured are the start, the end and points evenly between.
    """
    length = held_out.reward.shape[1]
    model = model.to(fabric.device)
    wrapped, optimizer = fabric.setup(model, adam(model.parameters(), LEARNING_RATE))
    wrapped.mark_forward_method("finetune_losses")
    points = set(evenly_spaced_indices(updates + 1, POINTS + 1).tolist())
    rows = []
    for update in range(updates + 1):
        if update in points:
            with fabric.autocast():
                rows.append(
                    (
                        update,
                        *open_loop_error(model.eval(), held_out, observed=observed, device=fabric.device),
                    )
                )
        if update == updates:
            break
        seed_step(seed, update)
        drawn = draw(learnt, batch=batch, length=length, seed=seed, update=update)
        images, actions, rewards, is_first = drawn.tensors(fabric.device)
        wrapped.train()
        with fabric.autocast():
            losses, _ = wrapped.finetune_losses(images, actions, rewards, is_first)
        descend(fabric, optimizer, model.total(losses))
    return np.array(rows, np.float64)


def compare(
    fabric: Fabric,
    build: Callable[[], WorldModel],
    learnt: Experience,
    held_out: Experience,
    *,
    seeds: Sequence[int],
    updates: int,
    batch: int,
    observed: int,
) -> dict[str, list[float]]:
    """`fit` models of `build` for several seeds, of their first weights and of the batches.

    Returns the columns of a table: mean, least and greatest error against updates.
    """
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        runs.append(
            fit(
                fabric,
                build(),
                learnt,
                held_out,
                updates=updates,
                batch=batch,
                observed=observed,
                seed=seed,
            )
        )
    stacked = np.stack(runs)
    table = {"step": stacked[0, :, 0].tolist()}
    for name, values in (("error", stacked[:, :, 1]), ("reward_error", stacked[:, :, 2])):
        table[name] = values.mean(0).tolist()
        table[f"{name}_min"], table[f"{name}_max"] = values.min(0).tolist(), values.max(0).tolist()
    return table


def baselines(learnt: Experience, held_out: Experience, observed: int) -> tuple[float, float]:
    """Errors, as of `open_loop_error`, of copying the last image seen, and of the mean reward learnt from."""
    images = held_out.image.astype(np.float32) / 255
    copied = np.square(images[:, observed:] - images[:, observed - 1 : observed]).mean(dtype=np.float64)
    rewards = np.square(held_out.reward[:, observed:] - learnt.reward[:, 1:].mean()).mean(dtype=np.float64)
    return float(copied), float(rewards)
