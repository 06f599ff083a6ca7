"""Does the latent action mean anything?

A ridge regression reads the hand's displacement and the gripper's change off the latent action of a pair of
frames. The episodes are either of random actions in Meta-World, each held for a few steps, since an expert's
pose and phase give its action away, or recorded demonstrations of a store. Beside the pre-trained encoder
stand four controls: an untrained encoder, the raw difference of the frames, shuffled pairs (the floor), and
an encoder trained with the labels (the ceiling).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from prelar.envs.metaworld import Simulator
from prelar.evaluation.panels import grid
from prelar.methods import build_model
from prelar.model.images import denormalise, first_steps, normalise
from prelar.model.world_model import WorldModel
from prelar.store.store import Store
from prelar.train.loop import adam, seed_step
from prelar.utils.frames import FRAME
from prelar.utils.seeds import RngStream, generator

Doubles = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]

DIMENSIONS = ("x", "y", "z", "gripper")
POSITION, OPENING = slice(0, 3), slice(7, 8)
HELD = 5
STEPS = 50
TEST_SHARE = 3
PENALTIES = tuple(10.0**k for k in range(-3, 6))
BATCH, SHIFT, LEARNING_RATE = 64, 4, 1e-3
SWAP_ROWS, SWAP_COLUMNS, SWAP_STEPS = 4, 6, 3


@dataclass(frozen=True)
class Episodes:
    """E episodes: frames uint8 (E, T, 64, 64, 3), change float64 (E, T - 1, 4), held_out bool (E,).

    `change[e, t]` is what happened between frames t and t + 1: the hand's displacement in metres and the
    change of the gripper's opening. `held_out` tells which episodes test the regression.
    """

    frames: Frames
    change: Doubles
    held_out: npt.NDArray[np.bool_]


def collect(
    simulator: Simulator, *, episodes: int, seed: int, steps: int = STEPS, held: int = HELD
) -> Episodes:
    """Play random episodes, each action held `held` steps: a pure function of arguments and task.

    Every third, from the second on, is held out.
    """
    frames, change = [], []
    for episode in tqdm(range(episodes), desc="evaluate: probe", unit="episode", disable=None):
        random = np.random.default_rng([seed, episode])
        actions = random.uniform(-1, 1, (-(-steps // held), simulator.action_dim)).repeat(held, axis=0)[
            :steps
        ]
        simulator.reset(seed, episode)
        seen, places = [simulator.render()], [simulator.gripper]
        for action in actions:
            simulator.step(action)
            seen.append(simulator.render())
            places.append(simulator.gripper)
        frames.append(np.stack(seen))
        change.append(_change(np.stack(places)))
    return Episodes(np.stack(frames), np.stack(change), np.arange(episodes) % TEST_SHARE == 1)


def demonstrations(store: Store, *, episodes: int, seed: int, steps: int = STEPS) -> Episodes | None:
    """Segments of `steps` pairs of at most `episodes` recorded episodes, a third of them held out.

    They are seen by the store's first camera by name: a direction in the world looks different to each. The
    held-out ones are of the validation split, the others of the training split. A pure function of store and
    arguments. None where the store does not tell where the hand was, or has too few episodes of that length.
    """
    if not store.has("gripper"):
        return None
    cameras = np.array(store.clip_index["camera"].to_pylist(), dtype=object)
    camera = min((name for name in cameras if name is not None), default=None)
    random = np.random.default_rng(seed)
    chosen: dict[str, npt.NDArray[np.int64]] = {}
    for split, share in (
        ("train", episodes - episodes // TEST_SHARE),
        ("validation", episodes // TEST_SHARE),
    ):
        clips = store.clips(split, min_length=steps + 1)
        chosen[split] = np.sort(random.permutation(clips[cameras[clips] == camera])[:share])
    if len(chosen["train"]) < TEST_SHARE or not len(chosen["validation"]):
        return None
    clips = np.concatenate([chosen["train"], chosen["validation"]])
    starts = store.clip_start[clips] + random.integers(0, store.clip_length[clips] - steps)
    gripper = store.array("gripper")
    change = np.stack([_change(gripper[start : start + steps + 1]) for start in starts])
    frames = store.read_many(starts, steps + 1)
    return Episodes(frames, change, np.arange(len(clips)) >= len(chosen["train"]))


def _change(places: npt.NDArray[np.float32]) -> Doubles:
    """What happens from each place of the hand (T, 8) to the next, as in `Episodes` (T - 1, 4)."""
    path = places.astype(np.float64)
    return np.diff(np.concatenate([path[:, POSITION], path[:, OPENING]], axis=1), axis=0)


def ridge_r2(
    features: npt.NDArray[Any],
    targets: Doubles,
    groups: npt.NDArray[np.int64],
    test: npt.NDArray[np.bool_],
) -> Doubles:
    """R² of a ridge regression on held-out groups, for each target.

    Args:
        features: (N, F); scaled to zero mean and unit variance by the training rows.
        targets: (N, D).
        groups: (N,) numbers of episodes.
        test: (N,) whether a row's episode is for the test; of the others every third chooses the penalty.

    Returns:
        (D,), 1 - Σ(y - ŷ)² / Σ(y - mean)²; 0 for a target that does not vary.
    """
    train = ~test
    ranks = np.unique(groups[train], return_inverse=True)[1]
    inner = ranks % TEST_SHARE == 1
    x, y = features[train], targets[train]
    scores = [_r2(_ridge(x[~inner], y[~inner], x[inner], penalty), y[inner]) for penalty in PENALTIES]
    best = PENALTIES[int(np.argmax([score.mean() for score in scores]))]
    return _r2(_ridge(x, y, features[test], best), targets[test])


def _ridge(x: npt.NDArray[Any], y: Doubles, new: npt.NDArray[Any], penalty: float) -> Doubles:
    """Predictions (M, D) for rows `new` (M, F); the penalty is relative to the number of rows of `x`."""
    middle, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, np.inf)
    x, new = (x - middle) / scale, (new - middle) / scale
    bottom = y.mean(0)
    load = penalty * len(x)
    if x.shape[1] <= len(x):
        weights = np.linalg.solve(x.T @ x + load * np.eye(x.shape[1]), x.T @ (y - bottom))
        return new @ weights + bottom
    dual = np.linalg.solve((x @ x.T).astype(np.float64) + load * np.eye(len(x)), y - bottom)
    return (new @ x.T) @ dual + bottom


def _r2(predicted: Doubles, truth: Doubles) -> Doubles:
    rest = ((truth - predicted) ** 2).sum(0)
    spread = ((truth - truth.mean(0)) ** 2).sum(0)
    return np.where(spread > 1e-18, 1 - rest / np.where(spread > 1e-18, spread, 1), 0.0)


def run_probe(
    model: WorldModel, episodes: Episodes, *, updates: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """R² of the latent action and of its controls, as the page shows them, in full precision.

    An autocast around the call does not hold inside: it keeps the weights that it has cast, and would go on
    with them while the encoder with labels learns.

    Args:
        model: a pre-training model that infers latent actions.
        episodes: at least three to fit, and one held out.
        updates: gradient steps of the encoder that is trained with the labels.
        seed: of the untrained weights, the shuffling and the batches.
        device: where the model lives.
    """
    count, pairs = episodes.change.shape[:2]
    groups, test = np.repeat(np.arange(count), pairs), np.repeat(episodes.held_out, pairs)
    targets = episodes.change.reshape(-1, len(DIMENSIONS))
    with torch.autocast(device.type, enabled=False):
        features = _features(model, episodes, updates=updates, seed=seed, device=device)
    rows = []
    for name, values in features.items():
        r2 = ridge_r2(values, targets, groups, test)
        rows.append({"name": name, "r2": r2.tolist(), "mean": float(r2.mean())})
    return {
        "dimensions": list(DIMENSIONS),
        "train": int((~test).sum()),
        "test": int(test.sum()),
        "rows": rows,
    }


def _features(
    model: WorldModel, episodes: Episodes, *, updates: int, seed: int, device: torch.device
) -> dict[str, npt.NDArray[Any]]:
    """What the regression reads, by name: rows (N, F) for the N pairs, episode after episode."""
    latent = _latent(model.infer_actions, episodes.frames, device)
    torch.manual_seed(seed)
    fresh = build_model(model.spec).to(device)
    untrained = _latent(fresh.infer_actions, episodes.frames, device)
    order = np.random.default_rng(seed).permutation(len(latent))
    difference = np.diff(episodes.frames.astype(np.float32), axis=1).reshape(len(latent), -1)
    taught = _teach(fresh, episodes, updates=updates, seed=seed, device=device)
    return {
        "latent action, pre-trained": latent,
        "untrained encoder": untrained,
        "raw frame difference": difference,
        "shuffled pairs": latent[order],
        "encoder trained with labels": _latent(taught, episodes.frames, device),
    }


def _latent(
    infer: Callable[[Tensor, Tensor], Tensor | None], frames: Frames, device: torch.device
) -> Doubles:
    """Latent actions of all pairs, episode after episode: (E · (T - 1), A)."""
    found = []
    for episode in frames:
        images = normalise(torch.from_numpy(episode[None]).to(device))
        with torch.no_grad():
            actions = infer(images, first_steps(1, len(episode), device))
        assert actions is not None, "the model infers no actions"
        found.append(actions[0].double().cpu().numpy())
    return np.concatenate(found)


def _teach(
    model: WorldModel, episodes: Episodes, *, updates: int, seed: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Train the action encoder of a fresh model with a linear head on the labels; returns how it infers.

    Batches are of single pairs, and each pair's frames are shifted alike, so that the few episodes are not
    learnt by heart.
    """
    action: Any = model.action
    numbers = np.flatnonzero(~episodes.held_out)
    labels = episodes.change[numbers]
    scaled = (labels - labels.mean((0, 1))) / np.maximum(labels.std((0, 1)), 1e-9)
    head = nn.Linear(action.action_dim, len(DIMENSIONS)).to(device)
    optimizer = adam([*action.parameters(), *head.parameters()], LEARNING_RATE)
    is_first = first_steps(BATCH, action.window, device)
    for update in tqdm(range(updates), desc="evaluate: probe with labels", unit="update", disable=None):
        seed_step(seed, update)
        random = generator(RngStream.PROBE, seed, update)
        rows, pairs = random.integers(len(numbers), size=BATCH), random.integers(labels.shape[1], size=BATCH)
        times = np.maximum(pairs[:, None] + np.arange(2 - action.window, 2), 0)
        frames = _shift(episodes.frames[numbers[rows][:, None], times], random)
        stats = action.posterior(normalise(torch.from_numpy(frames).to(device)), is_first, True)
        guess = head(action.kind.action(stats, sample=False)[:, -1])
        wanted = torch.from_numpy(scaled[rows, pairs]).float().to(device)
        loss = (guess - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    infer: Callable[[Tensor, Tensor], Tensor] = action.infer
    return infer


def _shift(frames: Frames, random: np.random.Generator) -> Frames:
    """Every sequence of (N, T, H, W, 3) moved by up to `SHIFT` pixels each way, its edges repeated."""
    size = frames.shape[2]
    padded = np.pad(frames, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    corners = random.integers(2 * SHIFT + 1, size=(len(frames), 2))
    moved = [one[:, y : y + size, x : x + size] for one, (y, x) in zip(padded, corners, strict=True)]
    return np.stack(moved)


@torch.no_grad()
def swap_actions(model: WorldModel, frames: Frames, *, observed: int, device: torch.device) -> Frames | None:
    """The same states under different latent actions, as one picture; None where there are too few clips.

    `frames` is uint8 (N, T, 64, 64, 3). The donors are the clips' pairs that change most. The first two rows
    show each donor's pair; below, each row starts from the state that a clip has after `observed` frames,
    decoded in the first column, and goes on for `SWAP_STEPS` steps under the donor's latent action.
    """
    if len(frames) < 2:
        return None
    images = normalise(torch.from_numpy(frames).to(device))
    is_first = first_steps(len(frames), frames.shape[1], device)
    latent = model.infer_actions(images, is_first)
    assert latent is not None, "the model infers no actions"
    moved = np.abs(np.diff(frames.astype(np.int16), axis=1)).mean((2, 3, 4))
    moments = moved.argmax(1)
    donors = np.argsort(-moved.max(1), kind="stable")[:SWAP_COLUMNS]
    rows = np.arange(len(frames))[:SWAP_ROWS]
    seen = model.observe(images[rows, :observed], is_first[rows, :observed], sample=False)
    start = {key: value[:, -1] for key, value in seen.post.items()}
    blank = np.full(FRAME, 128, np.uint8)
    columns = [[blank, blank, *_decode(model, start, seen.context)]]
    for donor in donors:
        action = latent[donor, moments[donor]].expand(len(rows), -1)
        state = start
        for _ in range(SWAP_STEPS):
            state = model.imagine_step(state, action, sample=False)
        pair = frames[donor, moments[donor]], frames[donor, moments[donor] + 1]
        columns.append([*pair, *_decode(model, state, seen.context)])
    cells = np.stack([np.stack(column) for column in columns], axis=1)
    return grid(cells)


def _decode(model: WorldModel, state: dict[str, Tensor], context: Any) -> Frames:
    """Decoded frames uint8 (B, 64, 64, 3) of states (B, …)."""
    images = model.decode(model.feature(state)[:, None], context)[:, 0]
    frames: Frames = denormalise(images).cpu().numpy()
    return frames
