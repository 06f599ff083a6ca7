"""Recorded episodes: the same in a store and as videos, with the actions that lead from frame to frame."""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from prelar import record
from prelar.__main__ import run_record
from prelar.control.rollout import Episode, play
from prelar.envs import make_env
from prelar.store.store import Store
from prelar.utils import files
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
    for occupied in (folder, folder / "reach/episode-0001.mp4"):
        with pytest.raises(UserError, match="holds something already"):
            record.run(config, evaluate.FINETUNE, occupied, store=None, episodes=1, random=False)
    with pytest.raises(UserError, match="nowhere to record to"):
        record.run(config, evaluate.FINETUNE, None, store=None, episodes=1, random=False)


def test_an_episode_is_written_before_the_next_begins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """So that memory does not grow with their number."""
    make_checkpoints("dreamerv2", "reach")
    played: list[weakref.ref[Episode]] = []
    alive = []

    def noted(*given: Any, **options: Any) -> Episode:
        alive.append(sum(ref() is not None for ref in played))
        episode = play(*given, **options)
        played.append(weakref.ref(episode))
        return episode

    monkeypatch.setattr(record, "play", noted)
    config = configure(method="dreamerv2")
    record.run(config, evaluate.FINETUNE, place / "videos", store="loop", episodes=4, random=True)
    assert len(alive) == 4 and max(alive) <= 1


def test_both_places_are_locked(place: Path) -> None:  # noqa: F811
    config = configure(method="dreamerv2")
    given = {"checkpoint": evaluate.FINETUNE, "folder": Path("videos"), "store": "loop", "episodes": 1}
    for held in ("videos", "data/loop.zarr"):
        with files.exclusive(held), pytest.raises(UserError, match=f"{held}: process .* is writing it"):
            run_record(config, argparse.Namespace(**given, random=True))
