"""Segments: whole, inside their clips, each clip once an epoch, and the same whenever they are asked for."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.store.sampler import Prefetch, SegmentSampler
from prelar.store.store import Store, StoreWriter
from prelar.utils.errors import UserError

LENGTHS = [4, 9, 6, 30, 5, 12, 7, 3]
LENGTH = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Clips of known frames: pixel 0 holds the clip's number, pixel 1 the frame's. The last is held out."""
    path = tmp_path_factory.mktemp("store") / "x.zarr"
    with StoreWriter(path, arrays={"actions": 2}) as writer:
        for number, length in enumerate(LENGTHS):
            frames = np.zeros((length, 64, 64, 3), dtype=np.uint8)
            frames[:, 0, 0] = number
            frames[:, 0, 1] = np.arange(length)[:, None]
            actions = np.stack([np.full(length, number), np.arange(length)], 1).astype(np.float32)
            split = "validation" if number == len(LENGTHS) - 1 else "train"
            writer.append(frames, {"id": str(number), "split": split}, actions=actions)
        return writer.finish({"source": {}, "resize": "rule", "ffmpeg": "7"})


def sampler(store: Store, **changes: int) -> SegmentSampler:
    return SegmentSampler(store, **{"length": LENGTH, "batch": 4, "seed": 1, **changes})


def test_a_batch_holds_consecutive_frames_of_its_clips_with_their_actions(store: Store) -> None:
    for step in range(20):
        batch = sampler(store).at(step)
        assert batch["image"].shape == (4, LENGTH, 64, 64, 3) and batch["image"].dtype == torch.uint8
        assert batch["is_first"].tolist() == [[True] + [False] * (LENGTH - 1)] * 4
        for row in range(4):
            clip, start = int(batch["clip"][row]), int(batch["start"][row])
            assert start + LENGTH <= LENGTHS[clip]
            expected = list(range(start, start + LENGTH))
            assert batch["image"][row, :, 0, 0, 0].tolist() == [clip] * LENGTH
            assert batch["image"][row, :, 0, 1, 0].tolist() == expected
            assert batch["actions"][row].tolist() == [[clip, frame] for frame in expected]


def test_an_epoch_takes_every_long_clip_of_the_split_once_and_the_next_in_another_order(store: Store) -> None:
    whole = sampler(store, batch=1)
    eligible = [number for number, length in enumerate(LENGTHS[:-1]) if length >= LENGTH]
    assert whole.num_clips == len(eligible)
    epochs = [
        [int(whole.segments(epoch * len(eligible) + i)[0][0]) for i in range(len(eligible))]
        for epoch in range(6)
    ]
    assert all(sorted(epoch) == eligible for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_every_start_of_a_clip_is_drawn(store: Store) -> None:
    whole = sampler(store, batch=1)
    seen: dict[int, set[int]] = {}
    for step in range(6 * 250):
        clips, starts = whole.segments(step)
        seen.setdefault(int(clips[0]), set()).add(int(starts[0]))
    assert seen == {n: set(range(LENGTHS[n] - LENGTH + 1)) for n in (1, 2, 3, 4, 5, 6)}


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(0, 200), min_size=1, max_size=12), seed=st.integers(0, 3))
def test_a_step_is_a_pure_function_of_seed_and_step(store: Store, steps: list[int], seed: int) -> None:
    used = sampler(store, seed=seed)
    for step in steps:
        fresh = sampler(store, seed=seed)
        assert [part.tolist() for part in used.segments(step)] == [
            part.tolist() for part in fresh.segments(step)
        ]


def test_another_seed_gives_another_order(store: Store) -> None:
    orders = {str([sampler(store, seed=seed).segments(s) for s in range(5)]) for seed in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_global_batch_without_overlap(store: Store, world: int) -> None:
    for step in range(7):
        parts = [sampler(store, rank=rank, world=world).segments(step) for rank in range(world)]
        joined = [np.concatenate([part[i] for part in parts]).tolist() for i in range(2)]
        assert joined == [part.tolist() for part in sampler(store).segments(step)]


def test_what_cannot_be_sampled_is_refused_in_one_line(store: Store) -> None:
    with pytest.raises(
        UserError, match=r"split train: no clip has 31 frames, the longest has 30; lower length"
    ):
        sampler(store, length=31)
    with pytest.raises(UserError, match="split test: holds no clip"):
        SegmentSampler(store, length=3, batch=1, seed=0, split="test")
    with pytest.raises(UserError, match="batch = 4: not divisible among 3 processes"):
        sampler(store, world=3)


def test_prefetch_gives_what_fetch_gives_in_any_order() -> None:
    with Prefetch(lambda step: step * 10, depth=3) as ahead:
        assert [ahead.at(step) for step in (0, 1, 2, 7, 8, 3, 3, 100)] == [0, 10, 20, 70, 80, 30, 30, 1000]


def test_prefetch_works_ahead_of_its_use_but_not_beyond_its_depth() -> None:
    fetched = threading.Semaphore(0)
    seen: list[int] = []

    def fetch(step: int) -> int:
        seen.append(step)
        fetched.release()
        return step

    with Prefetch(fetch, depth=2) as ahead:
        ahead.at(0)
        assert all(fetched.acquire(timeout=30) for _ in range(3))
    assert seen == [0, 1, 2]


def test_an_error_of_fetch_is_raised_at_its_step() -> None:
    def fetch(step: int) -> int:
        if step == 2:
            raise UserError("step 2")
        return step

    with Prefetch(fetch) as ahead:
        assert [ahead.at(0), ahead.at(1)] == [0, 1]
        with pytest.raises(UserError, match="step 2"):
            ahead.at(2)
