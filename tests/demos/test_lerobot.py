"""LeRobotDatasets: real ones frame by frame against their truth, and every damage as one episode's reason."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows import demos, ssv2
from prelar.config import load_config
from prelar.demos import lerobot
from prelar.demos.episodes import Splits, clips
from prelar.demos.lerobot import Lerobot
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.frames import Frames
from prelar.utils.video_file import ffmpeg_binary
from prelar.videos import decode, ingest
from prelar.videos import lerobot as videos
from prelar.videos.decode import Decoder
from prelar.videos.sequential import Part
from tests import frame_code
from tests.conftest import ROOT
from tests.flows.inline import work_inline
from tests.flows.kills import tree

GOLDEN = ROOT / "tests/golden/lerobot"
"""Sets that lerobot 0.3.3 and 0.6.1 wrote and edited, each with its truth."""
SETS = ["v30_deleted", "v21_two_cameras_av1", "v30_one_camera_h264"]
EPISODES = Path("meta/episodes/chunk-000/file-000.parquet")


def write_image_set(folder: Path, lengths: list[int]) -> Path:
    """A set of v3.0 with one camera, whose pictures are PNG in its rows, in one row group."""
    names = ("episode_index", "frame_index", "timestamp", "action", "top")
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for episode, length in enumerate(lengths):
        random = np.random.default_rng([episode, length])
        for frame in range(length):
            packed = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(packed, "PNG")
            held = (episode, frame, frame / 12, random.normal(size=2).tolist())
            for name, value in zip(
                rows, (*held, {"bytes": packed.getvalue(), "path": f"{frame}.png"}), strict=True
            ):
                rows[name].append(value)
    _write(folder / "data/chunk-000/file-000.parquet", rows)
    told = [{"episode_index": n, "length": length, "tasks": ["stack"]} for n, length in enumerate(lengths)]
    places = {"data/chunk_index": 0, "data/file_index": 0}
    table = pa.Table.from_pylist([{**each, **places} for each in told])
    (folder / EPISODES).parent.mkdir(parents=True)
    pq.write_table(table, folder / EPISODES)
    features = {"top": {"dtype": "image", "shape": [64, 64, 3]}, "action": {"dtype": "float32", "shape": [2]}}
    info = {"codebase_version": "v3.0", "fps": 12, "features": features, "video_path": None}
    (folder / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def codes(frames: Frames) -> list[int]:
    return [frame_code.read(frame) for frame in frames]


def store_of(source: Lerobot, path: Path) -> Store:
    """What the flow makes of a source."""
    with StoreWriter(path, arrays=source.arrays) as writer:
        demos.fill(writer, source, source.jobs(), 2)
        return writer.finish(source.attributes())


@pytest.mark.parametrize("name", SETS)
def test_every_frame_is_the_one_that_its_row_means(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_inline(monkeypatch)
    source = lerobot.open_folder(GOLDEN / name / "set")
    truth = np.load(GOLDEN / name / "truth.npz")
    store = store_of(source, tmp_path / "x.zarr")
    assert source.cameras == tuple(feature.rpartition(".")[2] for feature in truth["cameras"].tolist())
    ends = np.cumsum(truth["lengths"])
    clips = iter(store.clip_index.to_pylist())
    for begin, end in zip(ends - truth["lengths"], ends, strict=True):
        for feature in truth["cameras"]:
            clip = next(clips)
            assert clip["label"] == "; ".join(sorted(set(truth["task"][begin:end])))
            assert clip["fps"] == truth["fps"]
            start, rows = clip["start"], slice(clip["start"], clip["start"] + clip["frames"])
            assert codes(store.read(start, clip["frames"])) == truth[f"codes.{feature}"][begin:end].tolist()
            actions = store.array("actions")[rows]
            assert np.array_equal(actions[:-1], truth["action"][begin : end - 1]) and not actions[-1].any()
            assert np.array_equal(store.array("state")[rows], truth["state"][begin:end])
    assert next(clips, None) is None


def test_videos_alone_are_clips_of_the_other_flow(tmp_path: Path) -> None:
    truth = np.load(GOLDEN / "v30_deleted/truth.npz")
    settings = load_config(ROOT / "params.yaml").ssv2
    settings = settings.model_copy(update={"source": str(GOLDEN / "v30_deleted/set"), "clip_seconds": 1.0})
    decoder = Decoder()
    source, known = ssv2.find(settings, decoder)
    with StoreWriter(tmp_path / "x.zarr") as writer:
        for batch in ingest.batches(source.members(), 5):
            decoder.announce([member.part for member in batch if member.part])
            ingest.append(writer, ingest.ingest(decoder, batch, known, 8))
        store = writer.finish({})
    assert not decoder._readers._announced
    seen: dict[str, list[int]] = {"front": [], "wrist": []}
    for clip in sorted(store.clip_index.to_pylist(), key=lambda clip: clip["id"]):
        camera = clip["id"].split("/")[1].split("#")[0]
        seen[camera] += codes(store.read(clip["start"], clip["frames"]))
        assert clip["label"] and clip["fps"] == truth["fps"] and clip["frames"] >= 15
    for camera, found in seen.items():
        assert found == truth[f"codes.observation.images.{camera}"].tolist()
    assert set(store.clip_index["split"].to_pylist()) == {"train", "validation"}
    assert store.num_clips == store.index.num_rows == 2 * (3 + 1 + 2 + 2)


@pytest.mark.parametrize("length", [10**6, 10**12, 2**62])
def test_claims_of_more_frames_than_a_file_can_hold_make_no_clips(length: int, tmp_path: Path) -> None:
    """Nor need memory: of the one episode there is a reason, the others are cut as before."""
    folder = shutil.copytree(GOLDEN / "v30_deleted/set", tmp_path / "set")
    before, _ = videos.plan(videos.open_set(folder), 1.0)
    table = pq.read_table(folder / EPISODES)
    lengths = table["length"].to_pylist()
    column = pa.array([*lengths[:-1], length])
    pq.write_table(table.set_column(table.column_names.index("length"), "length", column), folder / EPISODES)
    after, _ = videos.plan(videos.open_set(folder), 1.0)
    last = f"episode_{table['episode_index'][-1].as_py():06d}/"
    assert [member for member in after if not member.id.startswith(last)] == [
        member for member in before if not member.id.startswith(last)
    ]
    reasons = [member.reason for member in after if member.id.startswith(last)]
    assert len(reasons) == 2 and all("more frames than" in str(reason) for reason in reasons)


def test_images_are_read_exactly_and_splits_of_the_set_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_inline(monkeypatch)
    folder = write_image_set(tmp_path / "set", [5, 9, 6])
    change_info(folder, splits={"train": "0:1", "val": "1:3"})
    store = store_of(lerobot.open_folder(folder), tmp_path / "x.zarr")
    assert store.clip_index["split"].to_pylist() == ["train", "validation", "validation"]
    assert store.clip_index["fps"].to_pylist() == [12.0] * 3
    rows = pq.read_table(folder / "data/chunk-000/file-000.parquet")["top"].to_pylist()
    drawn = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows])
    assert np.array_equal(store.read(0, 20), drawn)
    with pytest.raises(UserError, match="no camera is a video"):
        ssv2.find(
            load_config(ROOT / "params.yaml").ssv2.model_copy(update={"source": str(folder)}), Decoder()
        )


def test_bytes_are_the_same_after_an_interruption_inside_a_shared_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_inline(monkeypatch)
    source = lerobot.open_folder(GOLDEN / "v30_deleted/set", cameras=["wrist"])
    for name, stop in (("whole", 4), ("cut", 2)):
        with StoreWriter(tmp_path / name / "x.zarr", arrays=source.arrays) as writer:
            demos.fill(writer, source, source.jobs()[:stop], 1)
    source.close()
    with StoreWriter(tmp_path / "cut/x.zarr", arrays=source.arrays) as writer:
        assert writer.count == 2
        demos.fill(writer, source, source.jobs(), 1)
        writer.finish({})
    with StoreWriter(tmp_path / "whole/x.zarr", arrays=source.arrays) as writer:
        writer.finish({})
    one, other = tree(tmp_path / "whole", "x"), tree(tmp_path / "cut", "x")
    assert {key: value for key, value in one.items() if "frames" in key or "actions" in key} == {
        key: value for key, value in other.items() if "frames" in key or "actions" in key
    }


# --- Damage -------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def change_info(folder: Path, **changes: Any) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def told(name: str, value: Any, episode: int = 1) -> Damage:
    """What changes a number of one episode's row of meta."""

    def change(folder: Path) -> None:
        table = pq.read_table(folder / EPISODES)
        values = table[name].to_pylist()
        values[episode] = value(values[episode]) if callable(value) else value
        column = pa.array(values, table.schema.field(name).type)
        pq.write_table(table.set_column(table.schema.names.index(name), name, column), folder / EPISODES)

    return change


def rows(change: Callable[[dict[str, list[Any]]], Any]) -> Damage:
    """What changes the columns of the first data file, in which episode 1 has the rows 60 to 82."""

    def damage(folder: Path) -> None:
        path = folder / "data/chunk-000/file-000.parquet"
        table = pq.read_table(path)
        columns = table.to_pydict()
        change(columns)
        pq.write_table(pa.table(columns), path)

    return damage


def set_value(name: str, row: int, value: Any) -> Damage:
    return rows(lambda columns: columns[name].__setitem__(row, value))


def lose_rows(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        del values[70:75]


FRONT, WRIST = "videos/observation.images.front", "videos/observation.images.wrist"
NUMBERS: dict[str, tuple[Damage, str]] = {
    "a length that is none": (told("length", -4), "meta/episodes tells of -4 frames"),
    "another length": (told("length", 24), "23 rows of the episode, meta/episodes tells of 24"),
    "rows that are missing": (rows(lose_rows), "frame 10 is missing, or there twice"),
    "a row that is there twice": (set_value("frame_index", 70, 9), "is missing, or there twice"),
    "a time before the file": (told(f"{WRIST}/from_timestamp", -0.5), "begins at -0.5 s in its file"),
    "a time that is none": (told(f"{WRIST}/from_timestamp", float("nan")), "begins at nan s in its file"),
    "a time behind the file": (
        told(f"{WRIST}/from_timestamp", 1058.9),
        "camera wrist: .*: 0 pictures in the video where 23 are told",
    ),
    "half a frame's shift": (
        told(f"{WRIST}/from_timestamp", lambda begin: begin + 0.024),
        "pictures lie 0.0240 s beside their times",
    ),
    "a frame's shift at the file's end": (
        told(f"{FRONT}/from_timestamp", lambda begin: begin + 0.05),
        "22 pictures in the video where 23 are told",
    ),
    "another file's number": (told("data/file_index", 1), "0 rows of the episode"),
    "a file that is not there": (
        told(f"{WRIST}/file_index", 7),
        "file-007.mp4: cannot be read: No such file",
    ),
    "a number that leads nowhere": (told("data/chunk_index", -1), "chunk_index is -1"),
    "a row's time that is none": (set_value("timestamp", 65, float("nan")), "its row 5 has no sound time"),
    "a row's time before the episode": (set_value("timestamp", 60, -1.0), "its row 0 has no sound time"),
    "times of no rate": (set_value("timestamp", 65, 0.9), "do not keep a rate"),
    "an action that is none": (set_value("action", 64, [0.0, float("inf"), 0.0, 0.0]), "actions: not finite"),
    "actions of two widths": (set_value("action", 64, [0.0]), "rows of 1 and of 4 numbers"),
    "no action in a row": (set_value("action", 64, None), "rows without a value"),
    "a video cut short": (
        lambda folder: _halve(folder / "videos/observation.images.wrist/chunk-000/file-001.mp4"),
        "camera wrist",
    ),
    "a table that is none": (
        lambda folder: (folder / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1" * 9),
        "data/chunk-000/file-000.parquet: ",
    ),
}


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", NUMBERS)
def test_a_damage_is_the_reason_of_its_episodes_alone(name: str, tmp_path: Path) -> None:
    damage, reason = NUMBERS[name]
    folder = shutil.copytree(GOLDEN / "v30_deleted/set", tmp_path / "set")
    damage(folder)
    source = lerobot.open_folder(folder)
    found = [demos_fault(source, number) for number in (1, 3)]
    assert re.search(reason, str(found[0])) and found[1] is None
    source.close()


def demos_fault(source: Lerobot, number: int) -> str | None:
    """Why an episode of a source is not stored, None where it is."""
    job = source.jobs()[number]
    records = list(clips(source.collect(job), source, 0, Splits([job], [])))
    reasons = {row["reason"] for _, row, _ in records}
    assert len(reasons) == 1 and len(records) == len(source.cameras)
    return reasons.pop()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("place", ["data/chunk-000/file-000.parquet", str(EPISODES)])
def test_a_damaged_byte_of_a_table_is_a_reason_or_refused_in_a_line(place: str, tmp_path: Path) -> None:
    path = write_image_set(tmp_path / "set", [5, 6]) / place
    good, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(good)
        for at in draw.integers(len(content), size=3):
            content[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(content)
        try:
            source = lerobot.open_folder(tmp_path / "set")
            episodes = [source.collect(job) for job in source.jobs()]
        except UserError as error:
            assert str(error).isprintable()
        else:
            assert all(each.reason is None or each.reason.isprintable() for each in episodes)


PATHS = [
    "../{file_index:03d}.parquet",
    "/etc/{file_index}",
    "data/{chunk_index:03d}/../../../x",
    "data/{other}",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_a_path_that_leaves_the_set_is_the_reason_of_all_episodes(
    path: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(GOLDEN / "v30_deleted/set", tmp_path / "set")
    change_info(folder, **{key: path})
    opened: list[Path] = []
    monkeypatch.setattr(decode.Decoder, "decode_part", lambda self, part: opened.append(part.path))
    source = lerobot.open_folder(folder)
    episodes = [source.collect(job) for job in source.jobs()]
    assert all(episode.reason and key in episode.reason for episode in episodes) and not opened


@pytest.mark.parametrize(
    "changes",
    [
        {"codebase_version": "v1.6"},
        {"codebase_version": ["v3.0"]},
        {"fps": 0},
        {"fps": "30"},
        {"features": []},
        {"chunks_size": 0},
        {"data_path": "data/{chunk_index:999999999d}/x"},
        {"data_path": "data/{chunk_index.real}"},
        {"data_path": 7},
        {"features": {"depth": {"dtype": "video", "shape": [4, 4, 1], "info": {"is_depth_map": True}}}},
        {
            "features": {
                "depth": {"dtype": "video", "shape": [4, 4, 1], "video_info": {"video.is_depth_map": True}}
            }
        },
    ],
    ids=str,
)
def test_a_set_that_is_not_to_be_read_is_refused_in_a_line(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "v30_deleted/set", tmp_path / "set")
    change_info(folder, **changes)
    with pytest.raises(UserError, match=r"demos\.path = .*set: "):
        lerobot.open_folder(folder)


def test_row_groups_of_the_episodes_change_nothing(tmp_path: Path) -> None:
    """lerobot writes one for every ten episodes that it records, and a single one of a set that it edits."""
    folder = write_image_set(tmp_path / "set", [3, 4, 5, 6])
    jobs = lerobot.open_folder(folder).jobs()
    pq.write_table(pq.read_table(folder / EPISODES), folder / EPISODES, row_group_size=1)
    assert pq.ParquetFile(folder / EPISODES).num_row_groups == 4
    assert lerobot.open_folder(folder).jobs() == jobs and jobs[0].task


def test_v1_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "meta_data").mkdir()
    (tmp_path / "meta_data/info.json").write_text("{}")
    with pytest.raises(UserError, match="a LeRobotDataset of v1"):
        lerobot.open_folder(tmp_path)


def test_a_table_that_unpacks_to_much_is_refused_unread(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path / "set", [5])
    path = folder / "data/chunk-000/file-000.parquet"
    many = 40_000_000
    _write(path, {"episode_index": pa.array(np.zeros(many, np.int64)), "timestamp": np.zeros(many)})
    assert path.stat().st_size < many
    source = lerobot.open_folder(folder)
    reason = source.collect(source.jobs()[0]).reason
    assert reason is not None and "rows in" in reason


def test_an_exact_part_has_one_picture_in_each_span() -> None:
    part = Part(Path("x"), 0.95, 1.45, 5, exact=True)
    even = 1 + np.arange(5) / 10
    assert part.misfit(even) is None and part.misfit(even + 0.024) is None
    assert part.misfit(even[:4]) == "4 pictures in the video where 5 are told"
    assert "picture 4 lies 0.0510 s beside" in str(part.misfit(even + np.array([0, 0, 0, 0, 0.051])))
    assert "lie 0.0300 s beside" in str(part.misfit(even + 0.03))
    assert dataclasses.replace(part, exact=False).misfit(even[:2]) is None


@pytest.mark.parametrize(("options", "begins"), [([], 0.0), (["-output_ts_offset", "0.2"], 0.2)], ids=str)
def test_times_are_those_of_the_file_s_own_clock(options: list[str], begins: float, tmp_path: Path) -> None:
    """A file that does not begin at 0 is no reason to take other pictures than those that are told."""
    path = tmp_path / "x.mp4"
    words = ["-v", "error", "-f", "lavfi", "-i", "testsrc2=s=64x64:r=20:d=1", "-c:v", "libx264", "-g", "4"]
    subprocess.run([ffmpeg_binary(), *words, *options, str(path)], check=True)
    decoder = Decoder()
    whole = decoder.decode_part(Part(path)).frames
    assert whole is not None and len(whole) == 20
    for first in (0, 7, 12, 3):
        begin = begins + (first - 0.5) / 20
        clip = decoder.decode_part(Part(path, begin, begin + 5 / 20, 5, exact=True))
        assert clip.frames is not None and np.array_equal(clip.frames, whole[first : first + 5])
    assert "2 pictures in the video" in str(
        decoder.decode_part(Part(path, begins - 0.175, begins + 0.075, 5, exact=True)).reason
    )
