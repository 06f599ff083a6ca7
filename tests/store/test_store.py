"""The store: same bytes as zarr-python, readable by others, whole after any interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prelar.store import schema
from prelar.store.schema import INDEX_SCHEMA, Layout, index_path, pair_index
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME

ATTRS = {"source": {"clips": 3}, "resize": "rule", "ffmpeg": "7"}
slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 64 frames in chunks of 8, so that few frames cross many borders."""
    monkeypatch.setattr(schema, "FRAMES", Layout("uint8", (64, 64, 3), chunk=8, shard=64))
    monkeypatch.setattr(schema, "per_frame", lambda width: Layout("float32", (width,), chunk=16, shard=64))
    monkeypatch.setattr(schema, "PAIRS", Layout("int64", (), chunk=16, shard=128))


def clip(number: int, length: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)


def actions(number: int, length: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(length, 4)).astype(np.float32)


def build(path: Path, lengths: list[int], with_actions: bool = False) -> Store:
    with StoreWriter(path, arrays={"actions": 4} if with_actions else None) as writer:
        for number, length in enumerate(lengths):
            row = {"id": str(number), "split": "train", "label": "reach", "label_id": 0}
            if length == 0:
                writer.append(None, {**row, "reason": "not a video"})
            else:
                extra = {"actions": actions(number, length)} if with_actions else {}
                writer.append(clip(number, length), row, **extra)
        return writer.finish(ATTRS)


def tree(path: Path) -> dict[str, bytes]:
    return {**contents(path), "index": index_path(path).read_bytes()}


def contents(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def by_zarr(path: Path, store: Store) -> None:
    """The same arrays as zarr-python writes them, asked for the same layout."""
    arrays = {name: store._readers[name] for name in store.shapes()}
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.create_group(path, attributes=store.attrs)
        for name, reader in arrays.items():
            layout = reader.layout
            target = group.create_array(
                name,
                shape=(reader.items, *layout.item),
                dtype=layout.dtype,
                chunks=(layout.chunk, *layout.item),
                shards=(layout.shard, *layout.item),
                compressors=None,
                fill_value=0,
            )
            target[:] = reader.read(0, reader.items)


@pytest.mark.parametrize("lengths", [[30, 0, 64, 1, 100], [64], [128, 8], [1]])
def test_bytes_equal_what_zarr_python_writes(tmp_path: Path, small: None, lengths: list[int]) -> None:
    store = build(tmp_path / "a.zarr", lengths, with_actions=True)
    by_zarr(tmp_path / "b.zarr", store)
    ours, theirs = contents(tmp_path / "a.zarr"), contents(tmp_path / "b.zarr")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name


def test_bytes_equal_zarr_python_at_the_real_layout(tmp_path: Path) -> None:
    store = build(tmp_path / "a.zarr", [40, 25])
    by_zarr(tmp_path / "b.zarr", store)
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def test_other_programs_read_the_frames(tmp_path: Path, small: None) -> None:
    lengths = [30, 64, 1, 100]
    build(tmp_path / "a.zarr", lengths)
    wanted = np.concatenate([clip(number, length) for number, length in enumerate(lengths)])
    assert np.array_equal(zarr.open_group(tmp_path / "a.zarr", mode="r")["frames"][:], wanted)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a.zarr" / "frames")}}
    assert np.array_equal(tensorstore.open(spec, read=True).result().read().result(), wanted)


@slow
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=8), data=st.data())
def test_clips_pairs_and_segments(
    tmp_path: Path, small: None, lengths: list[int], data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
    (tmp_path / "a.journal").unlink(missing_ok=True)
    store = build(tmp_path / "a.zarr", lengths)
    held = [(number, length) for number, length in enumerate(lengths) if length]
    assert store.clip_length.tolist() == [length for _, length in held]
    assert store.num_frames == sum(lengths)
    clip_of = np.repeat(np.arange(len(held)), store.clip_length)
    pairs = store.pairs
    assert len(pairs) == sum(length - 1 for _, length in held)
    assert len(set(pairs.tolist())) == len(pairs)
    assert all(clip_of[t] == clip_of[t + 1] for t in pairs)
    assert store.index["status"].to_pylist() == ["ok" if length else "bad" for length in lengths]
    for number, (seed, length) in enumerate(held):
        count = data.draw(st.integers(1, length))
        offset = data.draw(st.integers(0, length - count))
        start = int(store.clip_start[number]) + offset
        assert np.array_equal(store.read(start, count), clip(seed, length)[offset : offset + count])


@slow
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=8), stops=st.sets(st.integers(0, 7), max_size=4)
)
def test_interrupted_writing_ends_in_the_same_bytes(
    tmp_path: Path, small: None, lengths: list[int], stops: set[int]
) -> None:
    for folder in ("one", "two"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    build(tmp_path / "one" / "a.zarr", lengths, with_actions=True)
    path = tmp_path / "two" / "a.zarr"
    for stop in [*sorted(stop for stop in stops if stop < len(lengths)), None]:
        with StoreWriter(path, arrays={"actions": 4}) as writer:
            for number in range(writer.count, len(lengths)):
                row = {"id": str(number), "split": "train", "label": "reach", "label_id": 0}
                length = lengths[number]
                if length:
                    writer.append(clip(number, length), row, actions=actions(number, length))
                else:
                    writer.append(None, {**row, "reason": "not a video"})
                if number == stop:
                    break
                writer.commit()
            if stop is None:
                writer.finish(ATTRS)
                writer.finish(ATTRS)
    assert tree(path) == tree(tmp_path / "one" / "a.zarr")


def test_a_torn_journal_line_is_as_never_written(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.zarr"
    with StoreWriter(path) as writer:
        writer.append(clip(0, 5), {"id": "0"})
        writer.commit()
    with path.with_suffix(".journal").open("ab") as handle:
        handle.write(b'[{"id": "1", "frames": 9')
    with StoreWriter(path) as writer:
        assert [row["id"] for row in writer.rows()] == ["0"]
        assert writer.frames == 5


def test_damaged_staging_is_refused(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.zarr"
    with StoreWriter(path) as writer:
        writer.append(clip(0, 5), {"id": "0"})
        writer.commit()
    shard = next((path / "frames" / "c").rglob("0"))
    shutil.rmtree(shard)
    with pytest.raises(UserError, match="damaged"):
        StoreWriter(path)
    with pytest.raises(UserError, match="another layout"):
        StoreWriter(path, arrays={"actions": 4})


def test_read_many_and_optional_arrays(tmp_path: Path, small: None) -> None:
    store = build(tmp_path / "a.zarr", [70, 40], with_actions=True)
    frames = np.concatenate([clip(0, 70), clip(1, 40)])
    starts = [0, 60, 85, 3]
    out = np.zeros((4, 25, 64, 64, 3), dtype=np.uint8)
    assert store.read_many(starts, 25, out) is out
    assert all(np.array_equal(out[i], frames[s : s + 25]) for i, s in enumerate(starts))
    assert np.array_equal(store.array("actions"), np.concatenate([actions(0, 70), actions(1, 40)]))
    assert store.has("actions")
    assert not store.has("gripper")
    with pytest.raises(UserError, match="gripper"):
        store.array("gripper")
    with pytest.raises(IndexError):
        store.read(100, 11)
    with pytest.raises(IndexError):
        store.read(-1, 2)
    with pytest.raises(ValueError, match="out"):
        store.read_many([0], 3, np.zeros((1, 2, 64, 64, 3), dtype=np.uint8))
    begins, strides = [0, 3, 40, 2], np.array([1, 9, 5, 13])
    apart = store.read_many(begins, 4, strides=strides)
    for begin, stride, segment in zip(begins, strides, apart, strict=True):
        assert np.array_equal(segment, store.read(begin, 3 * stride + 1)[::stride])


def test_clips_are_chosen_by_split_label_and_length(tmp_path: Path, small: None) -> None:
    with StoreWriter(tmp_path / "a.zarr") as writer:
        for number, (split, label, length) in enumerate(
            [("train", "a", 30), ("train", None, 10), ("validation", "a", 30), ("train", "b", 25)]
        ):
            writer.append(clip(number, length), {"id": str(number), "split": split, "label": label})
            writer.append(None, {"id": f"bad{number}", "split": "train", "label": "a", "reason": "no"})
        store = writer.finish(ATTRS)
    assert store.clips().tolist() == [0, 1, 2, 3]
    assert store.clips("train", min_length=25).tolist() == [0, 3]
    assert store.clips("train", "a").tolist() == [0]
    assert store.clips("nothing").tolist() == []


def test_a_store_without_clips_opens(tmp_path: Path) -> None:
    store = build(tmp_path / "a.zarr", [0])
    assert (store.num_frames, store.num_clips, len(store.pairs)) == (0, 0, 0)
    assert store.clips().tolist() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "no such store"),
        (lambda p: (p / "zarr.json").unlink(), "incomplete"),
        (lambda p: (p / "zarr.json").write_text("{"), "not JSON"),
        (lambda p: (p / "zarr.json").write_text('{"attributes": {"schema": 99}}'), "schema 99 is newer than"),
        (lambda p: (p / "zarr.json").write_text('{"attributes": {"schema": 0}}'), "schema 0 is older than"),
        (lambda p: (p / "zarr.json").write_text('{"attributes": {}}'), "schema None, so not a store"),
        (lambda p: index_path(p).unlink(), "a.parquet: missing"),
        (lambda p: index_path(p).write_bytes(b"PAR1"), "not the index"),
        (lambda p: shutil.rmtree(p / "pairs"), "lacks pairs"),
        (lambda p: (p / "frames/c/0/0/0/0").unlink(), "cut short"),
        (lambda p: (p / "frames/c/0/0/0/0").write_bytes(b"x"), "cut short"),
        (lambda p: (p / "frames/zarr.json").write_text('{"shape": 3}'), "not an array"),
        (lambda p: (p / "frames/zarr.json").write_text('{"shape": [5, 64, 64, 3]}'), "another version"),
    ],
)
def test_a_damaged_store_is_named(tmp_path: Path, damage: object, message: str) -> None:
    build(tmp_path / "a.zarr", [10])
    damage(tmp_path / "a.zarr")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        Store.open(tmp_path / "a.zarr")


def test_rows_are_checked(tmp_path: Path, small: None) -> None:
    with StoreWriter(tmp_path / "a.zarr") as writer:
        with pytest.raises(ValueError, match="reason"):
            writer.append(None, {"id": "1"})
        with pytest.raises(ValueError, match="no other keys"):
            writer.append(clip(0, 3), {"id": "1", "colour": "red"})
        with pytest.raises(ValueError, match="arrays"):
            writer.append(clip(0, 3), {"id": "1"}, actions=actions(0, 3))
        with pytest.raises(ValueError, match="expected"):
            writer.append(np.zeros((3, 64, 64, 4), dtype=np.uint8), {"id": "1"})
        assert writer.frames == 0


def test_index_has_the_schema(tmp_path: Path) -> None:
    build(tmp_path / "a.zarr", [10, 0])
    table = Store.open(tmp_path / "a.zarr").index
    assert table.schema.equals(INDEX_SCHEMA)
    assert table["start"].to_pylist() == [0, None]
    assert table["reason"].to_pylist() == [None, "not a video"]


@given(lengths=st.lists(st.integers(1, 50), max_size=30))
def test_pairs_never_cross_clips(lengths: list[int]) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    wanted = [s + t for s, n in zip(starts.tolist(), lengths, strict=True) for t in range(n - 1)]
    assert pair_index(starts, sizes).tolist() == wanted


def test_attributes_hold_schema_and_source(tmp_path: Path) -> None:
    build(tmp_path / "a.zarr", [10])
    attrs = json.loads((tmp_path / "a.zarr/zarr.json").read_text())["attributes"]
    assert attrs["schema"] == 1
    assert attrs["resize"] == "rule"


def test_a_row_that_the_index_cannot_hold_is_bad_when_it_is_made(tmp_path: Path) -> None:
    frames = np.zeros((2, *FRAME), np.uint8)
    with StoreWriter(tmp_path / "x.zarr") as writer:
        assert writer.append(frames, {"id": "1", "variation": 2**40, "width": 64}) is None
        assert writer.append(frames, {"id": "2", "label": "a\ud800\x1b\n", "variation": 2**31 - 1}) == 0
        assert writer.append(None, {"id": "\udcff", "episode": -(2**31) - 1, "reason": "torn"}) is None
        rows = writer.finish({}).index.to_pylist()
    assert [(row["id"], row["status"], row["reason"]) for row in rows] == [
        ("1", "bad", "its variation, 1099511627776, is more than the index holds"),
        ("2", "ok", None),
        ("\\udcff", "bad", "torn"),
    ]
    assert [row["variation"] for row in rows] == [None, 2**31 - 1, None] and rows[0]["width"] == 64
    assert rows[1]["label"] == "a\\ud800\\x1b\\n"


def change_json(path: Path, change: object) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    changed = change(held)  # type: ignore[operator]
    path.write_text(json.dumps(held if changed is None else changed), encoding="utf-8")


def change_numbers(path: Path, values: list[int]) -> None:
    held = bytearray(path.read_bytes())
    held[: 8 * len(values)] = np.array(values, "<i8").tobytes()
    path.write_bytes(held)


def change_index(store: Path, change: object) -> None:
    """Replace the index, and the sha256 by which its store knows it."""
    file = index_path(store)
    made = change(pq.read_table(file))  # type: ignore[operator]
    if isinstance(made, bytes):
        file.write_bytes(made)
    else:
        pq.write_table(made, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    change_json(store / "zarr.json", lambda held: held["attributes"].update(index_sha256=digest))


def replaced(name: str, values: list[object], kind: pa.DataType | None = None) -> object:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        column = pa.array(values, kind or table.schema.field(name).type)
        return table.set_column(place, pa.field(name, column.type), column)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 1), "2 items, the index and the frames have 1"),
        (lambda table: pa.concat_tables([table, table]), "2 items, the index and the frames have 4"),
        (replaced("status", ["ok", "bad", "bad"]), "2 items, the index and the frames have 1"),
        (replaced("status", ["ok", "fine", "ok"]), "a status is neither ok nor bad"),
        (replaced("status", [1, 2, 3], pa.int64()), "columns of other types"),
        (replaced("id", ["a", None, "c"]), "no value in a row of id"),
        (replaced("id", [b"a", b"\xff", b"c"], pa.binary()), "columns of other types"),
        (replaced("start", [0, None, 11]), "index and clips differ in start"),
        (replaced("start", [0, None, None]), "index and clips differ in start"),
        (replaced("frames", [12, 0, 9]), "index and clips differ in frames"),
        (lambda table: table.rename_columns(["name", *table.schema.names[1:]]), "another version"),
        (lambda table: b"PAR1" + bytes(100) + bytes([60, 0, 0, 0]) + b"PAR1", "not an index"),
        (lambda table: b"", "not an index"),
    ],
)
def test_an_index_that_does_not_fit_its_store_is_refused(
    tmp_path: Path, change: object, message: str
) -> None:
    build(tmp_path / "a.zarr", [12, 0, 8])
    change_index(tmp_path / "a.zarr", change)
    with pytest.raises(UserError, match=message) as told:
        Store.open(tmp_path / "a.zarr")
    assert str(tmp_path / "a.zarr") in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clip_length", [-1]),
        ("clip_length", [12, 9]),
        ("clip_length", [2**62, 2**62]),
        ("clip_length", [20, 0]),
        ("clip_start", [10**9]),
        ("clip_start", [-1]),
        ("clip_start", [1]),
        ("clip_start", [0, 0]),
    ],
)
def test_clips_outside_of_the_frames_are_refused(tmp_path: Path, name: str, values: list[int]) -> None:
    build(tmp_path / "a.zarr", [12, 0, 8])
    change_numbers(tmp_path / "a.zarr" / name / "c/0", values)
    with pytest.raises(UserError, match=r"a\.zarr: its clips do not lie one after the other"):
        Store.open(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("array", "change", "message"),
    [
        ("", lambda held: held.update(attributes=[]), "attributes that are no object"),
        ("", lambda held: held["attributes"].update(schema=True), "schema True, so not a store"),
        ("", lambda held: held["attributes"].update(schema=[1] * 10**5), "so not a store"),
        ("", lambda held: [], "not an object"),
        ("frames", lambda held: held["shape"].__setitem__(0, 20.0), "not an array"),
        ("frames", lambda held: held["shape"].__setitem__(0, True), "not an array"),
        ("frames", lambda held: held["shape"].__setitem__(0, -1), "not an array"),
        ("frames", lambda held: held["shape"].__setitem__(0, 10**30), "not an array"),
        ("frames", lambda held: held["shape"].__setitem__(0, 10**12), "missing or cut short"),
        ("frames", lambda held: held["shape"].__setitem__(1, 65), "another version"),
        ("frames", lambda held: held.update(shape=[]), "not an array"),
        ("pairs", lambda held: held["shape"].__setitem__(0, 17), "17 items"),
        ("actions", lambda held: held["shape"].__setitem__(1, 10**9), "not an array"),
        ("actions", lambda held: held["shape"].__setitem__(1, 2.0), "not an array"),
        ("actions", lambda held: held.update(shape=[20]), "not an array"),
        ("actions", lambda held: held["shape"].__setitem__(0, 19), "19 items, the index and the frames have"),
    ],
)
def test_metadata_that_lie_are_refused(tmp_path: Path, array: str, change: object, message: str) -> None:
    build(tmp_path / "a.zarr", [12, 0, 8], with_actions=True)
    change_json(tmp_path / "a.zarr" / array / "zarr.json", change)
    with pytest.raises(UserError, match=message) as told:
        Store.open(tmp_path / "a.zarr")
    assert str(tmp_path / "a.zarr") in str(told.value) and "\n" not in str(told.value)


def test_metadata_nested_deep_or_huge_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "a.zarr", [12])
    for content in ("[" * 100_000, '{"a":' * 100_000, " " * (5 << 20), "\ud800"):
        (tmp_path / "a.zarr/frames/zarr.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match=r"frames/zarr\.json"):
            Store.open(tmp_path / "a.zarr")
