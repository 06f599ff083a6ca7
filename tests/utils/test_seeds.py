"""Random streams differ by purpose and by every number."""

from __future__ import annotations

import torch

from prelar.utils.seeds import Stream, generator, seed_torch


def test_no_two_purposes_draw_the_same() -> None:
    keys = [(stream, *numbers) for stream in Stream for numbers in ((0, 0), (0, 1), (1, 0))]
    first = [generator(*key).integers(2**60) for key in keys]
    assert len(set(first)) == len(keys)
    assert [generator(*key).integers(2**60) for key in keys] == first


def test_torch_is_seeded_by_purpose_too() -> None:
    drawn = []
    for stream in (*Stream, *Stream):
        seed_torch(stream, 3, 4)
        drawn.append(torch.rand(()).item())
    assert drawn[: len(Stream)] == drawn[len(Stream) :]
    assert len(set(drawn)) == len(Stream)
