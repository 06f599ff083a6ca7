"""Several stores as one: a mixture draws by weight, and a union is like the store of all its parts."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.store.joined import MEMBERS, join
from prelar.store.store import Member, Store
from prelar.store.writer import StoreWriter
from prelar.train.sampler import SegmentSampler, Shares
from prelar.utils.errors import UserError

LENGTHS = {"few": [9, 6, 14], "many": [7, 30, 5, 12, 8, 11, 20, 6], "other": [40, 8]}
RATES = {"few": 12.0, "many": 24.0, "other": 6.0}
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=3)


def write(path: Path, names: list[str]) -> Store:
    """A store of the clips of `names`; each frame knows its source, its clip and its number."""
    with StoreWriter(path, arrays={"actions": 2}) as writer:
        for name in names:
            for number, length in enumerate(LENGTHS[name]):
                frames = np.zeros((length, 64, 64, 3), np.uint8)
                frames[:, 0, 0] = list(LENGTHS).index(name), number, 0
                frames[:, 0, 1] = np.arange(length)[:, None]
                row = {"id": f"{name}-{number}", "split": "train", "fps": RATES[name], "camera": "front"}
                writer.append(frames, row, actions=frames[:, 0, 0, :2].astype(np.float32))
            writer.append(None, {"id": f"{name}-broken", "reason": "no video"})
        return writer.finish({"source": {}})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for name in LENGTHS:
        write(folder / f"{name}.zarr", [name])
    write(folder / "whole.zarr", list(LENGTHS))
    return folder


def joined(shelf: Path, path: Path, weights: dict[str, float | None]) -> Store:
    members = [Member(name, Store.open(shelf / f"{name}.zarr"), weight) for name, weight in weights.items()]
    return join(path, members, [str(shelf / f"{name}.zarr") for name in weights])


def sampler(store: Store, **changes: Any) -> SegmentSampler:
    return SegmentSampler(store, **{"length": 4, "batch": 4, "seed": 1, **changes})


def same(one: SegmentSampler, other: SegmentSampler, steps: int = 25) -> None:
    for step in range(steps):
        here, there = one.at(step), other.at(step)
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize("gap", [None, 0.1])
def test_a_mixture_of_one_source_is_that_source(shelf: Path, tmp_path: Path, gap: float | None) -> None:
    for number, weight in enumerate((1.0, 0.3)):
        store = joined(shelf, tmp_path / f"{number}.zarr", {"many": weight})
        same(sampler(store, gap=gap), sampler(Store.open(shelf / "many.zarr"), gap=gap))


def test_a_union_is_the_store_of_all_its_parts(shelf: Path, tmp_path: Path) -> None:
    union, whole = (
        joined(shelf, tmp_path / "u.zarr", dict.fromkeys(LENGTHS)),
        Store.open(shelf / "whole.zarr"),
    )
    assert union.index.equals(whole.index) and union.shapes() == whole.shapes()
    assert np.array_equal(union.pairs, whole.pairs)
    assert np.array_equal(union.read(0, union.num_frames), whole.read(0, whole.num_frames))
    assert np.array_equal(union.array("actions"), whole.array("actions"))
    same(sampler(union), sampler(whole))
    with pytest.raises(IndexError):
        union.read(union.num_frames - 1, 2)
    nested = join(tmp_path / "n.zarr", [Member("0", union), Member("1", whole)], ["u.zarr", str(whole.path)])
    again = np.concatenate([whole.read(0, whole.num_frames)] * 2)
    assert np.array_equal(nested.read(0, nested.num_frames), again)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, batch=st.integers(1, 20), seed=st.integers(0, 3))
def test_every_source_has_its_share_and_its_rows_in_turn(weights: list[float], batch: int, seed: int) -> None:
    shares = Shares(weights, batch, seed)
    rows = [shares.row(row) for row in range(400)]
    exact = [Fraction(weight) for weight in weights]  # a share just below a whole number is no whole number
    for source, weight in enumerate(exact):
        numbers = [number for of, number in rows if of == source]
        block = batch * math.ceil(sum(exact) / min(exact) / batch)
        assert sorted(numbers)[: max(0, len(numbers) - block)] == list(range(max(0, len(numbers) - block)))
        for end in range(block, 400, block):
            own = sum(of == source for of, _ in rows[:end])
            assert abs(own - end * weight / sum(exact)) < 1
    fresh = Shares(weights, batch, seed)
    assert [fresh.row(row) for row in (399, 7, 230, 7)] == [rows[row] for row in (399, 7, 230, 7)]


def test_a_mixture_draws_by_weight_and_each_source_in_epochs(shelf: Path, tmp_path: Path) -> None:
    store = joined(shelf, tmp_path / "m.zarr", {"few": 1.0, "many": 2.0, "other": 1.0})
    drawn = [int(clip) for step in range(24) for clip in sampler(store).segments(step)[0]]
    names = [store.clip_index["id"][clip].as_py().partition("/")[0] for clip in drawn]
    assert Counter(names) == {"few": 24, "many": 48, "other": 24}
    assert all(Counter(names[at : at + 4]) == {"few": 1, "many": 2, "other": 1} for at in range(0, 96, 4))
    for name, lengths in LENGTHS.items():
        own = [clip for clip, of in zip(drawn, names, strict=True) if of == name]
        epochs = [own[at : at + len(lengths)] for at in range(0, len(own), len(lengths))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    orders = {str([sampler(store, seed=seed).segments(step) for step in range(4)]) for seed in range(3)}
    assert len(orders) == 3
    for step in (0, 3, 11):
        halves = [sampler(store, rank=rank, world=2).at(step)["image"] for rank in range(2)]
        assert torch.equal(torch.cat(halves), sampler(store).at(step)["image"])


def test_a_gap_is_the_same_time_in_each_source(shelf: Path, tmp_path: Path) -> None:
    store = joined(shelf, tmp_path / "m.zarr", {"few": 1.0, "many": 1.0})
    batches = [sampler(store, gap=0.17, length=3).at(step) for step in range(6)]
    for image in torch.cat([batch["image"] for batch in batches]):
        rate = RATES[list(LENGTHS)[int(image[0, 0, 0, 0])]]
        assert np.diff(image[:, 0, 1, 0]).tolist() == [round(0.17 * rate)] * 2


def test_names_tell_the_source_of_a_mixture_and_arrays_are_those_of_all(shelf: Path, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "bare.zarr") as writer:
        writer.append(np.ones((9, 64, 64, 3), np.uint8), {"id": "few-0", "split": "train", "fps": 12.0})
        bare = writer.finish({})
    members = [Member("few", Store.open(shelf / "few.zarr"), 1.0), Member("bare", bare, 1.0)]
    store = join(tmp_path / "m.zarr", members, [str(shelf / "few.zarr"), "bare.zarr"])
    assert not store.has("actions") and store.members[0].store.has("actions")
    assert store.clip_index["id"].to_pylist()[-1] == "bare/few-0"
    assert store.clip_index["camera"].to_pylist() == ["few/front"] * 3 + [None]


def test_a_member_that_changed_or_went_is_told(shelf: Path, tmp_path: Path) -> None:
    write(tmp_path / "own.zarr", ["few"])
    join(tmp_path / "m.zarr", [Member("own", Store.open(tmp_path / "own.zarr"), 1.0)], ["own.zarr"])
    path = tmp_path / "own.zarr/frames/c/0/0/0/0"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"own\.zarr is another store than the one that was joined"):
        Store.open(tmp_path / "m.zarr")
    (tmp_path / "own.zarr").rename(tmp_path / "gone.zarr")
    with pytest.raises(UserError, match=r"own\.zarr: no such store"):
        Store.open(tmp_path / "m.zarr")


def test_a_source_without_a_segment_is_named(shelf: Path, tmp_path: Path) -> None:
    store = joined(shelf, tmp_path / "m.zarr", {"few": 1.0, "many": 1.0})
    with pytest.raises(UserError, match=r"few\.zarr.*no clip has 15 frames, the longest has 14"):
        sampler(store, length=15)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(schema=2),
        lambda told: told.update(schema=True),
        lambda told: told.update(members=[]),
        lambda told: told.update(members=[3]),
        lambda told: told["members"][0].update(weight=0),
        lambda told: told["members"][0].update(weight=None),
        lambda told: told["members"][0].update(weight="1"),
        lambda told: told["members"][0].update(store=["x"]),
        lambda told: told.update(index_sha256="0"),
    ],
)
def test_a_damaged_joined_store_is_refused_in_one_line(shelf: Path, tmp_path: Path, change: Any) -> None:
    joined(shelf, tmp_path / "m.zarr", {"few": 1.0, "many": 1.0})
    path = tmp_path / "m.zarr" / MEMBERS
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="join") as failure:
        Store.open(tmp_path / "m.zarr")
    assert "\n" not in str(failure.value)
