"""Frames on their way to the model and back."""

from __future__ import annotations

import torch

from prelar.model.images import denormalise, first_steps, normalise


def test_images_survive_the_way_to_the_model_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = normalise(frames)
    assert images.shape == (1, 3, 16, 16)
    assert images.min() == -0.5 and images.max() == 0.5
    assert torch.equal(images[0, :, 2, 3], frames[0, 2, 3].float() / 255 - 0.5)
    assert torch.equal(denormalise(images), frames)
    assert torch.equal(
        denormalise(torch.tensor([9.0, -9.0]).view(2, 1, 1)).flatten(), torch.tensor([255, 0]).byte()
    )


def test_sequences_begin_at_their_first_step() -> None:
    assert first_steps(2, 3).tolist() == [[True, False, False]] * 2
