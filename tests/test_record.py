"""Recorded episodes: the same in a store and as videos, with the actions that lead from frame to frame."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from prelar import record
from prelar.envs import make_env
from prelar.store.store import Store
from prelar.utils.errors import UserError
from prelar.utils.seeds import RngStream, episode_seed
from tests.test_evaluate import configure, evaluate, make_checkpoints, place  # noqa: F401  a fixture


@pytest.mark.parametrize("random", [pytest.param(False, marks=pytest.mark.long), True])
def test_actions_of_a_recorded_episode_lead_to_its_frames(place: Path, random: bool) -> None:  # noqa: F811
    make_checkpoints("dreamerv2", "reach")
    config = configure(method="dreamerv2")
    folder, limit = place / "videos", config.evaluate.time_limit
    assert limit is not None
    length = limit + 1
    record.run(config, evaluate.FINETUNE, folder, store="loop", episodes=2, random=random)
    store = Store.open(place / "data/loop.zarr")
    assert (store.num_clips, store.clip_length.tolist()) == (2, [length, length])
    frames, actions = store.read(length, length), np.asarray(store.array("actions")[length:])
    assert not actions[-1].any() and np.abs(actions[:-1]).min(axis=1).max() > 0
    with make_env("reach", time_limit=limit) as simulator:
        simulator.reset(episode_seed(RngStream.RECORDED_EPISODES, config.seed), 1)
        assert np.array_equal(simulator.render(), frames[0])
        for action, frame in zip(actions[:-1], frames[1:], strict=True):
            simulator.step(action)
            assert np.array_equal(simulator.render(), frame)
    video = imageio_ffmpeg.read_frames(str(folder / "reach/episode-0001.mp4"))
    assert next(video)["fps"] == pytest.approx(80, abs=0.5)
    seen = np.stack([np.frombuffer(one, np.uint8).reshape(64, 64, 3) for one in video])
    assert len(seen) == length and np.abs(seen.astype(int) - frames).mean() < 6
    with pytest.raises(UserError, match="holds something already"):
        record.run(config, evaluate.FINETUNE, folder, store=None, episodes=1, random=False)
    with pytest.raises(UserError, match="nowhere to record to"):
        record.run(config, evaluate.FINETUNE, None, store=None, episodes=1, random=False)
