"""Batches read ahead: what they hold is settled by the steps of a run, not by time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from prelar.control.replay import Replay
from prelar.train.prefetch import Batch, BatchPrefetcher
from prelar.utils.errors import UserError
from tests.control.test_replay import episode, make

CPU = torch.device("cpu")


def tenfold(step: int) -> Batch:
    return {"x": torch.tensor(10 * step)}


def of_replay(replay: Replay) -> BatchPrefetcher[list[int]]:
    return BatchPrefetcher(
        lambda starts: replay.read(starts, 5),
        choose=lambda update: replay.choose(batch=6, length=5, seed=3, update=update),
        device=CPU,
    )


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def drawn(replay: Replay, update: int) -> Batch:
    return replay.read(replay.choose(batch=6, length=5, seed=3, update=update), 5)


def test_batches_are_those_of_their_steps_in_any_order() -> None:
    with BatchPrefetcher(tenfold, choose=int, device=CPU, depth=3) as batches:
        found = [int(batches.take(step)["x"]) for step in (0, 1, 2, 7, 8, 3, 3, 100)]
    assert found == [0, 10, 20, 70, 80, 30, 30, 1000]


def test_it_works_ahead_of_its_use_but_not_beyond_its_depth() -> None:
    fetched = threading.Semaphore(0)
    seen: list[int] = []

    def read(step: int) -> Batch:
        seen.append(step)
        fetched.release()
        return tenfold(step)

    with BatchPrefetcher(read, choose=int, device=CPU, depth=2) as batches:
        batches.take(0)
        assert all(fetched.acquire(timeout=30) for _ in range(3))
    assert seen == [0, 1, 2]


def test_an_error_of_reading_is_raised_at_its_step() -> None:
    def read(step: int) -> Batch:
        if step == 2:
            raise UserError("step 2")
        return tenfold(step)

    with BatchPrefetcher(read, choose=int, device=CPU, depth=2) as batches:
        assert [int(batches.take(step)["x"]) for step in (0, 1)] == [0, 10]
        with pytest.raises(UserError, match="step 2"):
            batches.take(2)


def test_a_batch_is_settled_when_the_one_before_is_taken(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    with of_replay(replay) as batches:
        assert same(batches.take(0), drawn(replay, 0))
        settled = drawn(replay, 1)
        for number in range(1, 4):
            replay.add(episode(number, 20))
        assert not same(settled, drawn(replay, 1))
        assert same(batches.take(1), settled)
        assert same(batches.take(2), drawn(replay, 2))


def test_restored_it_goes_on_with_what_was_settled(tmp_path: Path) -> None:
    replay = make(tmp_path)
    replay.add(episode(0, 20))
    with of_replay(replay) as first:
        first.take(0)
        torch.save(first.state_dict(), tmp_path / "state.pt")
    settled = drawn(replay, 1)
    replay.add(episode(1, 20))
    with of_replay(replay) as second:
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same(second.take(1), settled)
