"""Frames as they are stored, images as models take them, and where sequences begin."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(frames: Tensor) -> Tensor:
    """Frames uint8 (…, H, W, 3), on any device, as models take them: float (…, 3, H, W) in [-0.5, 0.5]."""
    return frames.movedim(-1, -3).float().div_(255).sub_(0.5)


def denormalise(images: Tensor) -> Tensor:
    """Images float (…, 3, H, W) in [-0.5, 0.5] as frames uint8 (…, H, W, 3); what lies outside is clipped."""
    return images.float().add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def first_steps(batch: int, length: int, device: torch.device | None = None) -> Tensor:
    """`is_first` of `batch` sequences that begin at their first of `length` steps: bool (batch, length)."""
    is_first = torch.zeros(batch, length, dtype=torch.bool, device=device)
    is_first[:, 0] = True
    return is_first
