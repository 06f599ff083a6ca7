"""A store as a LeRobotDataset: read back it is the store, and it is laid out as lerobot's own sets are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import prelar
from flows import demos
from prelar import export_lerobot
from prelar.demos import lerobot
from prelar.export_lerobot import number_stats, picture_stats, pooled_stats
from prelar.store.joined import join
from prelar.store.store import Member, Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE
from tests import frame_code
from tests.conftest import ROOT
from tests.fake_results import moving
from tests.flows.inline import work_inline
from tests.test_api import save_pretrained

GOLDEN = ROOT / "tests/golden/lerobot"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
LIMIT = 6.0
"""Grey levels by which frames may be off on average after the codec; a neighbouring frame is more."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of two cameras, actions, state and three tasks."""
    work_inline(monkeypatch)
    return stored(GOLDEN / "v30_deleted/set", tmp_path / "x.zarr")


def stored(folder: Path, path: Path) -> Store:
    source = lerobot.open_folder(folder)
    with StoreWriter(path, arrays=source.arrays) as writer:
        demos.fill(writer, source, source.jobs(), 1)
        made = writer.finish(source.attributes())
    source.close()
    return made


def described(store: Store) -> dict[Any, tuple[int, int]]:
    """Where each clip lies, by what it shows."""
    rows = store.clip_index.to_pylist()
    return {
        (row["label"], row["camera"], row["frames"], row["split"], row["fps"]): (row["start"], row["frames"])
        for row in rows
    }


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_what_is_read_back_is_the_store(codec: str, store: Store, tmp_path: Path) -> None:
    export_lerobot.run(Path(store.path), tmp_path / "set", codec=codec)
    again = stored(tmp_path / "set", tmp_path / "again.zarr")
    clips, others = described(store), described(again)
    assert clips.keys() == others.keys() and again.index.num_rows == again.num_clips == 8
    for name, (start, length) in clips.items():
        frames, coded = store.read(start, length), again.read(others[name][0], length)
        error = np.abs(frames.astype(np.int16) - coded).mean(axis=(1, 2, 3))
        assert error.max() < LIMIT
        assert [frame_code.read(frame) for frame in coded] == [frame_code.read(frame) for frame in frames]
        for array in ("actions", "state"):
            here, there = (each.array(array) for each in (store, again))
            assert np.array_equal(here[start : start + length], there[others[name][0] :][:length])
    video = next((tmp_path / "set/videos").rglob("*.mp4")).read_bytes()
    assert (b"av01" in video) == (codec == "av1") and not list(tmp_path.glob(".*"))


def test_the_layout_is_that_of_lerobot_s_own_sets(store: Store, tmp_path: Path) -> None:
    """Keys, columns, types and statistics, against a set that lerobot 0.6.1 wrote."""
    export_lerobot.run(Path(store.path), tmp_path / "set")
    own, real = tmp_path / "set", GOLDEN / "v30_deleted/set"
    infos = [json.loads((folder / "meta/info.json").read_text()) for folder in (own, real)]
    assert infos[0].keys() == infos[1].keys()
    assert list(infos[0]["features"]) == list(infos[1]["features"])
    for name, about in infos[1]["features"].items():
        made = infos[0]["features"][name]
        lacking = {"video.fast_decode", "video.video_backend", "video.extra_options"}
        assert made["dtype"] == about["dtype"] and made.keys() == about.keys()
        assert made.get("info", {}).keys() == about.get("info", {}).keys() - lacking
    for file in (EPISODES, "meta/tasks.parquet", "data/chunk-000/file-000.parquet"):
        schemas = [pq.read_schema(folder / file) for folder in (own, real)]
        assert {(field.name, str(field.type)) for field in schemas[0]} == {
            (field.name, str(field.type)) for field in schemas[1]
        }
    assert schemas[0].field("action").type == schemas[1].field("action").type
    notes = [pq.read_schema(folder / "meta/tasks.parquet").pandas_metadata for folder in (own, real)]
    assert notes[0]["index_columns"] == notes[1]["index_columns"] == ["task"]
    stats = [json.loads((folder / "meta/stats.json").read_text()) for folder in (own, real)]
    assert {key: {*about} for key, about in stats[0].items()} == {
        key: {*about} for key, about in stats[1].items()
    }
    for name in ("action", "observation.state"):
        for kind in ("min", "max", "std", "mean", "count"):
            shown = np.array(stats[1][name][kind])
            # Its own last action is not in the store, whose row there is zero.
            assert np.allclose(stats[0][name][kind], shown, atol=0.05 if name == "action" else 1e-6)
    for key in ("observation.images.front", "observation.images.wrist"):
        assert np.shape(stats[0][key]["mean"]) == (3, 1, 1)
        assert np.allclose(stats[0][key]["mean"], stats[1][key]["mean"], atol=0.02)
    rows = pq.read_table(own / EPISODES).to_pylist()
    for before, row in zip([None, *rows], rows, strict=False):
        begin = row["videos/observation.images.front/from_timestamp"]
        assert begin == (before["videos/observation.images.front/to_timestamp"] if before else 0)
        assert row["dataset_to_index"] - row["dataset_from_index"] == row["length"]
    assert pq.ParquetFile(own / "data/chunk-000/file-000.parquet").num_row_groups == len(rows)


def test_latent_actions_are_a_feature_a_camera(store: Store, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "pretrain")
    export_lerobot.run(Path(store.path), tmp_path / "set", codec="h264", checkpoint=tmp_path / "pretrain")
    model = prelar.load(tmp_path / "pretrain")
    rows = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")
    for camera in ("front", "wrist"):
        found = np.array(rows[f"latent_action.{camera}"].to_pylist(), np.float32)
        assert found.shape == (161, 8)
        for episode in set(rows["episode_index"].to_pylist()):
            mine = found[np.array(rows["episode_index"]) == episode]
            (start,) = [
                start for name, (start, length) in described(store).items()
                if name[1] == camera and length == len(mine)
            ]  # fmt: skip
            assert np.allclose(mine[:-1], model.infer(store.read(start, len(mine))), atol=1e-6)
            assert not mine[-1].any()


def test_files_and_chunks_have_borders(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_lerobot, "FRAMES_OF_FILE", 80)
    monkeypatch.setattr(export_lerobot, "FILES_OF_CHUNK", 2)
    export_lerobot.run(Path(store.path), tmp_path / "set", codec="h264")
    found = {str(path.relative_to(tmp_path / "set")) for path in (tmp_path / "set/data").rglob("*.parquet")}
    assert found == {
        f"data/chunk-00{chunk}/file-00{file}.parquet" for chunk, file in ((0, 0), (0, 1), (1, 0))
    }
    again = stored(tmp_path / "set", tmp_path / "again.zarr")
    assert described(again).keys() == described(store).keys()
    for name, (start, length) in described(again).items():
        frames = store.read(*described(store)[name])
        assert [frame_code.read(frame) for frame in again.read(start, length)] == [
            frame_code.read(frame) for frame in frames
        ]


def test_clips_of_a_store_of_videos_are_episodes_of_one_rate(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.zarr") as writer:
        for name, fps, split in (("a", 12.0, "validation"), ("b", 30.0, "train"), ("c", 12.0, "train")):
            writer.append(moving(6), {"id": name, "split": split, "fps": fps, "label": f"Moving {name}"})
        writer.finish({})
    told = r"its clips have 12 \(2 clips\), 30 \(1 clips\); name one with --fps"
    with pytest.raises(UserError, match="--fps -1: not a rate"):
        export_lerobot.run(tmp_path / "x.zarr", tmp_path / "set", fps=-1.0)
    with pytest.raises(UserError, match=told):
        export_lerobot.run(tmp_path / "x.zarr", tmp_path / "set")
    export_lerobot.run(tmp_path / "x.zarr", tmp_path / "set", fps=12.0)
    source = lerobot.open_folder(tmp_path / "set")
    episodes = [(told.task, told.length, told.split) for told in source.dataset.episodes()]
    assert episodes == [("Moving c", 6, "train"), ("Moving a", 6, "validation")]
    assert source.cameras == ("main",) and source.arrays == {}
    told = r"no clip of 25 frames a second, its clips have 12 \(2 clips\), 30 \(1 clips\)"
    with pytest.raises(UserError, match=told):
        export_lerobot.run(tmp_path / "x.zarr", tmp_path / "other", fps=25.0)
    with pytest.raises(UserError, match="exists already"):
        export_lerobot.run(tmp_path / "x.zarr", tmp_path / "set", fps=12.0)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_episodes_of_a_joined_store_s_members_stay_apart(weight: float | None, tmp_path: Path) -> None:
    """In a union and in a mixture, though they have the same task, number and cameras."""
    codes, members = [], []
    for first, member in enumerate(("first", "second")):
        part = make_demos(tmp_path / f"{member}.zarr", ["corner", "top"], [4 + first, 6 + first], 2 * first)
        members.append(Member(member, part, weight))
        codes += [frame_code.read(part.read(int(start), 1)[0]) for start in part.clip_start]
    store = join(tmp_path / "both.zarr", members, ["first.zarr", "second.zarr"])
    export_lerobot.run(Path(store.path), tmp_path / "set", codec="h264")
    source = lerobot.open_folder(tmp_path / "set")
    assert source.cameras == ("corner", "top")
    assert [told.length for told in source.dataset.episodes()] == [4, 6, 5, 7]
    read = [source.collect(job) for job in source.jobs()]
    assert [episode.reason for episode in read] == [None] * 4
    assert [frame_code.read(each.frames[name][0]) for each in read for name in source.cameras] == codes
    source.close()


def test_a_union_s_members_may_have_their_cameras_in_another_order(tmp_path: Path) -> None:
    first = make_demos(tmp_path / "first.zarr", ["top", "corner"], [4])
    second = make_demos(tmp_path / "second.zarr", ["corner", "top"], [5], 1)
    members = [Member("first", first), Member("second", second)]
    store = join(tmp_path / "both.zarr", members, ["first.zarr", "second.zarr"])
    export_lerobot.run(Path(store.path), tmp_path / "set", codec="h264")
    source = lerobot.open_folder(tmp_path / "set")
    read = [source.collect(job) for job in source.jobs()]
    source.close()
    codes = {name: [frame_code.read(each.frames[name][0]) for each in read] for name in ("top", "corner")}
    starts = [
        [frame_code.read(part.read(int(at), 1)[0]) for at in part.clip_start] for part in (first, second)
    ]
    assert codes == {"top": [starts[0][0], starts[1][1]], "corner": [starts[0][1], starts[1][0]]}


def make_demos(path: Path, cameras: list[str], lengths: list[int], first: int = 0) -> Store:
    """A store of one task's episodes; the codes of their frames count episodes from `first` on."""
    with StoreWriter(path) as writer:
        for episode, length in enumerate(lengths):
            for number, camera in enumerate(cameras):
                codes = [frame_code.code_of(first + episode, frame, number) for frame in range(length)]
                row = {"id": f"{episode}-{camera}", "split": "train", "fps": 12.0, "label": "reach"}
                row |= {"task": "reach", "variation": 0, "episode": episode, "camera": camera}
                writer.append(np.stack([frame_code.render(code, SIZE, SIZE) for code in codes]), row)
        return writer.finish({})


@pytest.mark.parametrize("camera", ["/../../../outside", "../outside", "a/b"])
def test_a_camera_s_name_leads_nowhere(camera: str, tmp_path: Path) -> None:
    """Stores come from elsewhere too."""
    make_demos(tmp_path / "store/x.zarr", [camera], [3])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="a set's names have no slash"):
        export_lerobot.run(tmp_path / "store/x.zarr", tmp_path / "sets/new", codec="h264")
    assert set(tmp_path.rglob("*")) == before


def test_an_ffmpeg_that_fails_leaves_no_set(store: Store, tmp_path: Path) -> None:
    failing = tmp_path / "ffmpeg"
    failing.write_text("#!/bin/sh\necho no such encoder >&2\nexit 3\n")
    failing.chmod(0o755)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"ffmpeg failed .no such encoder.; free space, try --codec h264"):
        export_lerobot.run(Path(store.path), tmp_path / "set", ffmpeg=str(failing))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_statistics_are_those_of_the_numbers() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(size=(length, 3)) for length in (4, 9)]
    whole = np.concatenate(parts)
    stats = [number_stats(part) for part in parts]
    pooled = pooled_stats({name: np.array([each[name] for each in stats]) for name in stats[0]})
    assert np.allclose(pooled["mean"], whole.mean(0)) and np.allclose(pooled["std"], whole.std(0))
    assert np.array_equal(pooled["min"], whole.min(0)) and pooled["count"] == [13]
    frames = random.integers(0, 256, (5, 64, 64, 3), np.uint8)
    found, scaled = picture_stats(frames), frames.reshape(-1, 3) / 255
    for name, wanted in (("mean", scaled.mean(0)), ("std", scaled.std(0)), ("max", scaled.max(0))):
        assert np.allclose(np.ravel(found[name]), wanted)
    inverted = np.quantile(scaled, 0.9, axis=0, method="inverted_cdf")
    assert np.allclose(np.ravel(found["q90"]), inverted) and np.shape(found["q90"]) == (3, 1, 1)
