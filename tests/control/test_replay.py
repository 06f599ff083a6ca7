"""The replay: whole episodes in, sequences within episodes out, and a state to take up again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prelar.control.replay import Records, Replay, record_type
from prelar.utils.errors import UserError


def episode(number: int, length: int, size: int = 4) -> Records:
    """Step t of episode n has the reward 1000 n + t, and it shows in image and action too."""
    records = np.zeros(length, record_type(2, size))
    records["reward"] = 1000 * number + np.arange(length)
    records["action"] = records["reward"][:, None] + [0.25, 0.5]
    records["image"] = (np.arange(length) + number)[:, None, None, None] % 256
    return records


def make(path: Path, capacity: int = 100, margin: int = 30) -> Replay:
    return Replay(path / "replay.bin", capacity=capacity, margin=margin, action_dim=2, size=4)


def sample(replay: Replay, *, batch: int, length: int, seed: int, update: int) -> dict[str, Any]:
    """The sequences of an update, as arrays."""
    starts = replay.choose(batch=batch, length=length, seed=seed, update=update)
    return {name: value.numpy() for name, value in replay.read(starts, length).items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=12),
    length=st.integers(1, 3),
    seed=st.integers(0),
)
def test_sequences_lie_within_one_episode_held(
    tmp_path: Path, lengths: list[int], length: int, seed: int
) -> None:
    replay = make(tmp_path)
    for number, steps in enumerate(lengths):
        replay.add(episode(number, steps))
    held = len(lengths) - replay.episodes
    assert len(replay) == sum(lengths[held:]) <= 100
    got = sample(replay, batch=8, length=length, seed=seed, update=1)
    number, step = np.divmod(got["reward"].astype(int), 1000)
    assert (np.diff(number, axis=1) == 0).all() and (np.diff(step, axis=1) == 1).all()
    assert (number >= held).all() and (step < np.array(lengths)[number]).all()
    np.testing.assert_array_equal(got["action"][..., 1], got["reward"] + 0.5)
    np.testing.assert_array_equal(got["image"][..., 3, 3, 2], (number + step) % 256)
    assert got["is_first"][:, 0].all() and not got["is_first"][:, 1:].any()
    assert {name: value.dtype.name for name, value in got.items()} == {
        "image": "uint8",
        "action": "float32",
        "reward": "float32",
        "is_first": "bool",
    }
    assert all(value.flags.c_contiguous and value.shape[:2] == (8, length) for value in got.values())
    replay.close()


def test_ends_are_favoured_as_in_the_reference(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    starts = sample(replay, batch=4000, length=5, seed=0, update=0)["reward"][:, 0].astype(int)
    shares = np.bincount(starts, minlength=16) / 4000
    assert len(shares) == 16
    np.testing.assert_allclose(shares[:15], 1 / 21, atol=0.02)
    np.testing.assert_allclose(shares[15], 6 / 21, atol=0.03)


def test_sampling_is_a_pure_function_of_seed_and_update(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for number in range(3):
        replay.add(episode(number, 30))

    def draw(seed: int, update: int) -> bytes:
        return sample(replay, batch=6, length=4, seed=seed, update=update)["reward"].tobytes()

    first = draw(1, 2)
    assert draw(1, 3) != first and draw(2, 2) != first
    assert draw(1, 2) == first


def test_a_state_is_taken_up_after_later_steps_overwrote_old_ones(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=60, margin=40)
    for number in range(9):
        replay.add(episode(number, 20))
    state = replay.state_dict()
    wanted = sample(replay, batch=50, length=6, seed=0, update=7)
    for number in (90, 91):
        replay.add(episode(number, 20))
    replay.close()
    again = make(tmp_path, capacity=60, margin=40)
    again.load_state_dict(state)
    got = sample(again, batch=50, length=6, seed=0, update=7)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)
    assert (wanted["reward"] >= 6000).all()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    state = replay.state_dict()
    (tmp_path / "replay.bin").unlink()
    with pytest.raises(UserError, match=r"replay\.bin: too short; delete"):
        make(tmp_path).load_state_dict(state)


def test_short_episodes_cannot_be_drawn_from(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 5))
    with pytest.raises(UserError, match="no episode of 6 steps"):
        sample(replay, batch=1, length=6, seed=0, update=0)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = make(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"replay\.bin: disk full"):
        replay.add(episode(0, 5))
    assert len(replay) == 0


def test_the_resident_set_does_not_grow_with_the_file(tmp_path: Path) -> None:
    replay = Replay(tmp_path / "replay.bin", capacity=8000, margin=0, action_dim=4)
    block = np.zeros(500, replay.records)
    replay.add(block)
    before = psutil.Process().memory_info().rss
    for _ in range(15):
        replay.add(block)
    for update in range(20):
        sample(replay, batch=8, length=50, seed=0, update=update)
    assert (tmp_path / "replay.bin").stat().st_size == 8000 * replay.records.itemsize
    assert psutil.Process().memory_info().rss - before < 30e6


def test_a_million_steps_fit_in_13_gigabytes() -> None:
    assert 1_020_000 * record_type(4).itemsize < 13e9
