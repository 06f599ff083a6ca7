"""A trained world model in a user's own program: `prelar.load`.

model = prelar.load("data/pretrain")
seen = model.encode(frames)
film = model.decode(model.imagine(seen, actions))
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prelar.methods import build_model, restore
from prelar.model.images import denormalise, first_steps, normalise
from prelar.model.rssm import State
from prelar.model.spec import ModelSpec
from prelar.model.vision import Context
from prelar.model.world_model import WorldModel
from prelar.train.checkpoint import load_parts
from prelar.utils import hub
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME, Frames

Floats = npt.NDArray[np.float32]

STAGES = ("pretrain", "finetune")
CHUNK = 256
FILES = ("config.json", "*.safetensors")


@dataclass(frozen=True)
class Imagery:
    """States of B sequences over T steps, filtered from frames or imagined.

    Attributes:
        features: float32 (B, T, F), or (T, F) where one sequence was given: what heads and policy see.
        actions: float32 (B, T-1, A), or (T-1, A): the latent actions inferred between the frames; None for
            models that infer none, and in imagination.
    """

    features: Floats
    actions: Floats | None
    _state: State
    _context: Context
    _single: bool


class Loaded:
    """A trained world model.

    `spec` says what it is, `stage` what made it, `revision` which of the hub's commits it is, if any.
    """

    def __init__(self, model: WorldModel, revision: str | None = None) -> None:
        self.model, self.stage, self.spec = model, model.spec.stage, model.spec
        self.revision = revision

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @functools.cached_property
    def action_dim(self) -> int:
        """Numbers of an action that `imagine` takes: the robot's after fine-tuning, else a latent one's."""
        return int(self.spec.robot_action_dim if self.stage == "finetune" else self.model.action.action_dim)

    @torch.no_grad()
    def encode(self, frames: Frames, actions: npt.ArrayLike | None = None) -> Imagery:
        """Filter a video.

        Args:
            frames: uint8 (T, 64, 64, 3), or (B, T, 64, 64, 3).
            actions: the robot's actions between them, (T-1, A) or (B, T-1, A), which fine-tuned models need.

        Raises:
            ValueError: shapes or types do not fit.
        """
        images, single = self._images(frames)
        batch, length = images.shape[:2]
        is_first = first_steps(batch, length, self.device)
        led: Tensor | None = None
        if self.stage == "finetune":
            given = self._actions(
                actions, batch, "frames of a fine-tuned model need the actions between them"
            )
            if given.shape[1] != length - 1:
                raise ValueError(
                    f"{length} frames have {length - 1} actions between them, not {given.shape[1]}"
                )
            led = torch.cat([given.new_zeros(batch, 1, self.action_dim), given], 1)
        seen = self.model.observe(images, is_first, led, sample=False)
        found = self.model.infer_actions(images, is_first) if length > 1 else None
        last = {key: value[:, -1] for key, value in seen.post.items()}
        return self._imagery(seen.post, last, seen.context, single, found)

    @torch.no_grad()
    def imagine(self, seen: Imagery, actions: npt.ArrayLike | int, *, sample: bool = False) -> Imagery:
        """Go on from the last step under actions (H, A), or (B, H, A), without looking.

        A number H stands for so many actions of zeros: enough for models that are pre-trained without any
        (APV, ContextWM). `sample` draws states from torch's global generator instead of taking modes. Raises
        `ValueError` where shapes do not fit, or there is no action.
        """
        batch = len(next(iter(seen._state.values())))
        if isinstance(actions, int | np.integer):
            steps = torch.zeros(batch, max(int(actions), 0), self.action_dim, device=self.device)
        else:
            steps = self._actions(actions, batch, "")
        if not steps.shape[1]:
            raise ValueError("actions: none; give 1 or more to imagine")
        state, states = seen._state, []
        for action in steps.unbind(1):
            state = self.model.imagine_step(state, action, sample)
            states.append(state)
        rolled = {key: torch.stack([one[key] for one in states], 1) for key in states[0]}
        return self._imagery(rolled, states[-1], seen._context, seen._single, None)

    @torch.no_grad()
    def decode(self, imagery: Imagery) -> Frames:
        """The frames of states: uint8 (B, T, 64, 64, 3), or (T, 64, 64, 3)."""
        features = imagery.features[None] if imagery._single else imagery.features
        frames: Frames = (
            denormalise(self.model.decode(torch.from_numpy(features).to(self.device), imagery._context))
            .cpu()
            .numpy()
        )
        return frames[0] if imagery._single else frames

    @torch.no_grad()
    def infer(self, frames: Frames, *, stride: int = 1) -> Floats:
        """The latent action between each frame of a video and the one `stride` later.

        uint8 (T, 64, 64, 3) to (T - stride, A), or (0, A) for `stride` frames or fewer. `spec.stride(fps)`
        tells the stride of pre-training in a video of so many frames a second. A long video is gone through
        in pieces. Raises `UserError` where the model infers no actions, `ValueError` for several videos at
        once, frames that are none and a stride below 1.
        """
        if np.ndim(frames) != 4 or stride < 1:
            raise ValueError(
                f"frames: {np.shape(frames)}, stride = {stride}; give one video, uint8 (T, 64, 64, 3), and a "
                "stride of 1 or more"
            )
        found = np.empty((max(len(frames) - stride, 0), self.action_dim), np.float32)
        for offset in range(min(stride, max(len(found), 1))):
            found[offset::stride] = self._infer(frames[offset::stride])
        return found

    def _infer(self, frames: Frames) -> Floats:
        """The latent action between each frame and the next: uint8 (T, 64, 64, 3) to (T-1, A)."""
        found = [np.empty((0, self.action_dim), np.float32)]
        for begin in range(0, max(len(frames) - 1, 1), CHUNK):
            first = max(begin - (self.spec.action_window - 2), 0)
            images, _ = self._images(frames[first : begin + CHUNK + 1])
            inferred = self.model.infer_actions(images, first_steps(1, images.shape[1], self.device))
            if inferred is None:
                raise UserError(
                    f"method = {self.spec.method}, stage {self.stage}: infers no actions from video; "
                    "pre-train with method prelar"
                )
            found.append(inferred[0, begin - first :].float().cpu().numpy())
        return np.concatenate(found)

    def _imagery(
        self, state: State, last: State, context: Context, single: bool, actions: Tensor | None
    ) -> Imagery:
        def plain(value: Tensor) -> Floats:
            array: Floats = value.float().cpu().numpy()
            return array[0] if single else array

        return Imagery(
            plain(self.model.feature(state)),
            None if actions is None else plain(actions),
            last,
            context,
            single,
        )

    def _images(self, frames: Frames) -> tuple[Tensor, bool]:
        array = np.asarray(frames)
        if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-3:] != FRAME or not array.size:
            raise ValueError(
                f"frames: {array.dtype} {array.shape}; give uint8 (T, 64, 64, 3) or (B, T, 64, 64, 3), "
                "of one frame or more"
            )
        single = array.ndim == 4
        batch = torch.from_numpy(np.require(array[None] if single else array, requirements=["C", "W"]))
        return normalise(batch.to(self.device)), single

    def _actions(self, actions: npt.ArrayLike | None, batch: int, remedy: str) -> Tensor:
        if actions is None:
            raise ValueError(f"actions: none; {remedy}")
        given = torch.as_tensor(np.require(actions, np.float32, "W"), device=self.device)
        given = given[None] if given.ndim == 2 else given
        if given.ndim != 3 or given.shape[-1] != self.action_dim or len(given) not in (1, batch):
            raise ValueError(
                f"actions: {tuple(given.shape)}; give (H, {self.action_dim}), or as many for each sequence"
            )
        return given.expand(batch, -1, -1)


def load(checkpoint: str | Path, device: str = "cpu", revision: str | None = None) -> Loaded:
    """Load a checkpoint of pre-training or fine-tuning: a folder, or `org/name` of the hub.

    A text is the name of a repository where neither it nor its first part is a folder here; `revision` is a
    commit, a tag or a branch of it, None: the newest. Only tensors and JSON are read, nothing in the files is
    run. Raises `UserError` where there is no checkpoint that this version reads.
    """
    folder = Path(checkpoint)
    if hub.is_name(checkpoint):
        folder = hub.fetch(str(checkpoint), revision=revision, patterns=FILES, kind="model")
        revision = folder.name
    elif revision is not None:
        raise UserError(f"revision = {revision}: {folder} is a folder, which has none; leave it out")
    parts, described = load_parts(folder)
    stage = described.get("stage")
    if stage not in STAGES or "model" not in described:
        raise UserError(f"{folder}: its config.json names no model; give the folder that a stage has written")
    spec = ModelSpec.read(described["model"], stage=stage, source=str(folder))
    model = restore(lambda: build_model(spec), lambda made: made.load_state(parts))
    return Loaded(model.to(device).eval(), revision)
