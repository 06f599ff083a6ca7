"""How well a world model foresees video: open-loop prediction, and what predicts without a model.

Copying the last frame seen is hard to beat for a frame or two; the per-pixel median of the training frames is
the picture without what moves, which a model that paints the arm out would match.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from prelar.evaluation.panels import strip, write_png
from prelar.model.images import denormalise, first_steps, normalise
from prelar.train.loop import seed_step
from prelar.utils.frames import Frames
from prelar.utils.tables import write_tsv
from prelar.utils.video_file import side_by_side, write_mp4

Predict = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]

BATCH = 16
LATE = 3
SHOWN = 3
FPS = 8
LEAST_ERROR = 1e-10


@dataclass(frozen=True)
class Prediction:
    """Open-loop prediction of N segments of T frames, of which the first `observed` were seen.

    truth, predicted: uint8 (N, T, 64, 64, 3). model, copy: mean squared error of each predicted frame, pixels
    in [0, 1], averaged over segments: float64 (T - observed,), of the model and of the last frame seen.
    median: of the per-pixel median of training frames, None where there is none.
    """

    truth: Frames
    predicted: Frames
    observed: int
    model: npt.NDArray[np.float64]
    copy: npt.NDArray[np.float64]
    median: npt.NDArray[np.float64] | None = None

    def late(self) -> dict[str, float]:
        """Mean errors from the third frame ahead on, by whose they are; none of a shorter prediction."""
        rows = {"model": self.model, "copy": self.copy, "median": self.median}
        return {
            name: float(errors[LATE - 1 :].mean())
            for name, errors in rows.items()
            if errors is not None and len(errors) >= LATE
        }


def measure(
    predict: Predict,
    truth: Frames,
    *,
    observed: int,
    device: torch.device,
    actions: npt.NDArray[np.float32] | None = None,
    medians: Frames | None = None,
    seed: int = 0,
) -> Prediction:
    """Let a model predict segments and measure its error.

    Args:
        predict: `WorldModel.open_loop`: images (B, T, 3, 64, 64) in [-0.5, 0.5], is_first (B, T), `observed`
            and actions (B, T, A) or None, to images. What lies outside of [-0.5, 0.5] is clipped.
        truth: uint8 (N, T, 64, 64, 3).
        observed: frames that the model sees, 1 to T - 1.
        device: where the model lives.
        actions: (N, T, A), the action that led to each frame; zeros at the start of a segment.
        medians: uint8 (N, 64, 64, 3), the median picture of each segment's camera.
        seed: of what the model draws.

    Raises:
        ValueError: `observed` does not leave a frame to predict.
    """
    if not 1 <= observed < truth.shape[1]:
        raise ValueError(f"observed is {observed}, segments have {truth.shape[1]} frames")
    predicted = np.empty_like(truth)
    errors = np.empty((2, *truth.shape[:2]))
    begins = tqdm(range(0, len(truth), BATCH), desc="evaluate: prediction", unit="batch", disable=None)
    for batch, begin in enumerate(begins):
        chosen = slice(begin, begin + BATCH)
        seed_step(seed, batch)
        frames = torch.from_numpy(truth[chosen]).to(device)
        images = normalise(frames)
        is_first = first_steps(len(images), images.shape[1], device)
        action = None if actions is None else torch.from_numpy(actions[chosen]).to(device)
        guess = predict(images, is_first, observed, action).float().clamp(-0.5, 0.5)
        seen = images[:, observed - 1 : observed]
        for row, other in enumerate((guess, seen)):
            errors[row, chosen] = (images - other).square().mean((-3, -2, -1)).double().cpu().numpy()
        predicted[chosen] = denormalise(guess).cpu().numpy()
    model, copy = errors[:, :, observed:].mean(1)
    median = None
    if medians is not None:
        still = (truth[:, observed:].astype(np.float64) - medians[:, None]) / 255
        median = np.square(still).mean((0, 2, 3, 4))
    return Prediction(truth, predicted, observed, model, copy, median)


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]; at most 100 dB."""
    return -10 * math.log10(max(error, LEAST_ERROR))


def write_prediction(folder: Path, name: str, video: str, prediction: Prediction) -> None:
    """Write `<name>.tsv` (error by frames ahead), `<video>.mp4` with poster, and the strip `<video>.png`."""
    errors = {"model": prediction.model.tolist(), "copy": prediction.copy.tolist()}
    if prediction.median is not None:
        errors["median"] = prediction.median.tolist()
    steps = {"step": list(range(1, len(prediction.model) + 1))}
    decibels = {f"{row}_psnr": [psnr(error) for error in values] for row, values in errors.items()}
    write_tsv(folder / f"{name}.tsv", steps | errors | decibels)
    shown = slice(0, SHOWN)
    frames = side_by_side(
        prediction.truth[shown], prediction.predicted[shown], observed=prediction.observed, factor=2
    )
    write_mp4(folder / f"{video}.mp4", frames, FPS)
    write_png(folder / f"{video}_poster.png", frames[prediction.observed])
    liveliest = int(np.argmax(np.abs(np.diff(prediction.truth.astype(np.int16), axis=1)).mean((1, 2, 3, 4))))
    clip = strip(prediction.truth[liveliest], prediction.predicted[liveliest], prediction.observed)
    write_png(folder / f"{video}.png", clip)
