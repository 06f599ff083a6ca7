"""Random streams: numbers are drawn as a function of a purpose and of what counts within it.

The purpose stands first, so that no two of them ever draw the same stream from the same seed.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class RngStream(IntEnum):
    """What numbers are drawn for, and the numbers that follow."""

    STEP = 1  # seed, step
    HOOK = 2  # seed, step
    CLIPS = 3  # seed, epoch; of a mixture's sources but the first its number too
    REPLAY = 4  # seed, update
    EPISODE = 5  # seed, episode
    PROBE = 6  # seed, update
    OFFLINE = 7  # seed, number of the fit, and the update within it
    MIXTURE = 8  # seed, block of rows
    TRAINING_EPISODES = 16  # seed, as of the other kinds of episodes below
    CURVE_EPISODES = 17
    EVALUATION_EPISODES = 18
    PROBE_EPISODES = 19
    OFFLINE_EPISODES = 20
    RECORDED_EPISODES = 21


def generator(stream: RngStream, *numbers: int) -> np.random.Generator:
    """A generator of numpy's for a purpose and its numbers, none negative."""
    return np.random.default_rng([int(stream), *numbers])


def seed_torch(stream: RngStream, *numbers: int) -> None:
    """Seed torch's global generators for a purpose and its numbers, none negative."""
    entropy = np.random.SeedSequence([int(stream), *numbers])
    seed = int(entropy.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():  # torch.manual_seed keeps a traceback of every call where there is none
        torch.cuda.manual_seed_all(seed)


def episode_seed(stream: RngStream, seed: int) -> int:
    """The simulator's seed for all episodes of one kind in a run with `seed`."""
    kind = stream - RngStream.TRAINING_EPISODES
    return int(np.random.SeedSequence([seed, kind]).generate_state(1)[0])
