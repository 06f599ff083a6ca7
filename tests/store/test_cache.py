"""Blocks of a bucket's stores on the local disk: the same frames, within the bound, however it stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from prelar.store import cache
from prelar.store.cache import BLOCK, Blocks, CachedReader
from prelar.store.remote import Objects, publish
from prelar.store.schema import index_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.sampler import SegmentSampler
from prelar.utils.errors import UserError
from tests.bucket import bucket

SIZES = {"a/0": 3 * BLOCK + 77, "a/1": BLOCK, "b/0": 5}


class Far:
    """Objects of random bytes that count what is asked of them."""

    def __init__(self) -> None:
        draw = random.Random(0)
        self.objects = {name: draw.randbytes(size) for name, size in SIZES.items()}
        self.asked: list[tuple[str, int, int]] = []

    def fetch(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        for name, begin, end in ranges:
            self.asked += [(name, at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK)]
        return [self.objects[name][begin:end] for name, begin, end in ranges]


def reader(far: Far, folder: Path, most: int = 100 * BLOCK) -> tuple[CachedReader, Blocks]:
    kept = Blocks(folder, most)
    return CachedReader(kept, "s", SIZES.__getitem__, far.fetch), kept


def read(one: CachedReader, far: Far, pieces: Sequence[tuple[str, int, int]]) -> None:
    views = [bytearray(size) for _, _, size in pieces]
    one.fill([(name, at, memoryview(view)) for (name, at, _), view in zip(pieces, views, strict=True)])
    for (name, at, size), view in zip(pieces, views, strict=True):
        assert bytes(view) == far.objects[name][at : at + size]


def pieces(seed: int, count: int = 8, longest: int = 2 * BLOCK) -> list[tuple[str, int, int]]:
    draw, found = random.Random(seed), []
    for _ in range(count):
        name = draw.choice(list(SIZES))
        at = draw.randrange(SIZES[name])
        found.append((name, at, draw.randint(1, min(longest, SIZES[name] - at))))
    return found


def lies(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("most", [0, BLOCK + 9, 3 * BLOCK, 100 * BLOCK])
def test_what_is_read_is_the_same_within_the_bound(tmp_path: Path, most: int) -> None:
    far = Far()
    one, kept = reader(far, tmp_path, most)
    for seed in range(30):
        one.prefetch([(name, at, memoryview(bytearray(size))) for name, at, size in pieces(seed + 1)])
        read(one, far, pieces(seed))
    read(one, far, pieces(31))
    assert one._pool is not None
    one._pool.shutdown(wait=True)
    assert lies(tmp_path) == kept.total <= most
    if most == 100 * BLOCK:
        assert len(far.asked) == len(set(far.asked)), "nothing is fetched twice"


def test_a_second_process_finds_what_the_first_kept(tmp_path: Path) -> None:
    far = Far()
    for seed in range(9):
        read(reader(far, tmp_path)[0], far, pieces(seed))
    del far.asked[:]
    for seed in range(9):
        read(reader(far, tmp_path)[0], far, pieces(seed))
    assert far.asked == []


def test_what_a_kill_or_a_user_left_is_fetched_anew(tmp_path: Path) -> None:
    far = Far()
    whole = [(name, 0, size) for name, size in SIZES.items()]
    read(reader(far, tmp_path)[0], far, whole)
    names = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    os.truncate(names[0], 10)
    names[1].unlink()
    names[2].write_bytes(names[2].read_bytes() + b"x")
    (names[0].parent / "s.0.abc.4194305.partial").write_bytes(b"half")
    del far.asked[:]
    one, kept = reader(far, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    read(one, far, whole)
    assert len(far.asked) == 3 and lies(tmp_path) == kept.total == sum(SIZES.values())
    for path in names:
        path.unlink()  # while it is open
    read(one, far, whole)
    os.truncate(names[3], 10)
    read(one, far, whole)
    assert lies(tmp_path) == sum(SIZES.values())


def test_a_full_disk_and_a_short_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = Far()
    one, kept = reader(far, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda self, content: (_ for _ in ()).throw(OSError(28, "full")))
        read(one, far, pieces(0))
    assert kept.total == lies(tmp_path) == 0
    far.objects["a/1"] = far.objects["a/1"][:-1]
    with pytest.raises(UserError, match="a/1: cut short; publish the store again"):
        read(one, far, [("a/1", 0, 9)])


def test_threads_read_the_same_and_the_bound_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 1000)
    far = Far()
    one, kept = reader(far, tmp_path, most=9_000)
    draws = [random.Random(seed) for seed in range(6)]

    def work(draw: random.Random) -> None:
        for _ in range(20):
            wanted = pieces(draw.randrange(1 << 30), count=4, longest=2_000)
            one.prefetch([(name, at, memoryview(bytearray(size))) for name, at, size in wanted])
            read(one, far, wanted)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(draws)) as pool:
            list(pool.map(work, draws))
    finally:
        sys.setswitchinterval(interval)
    assert one._pool is not None
    one._pool.shutdown(wait=True)
    assert lies(tmp_path) == kept.total <= 9_000


def test_a_prefetch_that_failed_is_asked_for_once_more(tmp_path: Path) -> None:
    far = Far()
    one, _ = reader(far, tmp_path)
    whole, far.objects = far.objects, {}
    one.prefetch([(name, 0, memoryview(bytearray(size))) for name, size in SIZES.items()])
    assert one._pool is not None
    one._pool.shutdown(wait=True)
    far.objects = whole
    read(one, far, [(name, 0, size) for name, size in SIZES.items()])


def test_a_process_that_forks_while_a_thread_writes_reads_on(tmp_path: Path) -> None:
    far = Far()
    one, kept = reader(far, tmp_path)
    holds, forked = threading.Event(), threading.Event()

    def write() -> None:
        with kept._lock:
            holds.set()
            forked.wait()

    writer = threading.Thread(target=write)
    writer.start()
    holds.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        read(one, far, pieces(0))
        os._exit(0)
    forked.set()
    writer.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_store_in_a_bucket_trains_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(tmp_path / "x.zarr") as writer:
        for number in range(6):
            frames = np.random.default_rng(number).integers(0, 256, (20, 64, 64, 3), np.uint8)
            writer.append(frames, {"id": str(number), "split": "train", "fps": 10.0})
        near = writer.finish({})
    asked: list[object] = []
    ranges = Objects.read_ranges

    def counted(self: Objects, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        asked.append(wanted)
        return ranges(self, wanted)

    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    with bucket() as url:
        published = publish(url, near.path, index_path(Path(near.path)))["url"]
        monkeypatch.setenv(cache.GIGABYTES, "1")
        for gap in (None, 0.2):
            with monkeypatch.context() as patch:
                patch.setattr(Objects, "read_ranges", counted)
                far = Store.open(published)
                asked.clear()
                for step in [*range(8), 3, 0]:
                    here, there = (
                        SegmentSampler(store, length=5, batch=3, seed=0, gap=gap).at(step)
                        for store in (near, far)
                    )
                    assert all(torch.equal(here[name], there[name]) for name in here)
            assert bool(asked) == (gap is None), "what was read once is here"
        assert (tmp_path / "cache" / Path(published).name).is_dir()
        monkeypatch.setenv(cache.GIGABYTES, "0")
        assert not Store.open(published).is_cached and not near.is_cached
        monkeypatch.setenv(cache.GIGABYTES, "lots")
        with pytest.raises(UserError, match="PRELAR_CACHE_GB = 'lots': give a number"):
            Store.open(published)
