"""Segments: whole, inside their clips, each clip once an epoch, and the same whenever they are asked for."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.sampler import SegmentSampler
from prelar.utils.errors import UserError

LENGTHS = [4, 9, 6, 30, 5, 12, 7, 3]
LENGTH = 5
RATES = [12.0, 24.0, 6.0, 29.97, 1000.0, 12.0, 0.5, 12.0]
GAPS = st.floats(0.001, 2)
BEFORE = "a78f03df988cb095cc6d539c77dc436438b78eeade63f385d47abcb4f45d979b"
"""Digest of the first twelve batches, as they were before there was a gap."""


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
            row = {"id": str(number), "split": split, "fps": RATES[number]}
            writer.append(frames, row, actions=actions)
        return writer.finish({"source": {}, "resize": "rule", "ffmpeg": "7"})


def sampler(store: Store, **changes: Any) -> SegmentSampler:
    return SegmentSampler(store, **{"length": LENGTH, "batch": 4, "seed": 1, **changes})


def test_a_batch_holds_consecutive_frames_of_its_clips(store: Store) -> None:
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


def test_the_robots_actions_are_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are an array as long as the store, which pre-training makes no use of."""
    read: list[str] = []
    monkeypatch.setattr(store._readers["actions"], "read", lambda *span: read.append("actions"))
    assert set(sampler(store).at(0)) == {"image", "is_first", "clip", "start"} and store.has("actions")
    assert read == []


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


def test_without_a_gap_batches_are_those_of_before(store: Store) -> None:
    digest = hashlib.sha256()
    for step in range(12):
        for name, part in sorted(sampler(store).at(step).items()):
            digest.update(name.encode() + part.numpy().tobytes())
    assert digest.hexdigest() == BEFORE


@settings(max_examples=60, deadline=None)
@given(gap=GAPS, length=st.integers(2, 6), seed=st.integers(0, 3), step=st.integers(0, 50))
def test_frames_of_a_segment_lie_a_gap_apart_in_one_clip(
    store: Store, gap: float, length: int, seed: int, step: int
) -> None:
    """By the clip's rate: to half a frame, or one frame apart where a frame lasts longer than the gap."""
    assume(len(store.clips("train", min_length=length, gap=gap)))
    batch = sampler(store, gap=gap, length=length, seed=seed).at(step)
    for row in range(4):
        clip, start = int(batch["clip"][row]), int(batch["start"][row])
        stride = max(1, round(gap * RATES[clip]))
        assert stride == 1 or abs(stride / RATES[clip] - gap) <= 0.5001 / RATES[clip]
        expected = [start + number * stride for number in range(length)]
        assert expected[-1] < LENGTHS[clip]
        assert batch["image"][row, :, 0, 0, 0].tolist() == [clip] * length
        assert batch["image"][row, :, 0, 1, 0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(gap=GAPS, length=st.integers(2, 6))
def test_an_epoch_takes_the_clips_that_hold_the_time(store: Store, gap: float, length: int) -> None:
    """Or the message tells a gap at which so many clips as it says do."""
    fits = [
        number
        for number, frames in enumerate(LENGTHS[:-1])
        if (length - 1) * max(1, round(gap * RATES[number])) < frames
    ]
    if fits:
        whole = sampler(store, gap=gap, length=length, batch=1)
        drawn = [int(whole.segments(step)[0][0]) for step in range(whole.num_clips)]
        assert sorted(drawn) == fits
        return
    with pytest.raises(UserError) as refused:
        sampler(store, gap=gap, length=length)
    told = re.search(r"(\d+) of 7 clips have \d frames at a gap of (\S+) s or less", str(refused.value))
    assert told and float(told[2]) < gap
    assert sampler(store, gap=float(told[2]), length=length).num_clips == int(told[1]) > 0


def test_every_start_of_a_clip_is_drawn_with_a_gap(store: Store) -> None:
    whole = sampler(store, batch=1, gap=0.25, length=3)
    seen: dict[int, set[int]] = {}
    for step in range(whole.num_clips * 200):
        clips, starts = whole.segments(step)
        seen.setdefault(int(clips[0]), set()).add(int(starts[0]))
    assert seen == {2: {0, 1}, 3: set(range(16)), 5: set(range(6)), 6: set(range(5))}


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    seed=st.integers(0, 3),
    gap=st.sampled_from([None, 0.1]),
)
def test_a_step_is_a_pure_function_of_seed_and_step(
    store: Store, steps: list[int], seed: int, gap: float | None
) -> None:
    used = sampler(store, seed=seed, gap=gap)
    for step in steps:
        fresh = sampler(store, seed=seed, gap=gap)
        assert [part.tolist() for part in used.segments(step)] == [
            part.tolist() for part in fresh.segments(step)
        ]


def test_another_seed_gives_another_order(store: Store) -> None:
    orders = {str([sampler(store, seed=seed).segments(s) for s in range(5)]) for seed in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("gap", [None, 0.1])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_global_batch_without_overlap(
    store: Store, world: int, gap: float | None
) -> None:
    for step in range(7):
        parts = [sampler(store, rank=rank, world=world, gap=gap).at(step) for rank in range(world)]
        for name, whole in sampler(store, gap=gap).at(step).items():
            assert torch.equal(torch.cat([part[name] for part in parts]), whole)


def test_clips_that_tell_no_rate_are_counted_and_refused(tmp_path: Path) -> None:
    rates = [12.0, None, float("nan"), 0.0, -1.0, float("inf")]
    with StoreWriter(tmp_path / "x.zarr") as writer:
        for number, fps in enumerate(rates):
            frames = np.zeros((9, 64, 64, 3), dtype=np.uint8)
            writer.append(frames, {"id": f"clip {number}", "split": "train", "fps": fps})
        silent = writer.finish({})
    with pytest.raises(
        UserError, match=r"5 of 6 clips tell no rate .*clip 1 is one, .*frame_gap = 0\.25 .*demos\.fps"
    ):
        sampler(silent, gap=0.25)
    assert sampler(silent).num_clips == 6


def test_what_cannot_be_sampled_is_refused_in_one_line(store: Store) -> None:
    with pytest.raises(
        UserError, match=r"split train: no clip has 31 frames, the longest has 30; lower length"
    ):
        sampler(store, length=31)
    with pytest.raises(UserError, match="no clip has 31 frames, the longest has 30; lower length"):
        sampler(store, length=31, gap=1)
    with pytest.raises(UserError, match="split test: holds no clip"):
        SegmentSampler(store, length=3, batch=1, seed=0, split="test")
    with pytest.raises(UserError, match="batch = 4: not divisible among 3 processes"):
        sampler(store, world=3)
