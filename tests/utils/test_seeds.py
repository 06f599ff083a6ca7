"""Random streams differ by purpose and by every number."""

from __future__ import annotations

import torch

from prelar.utils.seeds import RngStream, episode_seed, generator, seed_torch


def test_no_two_purposes_draw_the_same() -> None:
    keys = [(stream, *numbers) for stream in RngStream for numbers in ((0, 0), (0, 1), (1, 0))]
    first = [generator(*key).integers(2**60) for key in keys]
    assert len(set(first)) == len(keys)
    assert [generator(*key).integers(2**60) for key in keys] == first


def test_torch_is_seeded_by_purpose_too() -> None:
    drawn = []
    for stream in (*RngStream, *RngStream):
        seed_torch(stream, 3, 4)
        drawn.append(torch.rand(()).item())
    assert drawn[: len(RngStream)] == drawn[len(RngStream) :]
    assert len(set(drawn)) == len(RngStream)


def test_kinds_of_episodes_have_seeds_of_their_own_that_stay() -> None:
    """The numbers are what a run of before with the same seed had."""
    kinds = [stream for stream in RngStream if stream.name.endswith("_EPISODES")]
    assert len({episode_seed(kind, seed) for seed in range(3) for kind in kinds}) == 3 * len(kinds)
    assert [episode_seed(kind, 0) for kind in kinds] == [
        2968811710,
        3964924996,
        3141116543,
        2613022947,
        1874364848,
        161328693,
    ]
    assert [int(stream) for stream in RngStream if stream not in kinds] == [1, 2, 3, 4, 5, 6, 7, 8]
