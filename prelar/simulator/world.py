"""What a rollout starts from: held-out clips, or episodes of the agent, with the model's state at each frame.

A world is kept as one safetensors file, whose metadata `world` is JSON: see `World`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save

from prelar.config import Config
from prelar.control.rollout import play
from prelar.envs import gl, make_env_of
from prelar.envs.pixels import PixelEnv
from prelar.model.images import first_steps, normalise
from prelar.simulator.step import Step
from prelar.store.store import Store
from prelar.utils.errors import UserError, one_line
from prelar.utils.frames import Frames
from prelar.utils.seeds import RngStream, episode_seed
from prelar.utils.tables import evenly_spaced_indices

Arrays = dict[str, npt.NDArray[Any]]

SPLIT = "validation"
WORLD = "world.safetensors"
"""Of a checkpoint's folder, what its model starts from, where it travels with it."""
CLIPS, EPISODES = 8, 3
AXES_CLIPS = 64
LONGEST = 40
AXES = 4
OBSERVED = 5


@dataclass(frozen=True)
class World:
    """C clips of T frames each to start from, and what controls the model.

    about: `stage`, `classes` of a categorical, `action_dim`, `controls` ("robot", "latent" or "none"),
    `discrete` (whether latent actions are groups of one-hots), `labels` of the clips.

    arrays: `frames` uint8 (C, T, 64, 64, 3); `stoch` int32 (C, T, S), the classes, and `deter` float32 (C, T,
    D) of the state at each frame; of a robot `actions` (C, T-1, A), `reward`, `value` (C, T) and `policy` (C,
    T, A); of latent actions `pairs` (C, T, T, A), inferred between each two frames, `mean` (A) and `axes` (≤
    4, A), the principal ones, each as long as a standard deviation; of models with a context its maps
    `context0`, … (C, …).
    """

    about: dict[str, Any]
    arrays: Arrays

    def context(self, clip: int) -> tuple[torch.Tensor, ...]:
        """The context's maps of a clip, each (1, C, H, W)."""
        names = sorted(name for name in self.arrays if name.startswith("context"))
        return tuple(torch.from_numpy(self.arrays[name][clip : clip + 1]) for name in names)

    def start(self, clip: int, frame: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One-hots (1, S, K) and deter (1, D) at a frame."""
        chosen = torch.from_numpy(self.arrays["stoch"][clip, frame]).long()
        one_hot = torch.nn.functional.one_hot(chosen, classes).float()
        return one_hot[None], torch.from_numpy(self.arrays["deter"][clip, frame : frame + 1])

    def content(self) -> bytes:
        """The file."""
        arrays = {name: np.ascontiguousarray(array) for name, array in sorted(self.arrays.items())}
        return save(arrays, {"world": json.dumps(self.about, sort_keys=True)})


def read_world(path: Path) -> World:
    """Read a world's file. Raises `UserError` where it is none."""
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["world"])
            return World(about, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except Exception as error:  # safetensors raises many kinds for a damaged file
        raise UserError(f"{path}: holds no starts ({one_line(error)[:100]}); make it anew") from None


def clips_world(step: Step, store: Store, length: int) -> World | None:
    """Held-out clips of a store for a pre-trained model; None where it has none of `length` frames."""
    gap = step.spec.frame_gap
    clips = store.clips(SPLIT, min_length=length, gap=gap)
    if not len(clips):
        return None
    chosen, wider = (clips[evenly_spaced_indices(len(clips), count)] for count in (CLIPS, AXES_CLIPS))
    shown, more = (
        store.read_many(store.clip_start[some], length, strides=store.strides(gap)[some])
        for some in (chosen, wider)
    )
    names = store.clip_index["label"].to_pylist()
    return video_world(step, shown, [str(names[clip] or "") for clip in chosen], more)


def video_world(step: Step, frames: Frames, labels: list[str], wider: Frames) -> World:
    """Clips (C, T, 64, 64, 3) for a pre-trained model, whose axes are of the actions inferred in `wider`."""
    about, arrays = describe(step, "none", labels), observe(step, frames, None)
    found = infer(step, wider)
    if found is not None:
        arrays |= principal_axes(found.reshape(-1, found.shape[-1])) | {"pairs": infer_pairs(step, frames)}
        about |= {"controls": "latent", "discrete": step.spec.action_kind == "discrete"}
    return World(about, arrays)


def describe(step: Step, controls: str, labels: list[str]) -> dict[str, Any]:
    """What a world says of itself."""
    sizes = {"stage": step.spec.stage, "classes": step.spec.discrete, "action_dim": step.action_dim}
    return sizes | {"controls": controls, "discrete": False, "labels": labels}


def episodes_world(step: Step, config: Config, *, episodes: int = EPISODES) -> World:
    """Episodes of the agent, the first of its evaluation, for a fine-tuned model."""
    gl.ensure()
    assert step.agent is not None
    seed = config.seed
    with make_env_of(step.described, config) as simulator:
        env = PixelEnv(simulator, seed=episode_seed(RngStream.EVALUATION_EPISODES, seed))
        played = [play(env, step.agent, episode=n, seed=seed, keep_frames=True) for n in range(episodes)]
    length = min(LONGEST, *(len(episode.actions) + 1 for episode in played))
    frames = np.stack([episode.frames[:length] for episode in played if episode.frames is not None])
    actions = np.stack([episode.actions[: length - 1] for episode in played])
    return robot_world(step, frames, actions)


def robot_world(step: Step, frames: Frames, actions: npt.NDArray[np.float32]) -> World:
    """Episodes (C, T, 64, 64, 3) and the robot's actions between their frames (C, T-1, A)."""
    about = describe(step, "robot", [f"episode {number}" for number in range(len(frames))])
    return World(about, observe(step, frames, actions) | {"actions": actions})


@torch.no_grad()
def observe(step: Step, frames: Frames, actions: npt.NDArray[np.float32] | None) -> Arrays:
    """Frames (C, T, 64, 64, 3), and the modes of the states that filtering them leads to."""
    images = normalise(torch.from_numpy(frames))
    led = None
    if actions is not None:
        given = torch.from_numpy(actions)
        led = torch.cat([given.new_zeros(len(given), 1, given.shape[-1]), given], 1)
    seen = step.model.observe(images, first_steps(*images.shape[:2]), led, sample=False)
    _, context = step.model.encode(images[:, :OBSERVED])
    judged = step.judge(step.model.feature(seen.post))
    tensors = dict(zip(("reward", "value", "policy"), judged, strict=False)) | {"deter": seen.post["deter"]}
    tensors |= {f"context{i}": value for i, value in enumerate(context)}
    stoch = seen.post["stoch"].argmax(-1).int().numpy()
    return {"frames": frames, "stoch": stoch} | {name: value.numpy() for name, value in tensors.items()}


@torch.no_grad()
def infer(step: Step, frames: Frames) -> npt.NDArray[np.float32] | None:
    """The latent actions between each frame of clips (C, T, …) and the next (C, T-1, A); None without any."""
    found = step.model.infer_actions(normalise(torch.from_numpy(frames)), first_steps(*frames.shape[:2]))
    return None if found is None else found.numpy()


def infer_pairs(step: Step, frames: Frames) -> npt.NDArray[np.float32]:
    """The latent action from each frame of a clip to each other one, or itself: (C, T, T, A)."""
    length = frames.shape[1]
    pairs = np.stack(np.meshgrid(np.arange(length), np.arange(length), indexing="ij"), -1).reshape(-1, 2)
    rows = [infer(step, clip[pairs]) for clip in frames]
    return np.stack([row.reshape(length, length, -1) for row in rows if row is not None])


def principal_axes(actions: npt.NDArray[np.float32]) -> Arrays:
    """`mean` (A) and `axes` (≤ 4, A) of actions (N, A): the directions of most variance, a deviation long."""
    mean = actions.mean(0)
    _, sizes, directions = np.linalg.svd(actions - mean, full_matrices=False)
    directions *= np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])[:, None]
    axes = directions[:AXES] * (sizes[:AXES, None] / np.sqrt(len(actions)))
    return {"mean": mean, "axes": axes.astype(np.float32)}
