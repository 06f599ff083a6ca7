"""Does the latent action mean anything?

A ridge regression reads the hand's displacement and the gripper's change off the latent action of a pair of
frames, as far apart as those of pre-training, and, since frames tell less the closer they are, of pairs
nearer and further apart. The episodes are either of random actions in Meta-World, each held for a few steps,
since an expert's pose and phase give its action away, or recorded demonstrations of a store. Beside the
pre-trained encoder stand four controls: an untrained encoder, the raw difference of the frames, shuffled
pairs (the floor), and an encoder trained with the labels (the ceiling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from prelar.envs.simulator import Simulator
from prelar.evaluation.panels import grid
from prelar.methods import build_model
from prelar.model.images import denormalise, first_steps, normalise
from prelar.model.world_model import WorldModel
from prelar.store.store import Store
from prelar.train.loop import adam, seed_step
from prelar.utils.frames import FRAME, Frames
from prelar.utils.seeds import RngStream, generator

Doubles = npt.NDArray[np.float64]

DIMENSIONS = ("x", "y", "z", "gripper")
POSITION, OPENING = slice(0, 3), slice(7, 8)
HELD = 5
STEPS = 50
TEST_SHARE = 3
PENALTIES = tuple(10.0**k for k in range(-3, 6))
BATCH, SHIFT, LEARNING_RATE = 64, 4, 1e-3
GAPS = (1, 2, 4, 8)
LATENT, UNTRAINED, DIFFERENCE = "latent action, pre-trained", "untrained encoder", "raw frame difference"
SWAP_ROWS, SWAP_COLUMNS, SWAP_AXES, SWAP_STEPS = 4, 6, 3, 3


@dataclass(frozen=True)
class Episodes:
    """E episodes: frames uint8 (E, T, 64, 64, 3), change float64 (E, T - 1, 4), held_out bool (E,).

    `change[e, t]` is what happened between frames t and t + 1: the hand's displacement in metres and the
    change of the gripper's opening. `held_out` tells which episodes test the regression. `gap`: frames from
    one of a pair to the other in pre-training, less than T.
    """

    frames: Frames
    change: Doubles
    held_out: npt.NDArray[np.bool_]
    gap: int = 1

    def moved(self, gap: int) -> Doubles:
        """What happened between frames t and t + gap: (E, T - gap, 4)."""
        return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(self.change, gap, 1).sum(-1))


def collect(
    simulator: Simulator, *, episodes: int, seed: int, steps: int = STEPS, held: int = HELD, gap: int = 1
) -> Episodes:
    """Play random episodes, each action held `held` steps: a pure function of arguments and task.

    Each has `steps` pairs of frames that lie `gap` apart. Every third, from the second on, is held out.
    """
    frames, change = [], []
    steps += gap - 1
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
    return Episodes(np.stack(frames), np.stack(change), np.arange(episodes) % TEST_SHARE == 1, gap)


def demonstrations(
    store: Store, *, episodes: int, seed: int, steps: int = STEPS, gap: float | None = None
) -> Episodes | None:
    """Segments of `steps` pairs of at most `episodes` recorded episodes, a third of them held out.

    A pair is of neighbours, or of frames `gap` seconds apart, of episodes at the rate that most have. They
    are seen by the store's first camera by name: a direction in the world looks different to each. The
    held-out ones are of the validation split, the others of the training split. A pure function of store and
    arguments. None where the store does not tell where the hand was, or has too few episodes of that length.
    """
    if not store.has("gripper"):
        return None
    cameras = np.array(store.clip_index["camera"].to_pylist(), dtype=object)
    camera = min((name for name in cameras if name is not None), default=None)
    strides = store.strides(gap)
    stride = int(np.bincount(strides[cameras == camera]).argmax())
    alike, steps = (cameras == camera) & (strides == stride), steps + stride - 1
    random = np.random.default_rng(seed)
    chosen: dict[str, npt.NDArray[np.int64]] = {}
    for split, share in (
        ("train", episodes - episodes // TEST_SHARE),
        ("validation", episodes // TEST_SHARE),
    ):
        clips = store.clips(split, min_length=steps + 1)
        chosen[split] = np.sort(random.permutation(clips[alike[clips]])[:share])
    if len(chosen["train"]) < TEST_SHARE or not len(chosen["validation"]):
        return None
    clips = np.concatenate([chosen["train"], chosen["validation"]])
    starts = store.clip_start[clips] + random.integers(0, store.clip_length[clips] - steps)
    gripper = store.array("gripper")
    change = np.stack([_change(gripper[start : start + steps + 1]) for start in starts])
    frames = store.read_many(starts, steps + 1)
    return Episodes(frames, change, np.arange(len(clips)) >= len(chosen["train"]), stride)


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
    tried = _ridge(x[~inner], y[~inner], x[inner], PENALTIES)
    best = PENALTIES[int(np.argmax([_r2(predicted, y[inner]).mean() for predicted in tried]))]
    (predicted,) = _ridge(x, y, features[test], (best,))
    return _r2(predicted, targets[test])


def _ridge(
    x: npt.NDArray[Any], y: Doubles, new: npt.NDArray[Any], penalties: Sequence[float]
) -> list[Doubles]:
    """Predictions (M, D) for rows `new` (M, F) by each penalty, which is relative to the rows of `x`."""
    middle, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, np.inf)
    x, new = (x - middle) / scale, (new - middle) / scale
    bottom = y.mean(0)
    loads = [penalty * len(x) for penalty in penalties]
    if x.shape[1] <= len(x):
        gram, right, one = x.T @ x, x.T @ (y - bottom), np.eye(x.shape[1])
        return [new @ np.linalg.solve(gram + load * one, right) + bottom for load in loads]
    gram, cross, one = (x @ x.T).astype(np.float64), new @ x.T, np.eye(len(x))
    return [cross @ np.linalg.solve(gram + load * one, y - bottom) + bottom for load in loads]


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

    Returns:
        `rows`: R² at the gap of pre-training, `gap`, for each control. `gaps`: mean R² of three of them over
        `GAPS` and that one, in columns by `step`, the frames from one of a pair to the other.
    """
    torch.manual_seed(seed)
    fresh = build_model(model.spec).to(device)
    length = episodes.frames.shape[1]
    steps = [gap for gap in sorted({*GAPS, episodes.gap}) if gap < length]
    found = {}
    with torch.autocast(device.type, enabled=False):
        for gap in steps:
            features = _features(model, fresh, episodes, gap, device)
            found[gap] = {name: _read(values, episodes, gap) for name, values in features.items()}
            if gap == episodes.gap:
                latent = features[LATENT]
        taught = _teach(fresh, episodes, updates=updates, seed=seed, device=device)
        others = {
            "shuffled pairs": latent[np.random.default_rng(seed).permutation(len(latent))],
            "encoder trained with labels": _latent(taught, episodes.frames, episodes.gap, device),
        }
    r2 = found[episodes.gap] | {
        name: _read(values, episodes, episodes.gap) for name, values in others.items()
    }
    columns = {"latent": LATENT, "untrained": UNTRAINED, "difference": DIFFERENCE}
    test = episodes.held_out.sum() * (length - episodes.gap)
    return {
        "dimensions": list(DIMENSIONS),
        "train": int(len(latent) - test),
        "test": int(test),
        "rows": [
            {"name": name, "r2": values.tolist(), "mean": float(values.mean())} for name, values in r2.items()
        ],
        "gap": episodes.gap,
        "gaps": {"step": steps}
        | {column: [float(found[gap][name].mean()) for gap in steps] for column, name in columns.items()},
    }


def _read(values: npt.NDArray[Any], episodes: Episodes, gap: int) -> Doubles:
    """R² of what happened over `gap` frames, read off rows `values` (N, F), episode after episode: (4,)."""
    targets = episodes.moved(gap)
    count, pairs = targets.shape[:2]
    groups, test = np.repeat(np.arange(count), pairs), np.repeat(episodes.held_out, pairs)
    return ridge_r2(values, targets.reshape(-1, len(DIMENSIONS)), groups, test)


def _features(
    model: WorldModel, fresh: WorldModel, episodes: Episodes, gap: int, device: torch.device
) -> dict[str, npt.NDArray[Any]]:
    """What the regression reads of all pairs `gap` frames apart: rows (N, F), episode after episode."""
    frames = episodes.frames.astype(np.float32)
    return {
        LATENT: _latent(model.infer_actions, episodes.frames, gap, device),
        UNTRAINED: _latent(fresh.infer_actions, episodes.frames, gap, device),
        DIFFERENCE: (frames[:, gap:] - frames[:, :-gap]).reshape(-1, frames[0, 0].size),
    }


def _latent(
    infer: Callable[[Tensor, Tensor], Tensor | None], frames: Frames, gap: int, device: torch.device
) -> Doubles:
    """Latent actions of all pairs `gap` frames apart, episode after episode: (E · (T - gap), A)."""
    found = []
    for episode in frames:
        pairs: dict[int, Doubles] = {}
        for offset in range(min(gap, len(episode) - gap)):
            images = normalise(torch.from_numpy(episode[None, offset::gap].copy()).to(device))
            with torch.no_grad():
                actions = infer(images, first_steps(1, images.shape[1], device))
            assert actions is not None, "the model infers no actions"
            pairs[offset] = actions[0].double().cpu().numpy()
        rows = np.empty((len(episode) - gap, pairs[0].shape[1]))
        for offset, values in pairs.items():
            rows[offset::gap] = values
        found.append(rows)
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
    gap, labels = episodes.gap, episodes.moved(episodes.gap)[numbers]
    scaled = (labels - labels.mean((0, 1))) / np.maximum(labels.std((0, 1)), 1e-9)
    head = nn.Linear(action.action_dim, len(DIMENSIONS)).to(device)
    optimizer = adam([*action.parameters(), *head.parameters()], LEARNING_RATE)
    is_first = first_steps(BATCH, action.window, device)
    for update in tqdm(range(updates), desc="evaluate: probe with labels", unit="update", disable=None):
        seed_step(seed, update)
        random = generator(RngStream.PROBE, seed, update)
        rows, pairs = random.integers(len(numbers), size=BATCH), random.integers(labels.shape[1], size=BATCH)
        times = pairs[:, None] + gap * np.arange(2 - action.window, 2)
        times = np.where(times < 0, pairs[:, None] % gap, times)
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


@torch.no_grad()
def swap_directions(
    model: WorldModel,
    frames: Frames,
    actions: npt.NDArray[np.float32],
    *,
    observed: int,
    device: torch.device,
) -> Frames:
    """The same states under the robot's directions, as one picture.

    Frames uint8 (N, T, 64, 64, 3), actions (N, T, A), the one that led to each frame. Each row is a clip: its
    state after `observed` frames, decoded, then what becomes of it in `SWAP_STEPS` actions to either side
    along each of the first `SWAP_AXES` axes, the positive side first.
    """
    images = normalise(torch.from_numpy(frames[:SWAP_ROWS, :observed]).to(device))
    led = torch.from_numpy(actions[:SWAP_ROWS, :observed]).to(device)
    seen = model.observe(images, first_steps(len(images), observed, device), led, sample=False)
    start = {key: value[:, -1] for key, value in seen.post.items()}
    columns = [_decode(model, start, seen.context)]
    for axis in range(min(SWAP_AXES, led.shape[2])):
        for side in (1.0, -1.0):
            action = torch.zeros_like(led[:, 0])
            action[:, axis] = side
            state = start
            for _ in range(SWAP_STEPS):
                state = model.imagine_step(state, action, sample=False)
            columns.append(_decode(model, state, seen.context))
    return grid(np.stack(columns, axis=1))


def _decode(model: WorldModel, state: dict[str, Tensor], context: Any) -> Frames:
    """Decoded frames uint8 (B, 64, 64, 3) of states (B, …)."""
    images = model.decode(model.feature(state)[:, None], context)[:, 0]
    frames: Frames = denormalise(images).cpu().numpy()
    return frames
