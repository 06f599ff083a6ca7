"""A store of the size of Something-Something V2: what opening it and reading from it take of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from prelar.store.schema import index_path
from prelar.store.store import Store
from prelar.train.sampler import SegmentSampler
from tests import full_size


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("full") / "full.zarr"
    full_size.build(path)
    yield path


def test_opening_reads_the_index_and_two_arrays_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    preadv = os.preadv

    def counted(handle: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(handle, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    store = Store.open(path)
    assert store.num_clips == full_size.CLIPS and store.num_frames > 9_000_000
    assert sum(read) == 2 * 8 * full_size.CLIPS
    assert index_path(path).stat().st_size < 20 << 20


def test_clips_of_a_split_and_a_label_are_found(path: Path) -> None:
    store = Store.open(path)
    chosen = store.clips("validation", "label 3", min_length=25)
    numbers = np.arange(full_size.CLIPS)
    wanted = (numbers % 4 == 3) & (numbers % full_size.LABELS == 3) & (store.clip_length >= 25)
    assert chosen.tolist() == np.flatnonzero(wanted).tolist()
    sampler = SegmentSampler(store, length=25, batch=8, seed=0, split="validation", label="label 3")
    assert sampler.num_clips == len(chosen)
    assert {int(clip) for step in range(50) for clip in sampler.segments(step)[0]} <= set(chosen.tolist())


def test_random_segments_of_a_store_beyond_memory_leave_the_process_small(path: Path) -> None:
    """300 MB are read from over 100 GB of frames, into batches that go again."""
    store = Store.open(path)
    assert store.num_frames * 64 * 64 * 3 > 100e9
    sampler = SegmentSampler(store, length=25, batch=16, seed=0)
    for step in range(3):
        sampler.at(step)
    before = psutil.Process().memory_info().rss
    for step in range(60):
        sampler.at(step)
    assert psutil.Process().memory_info().rss - before < 60 << 20
