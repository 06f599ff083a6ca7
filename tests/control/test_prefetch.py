"""Batches read ahead: what they hold is settled by the steps of a run, not by time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prelar.control.replay import Batch, BatchPrefetcher, Replay
from tests.control.test_replay import episode, make


def feed(replay: Replay) -> BatchPrefetcher:
    return BatchPrefetcher(replay, batch=6, length=5, seed=3, pinned=False)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def drawn(replay: Replay, update: int) -> Batch:
    found = replay.sample(batch=6, length=5, seed=3, update=update)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def test_batches_are_those_of_the_replay(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for number in range(3):
        replay.add(episode(number, 20))
    ahead = feed(replay)
    for update in range(4):
        assert same(ahead.take(update), drawn(replay, update))
    ahead.close()


def test_a_batch_is_settled_when_the_one_before_is_taken(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    ahead = feed(replay)
    ahead.take(0)
    settled = drawn(replay, 1)
    for number in range(1, 4):
        replay.add(episode(number, 20))
    assert not same(settled, drawn(replay, 1))
    assert same(ahead.take(1), settled)
    assert same(ahead.take(2), drawn(replay, 2))
    ahead.close()


def test_a_restored_feed_goes_on_with_what_was_settled(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    first = feed(replay)
    first.take(0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.close()
    settled = drawn(replay, 1)
    replay.add(episode(1, 20))
    second = feed(replay)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(second.take(1), settled)
    second.close()


def test_batches_are_whole_tensors(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    ahead = feed(replay)
    batch = ahead.take(0)
    assert {name: value.dtype for name, value in batch.items()} == {
        "image": torch.uint8,
        "action": torch.float32,
        "reward": torch.float32,
        "is_first": torch.bool,
    }
    assert all(value.is_contiguous() and value.shape[:2] == (6, 5) for value in batch.values())
    np.testing.assert_array_equal(batch["is_first"].sum(1), np.ones(6))
    ahead.close()
