"""Does the action matter? What is imagined under the true action, against what is under another clip's.

The difference of the two in PSNR is the measure of controllability that Genie (Bruce et al., 2024) brought
in. A latent action is inferred from the frame that it leads to, so that another clip's may bring its outcome
along as well as its motion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prelar.evaluation.prediction import LEAST_ERROR
from prelar.model.images import first_steps, normalise
from prelar.model.rssm import State
from prelar.model.world_model import WorldModel
from prelar.utils.frames import Frames

Doubles = npt.NDArray[np.float64]

CHANGED = 0.1
"""Least change of a pixel's brightest channel, of a range of 1, from the last frame seen: it moves, then."""
RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Controllability:
    """How far the action decides what is imagined, of N clips, by clip and over all.

    gain: PSNR in dB of the next frame under the clip's own action less that under another clip's, mean over
    the clip's pairs: (N,). low, high: 95% interval of its mean, clips drawn anew with replacement. pairs: how
    many there were of all clips. changed, changed_swapped: mean squared error of open-loop prediction over
    the pixels that change, under the clip's own actions and under another clip's.
    """

    gain: Doubles
    low: float
    high: float
    pairs: int
    changed: float
    changed_swapped: float


@torch.no_grad()
def controllability(
    model: WorldModel,
    frames: Frames,
    *,
    observed: int,
    device: torch.device,
    actions: npt.NDArray[np.float32] | None = None,
    seed: int = 0,
) -> Controllability:
    """Measure a model on N clips of T frames, uint8 (N, T, 64, 64, 3), each against the one after it.

    `actions` (N, T, A) are the robot's, the one that led to each frame, for a fine-tuned model; None: those
    that the model infers. The first `observed` frames are seen before anything is imagined; modes are taken.
    Raises `ValueError` for fewer than two clips.
    """
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} clip has no other one to take actions from")
    images = normalise(torch.from_numpy(frames).to(device))
    given = None if actions is None else torch.from_numpy(actions).to(device)
    seen = model.observe(images, first_steps(len(images), images.shape[1], device), given, sample=False)
    _, context = model.encode(images[:, :observed])
    fed = seen.action if given is None else given
    own, other = fed, fed.roll(-1, 0)

    def decode(state: State) -> Tensor:
        return model.decode(model.feature(state)[:, None], context)[:, 0].float().clamp(-0.5, 0.5)

    def next_frame(step: int, action: Tensor) -> Tensor:
        before = {key: value[:, step - 1] for key, value in seen.post.items()}
        return decode(model.imagine_step(before, action[:, step], sample=False))

    steps = range(observed, images.shape[1])
    gain = [
        _psnr(next_frame(step, own), images[:, step]) - _psnr(next_frame(step, other), images[:, step])
        for step in steps
    ]
    moves = (images[:, observed:] - images[:, observed - 1 : observed]).abs().amax(2, keepdim=True) > CHANGED
    errors = []
    for action in (own, other):
        state = {key: value[:, observed - 1] for key, value in seen.post.items()}
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, step in enumerate(steps):
            state = model.imagine_step(state, action[:, step], sample=False)
            total += ((decode(state) - images[:, step]).square() * moves[:, number]).double().sum()
        errors.append(float(total / (3 * moves.sum()).clamp_min(1)))
    by_clip = torch.stack(gain, 1).double().mean(1).cpu().numpy()
    low, high = interval(by_clip, seed=seed)
    return Controllability(by_clip, low, high, len(frames) * len(steps), *errors)


def _psnr(guess: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of pictures (B, 3, H, W) of a range of 1: (B,)."""
    return -10 * (guess - truth).square().mean((1, 2, 3)).clamp_min(LEAST_ERROR).log10()


def interval(values: Doubles, *, seed: int = 0) -> tuple[float, float]:
    """Ends of the 95% percentile-bootstrap interval of the mean of independent values (N,)."""
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values[picks].mean(1), [tail, 1 - tail])
    return float(low), float(high)
