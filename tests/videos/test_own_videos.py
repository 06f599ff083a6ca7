"""Own videos: found in any container, cut without losing or doubling a frame, split by name."""

from __future__ import annotations

import itertools
import math
import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.videos import ingest, own_videos
from prelar.videos.decode import Decoder, Part
from prelar.videos.ingest import append, attributes, batches, staging_key, videos_source
from tests import archives

SECONDS = 1.0
slow = settings(max_examples=40, deadline=None)
KINDS = {
    "phone.mp4": ("-c:v", "libx264", "-bf", "2", "-g", "40"),
    "camera.MOV": ("-c:v", "libx264", "-g", "250", "-bf", "0"),
    "screen.mkv": ("-c:v", "libx264", "-g", "1000"),
    "old.avi": ("-c:v", "mpeg4", "-g", "12"),
    "web.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "live.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-live", "1"),
}


def film(path: Path, *options: str, frames: int = 108, rate: str = "30") -> Path:
    """A video whose frames all differ, with sound that goes on longer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"),
        *("-f", "lavfi", "-i", f"testsrc2=size=96x64:rate={rate}", "-f", "lavfi", "-i", "sine=duration=3.8"),
        *("-frames:v", str(frames), "-pix_fmt", "yuv420p", *options, str(path)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of many kinds in folders, one without ending, one broken, and what is none."""
    root = tmp_path_factory.mktemp("own")
    for name, options in KINDS.items():
        film(root / "holiday" / name, *options)
    film(root / "bare.mp4", *KINDS["phone.mp4"], rate="30000/1001").rename(root / "bäre")
    (root / "broken.mp4").write_bytes(b"no video")
    film(root / "tv.ts", "-c:v", "mpeg2video")
    (root / "notes.txt").write_text("not a video")
    film(root / ".trash" / "gone.mp4", *KINDS["phone.mp4"])
    return root


def test_videos_are_known_by_content_or_ending(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in own_videos.find_videos(folder)]
    assert names == sorted(["broken.mp4", "bäre", "tv.ts", *(f"holiday/{name}" for name in KINDS)])


@pytest.mark.parametrize("name", [*(f"holiday/{name}" for name in KINDS), "bäre"])
def test_cutting_keeps_every_frame_once(folder: Path, decoder: Decoder, name: str) -> None:
    path = folder / name
    whole = decoder.decode_part(Part(path)).frames
    assert whole is not None and len(whole) == 108
    times = decoder.seconds(path)
    assert times is not None and len(times) == 108 and times[-1] - times[0] == pytest.approx(3.57, abs=0.05)
    members = own_videos.cut(name, path, times, SECONDS)
    assert len(members) == 4 and [member.id for member in members][1] == f"{name}#0001"
    clips = [decoder.decode_part(member.part) for member in members if member.part]
    assert all(clip.reason is None and clip.frames is not None for clip in clips), clips
    assert np.array_equal(np.concatenate([clip.frames for clip in clips]), whole)


def test_a_video_that_cannot_be_read_is_one_clip(folder: Path, decoder: Decoder) -> None:
    path = folder / "broken.mp4"
    assert decoder.seconds(path) is None and decoder.seconds(folder / "absent") is None
    (member,) = own_videos.cut("broken.mp4", path, None, SECONDS)
    assert member.part == Part(path)
    assert "Invalid data" in str(decoder.decode_part(Part(path)).reason)
    assert decoder.decode_part(Part(folder / "absent")).reason == "cannot be read: No such file or directory"


def test_a_video_whose_pictures_cannot_be_decoded_is_one_clip(tmp_path: Path, decoder: Decoder) -> None:
    """Its packets have times, but hold noise."""
    path = film(tmp_path / "a.mp4", "-c:v", "mpeg4", frames=300)
    content = bytearray(path.read_bytes())
    begin, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    assert decoder.seconds(path) is None
    (member,) = own_videos.cut("a", path, decoder.seconds(path), SECONDS)
    assert member.part and "ffmpeg: " in str(decoder.decode_part(member.part).reason)


def test_what_a_header_claims_makes_no_clips(tmp_path: Path, decoder: Decoder) -> None:
    """A length of thirty years, in a Matroska file of 3.6 s."""
    path = film(tmp_path / "a.mkv", "-c:v", "mjpeg")
    content = bytearray(path.read_bytes())
    at = content.index(b"\x44\x89\x88") + 3
    content[at : at + 8] = struct.pack(">d", 1e12)
    path.write_bytes(content)
    assert len(own_videos.cut("a", path, decoder.seconds(path), SECONDS)) == 4


frame_times = st.lists(st.one_of(st.floats(0, 1), st.floats(0, 1e9)), min_size=1, max_size=300).map(np.cumsum)


@slow
@given(steps=frame_times, begin=st.floats(-1e6, 1e6), seconds=st.floats(0.5, 30), fewest=st.integers(1, 20))
def test_clips_adjoin_and_have_frames(steps: np.ndarray, begin: float, seconds: float, fewest: int) -> None:
    times = begin + steps
    parts = [member.part for member in own_videos.cut("x", Path("x"), times, seconds, fewest) if member.part]
    assert parts[0].begin == -math.inf and parts[-1].end == math.inf
    assert all(one.end == other.begin for one, other in itertools.pairwise(parts))
    assert sum(part.frames for part in parts) == len(times)
    assert len(parts) == 1 or min(part.frames for part in parts) >= fewest


@slow
@given(frames=st.integers(2, 2000), rate=st.floats(1, 120), seconds=st.floats(0.5, 30))
def test_clips_of_a_steady_rate_are_of_one_length(frames: int, rate: float, seconds: float) -> None:
    """The last one is up to half longer, or shorter than that if it is the only one."""
    parts = [m.part for m in own_videos.cut("x", Path("x"), np.arange(frames) / rate, seconds) if m.part]
    assert len(parts) == max(1, round(frames / rate / seconds)) or rate * seconds < 2
    assert all(abs(part.frames - rate * seconds) <= 1 for part in parts[:-1])
    assert parts[-1].frames <= 1.5 * rate * seconds + 2


def test_a_clip_is_bounded_by_its_frames() -> None:
    parts = [m.part for m in own_videos.cut("x", Path("x"), np.arange(25_000) / 1e6, 5.0) if m.part]
    assert [part.frames for part in parts] == [10_000, 10_000, 5_000]


def test_photos_and_sound_are_no_videos(tmp_path: Path, decoder: Decoder) -> None:
    """By their kind, or because no moving pictures are found; but what is called a video is told of."""
    film(tmp_path / "film", "-f", "mp4", "-c:v", "mpeg4")
    for name in ("memo.m4a", "memo.mka", "voice.mp4"):
        sound = ("-f", "lavfi", "-i", "sine=duration=60", "-c:a", "aac")
        subprocess.run([decoder.path, "-v", "error", *sound, str(tmp_path / name)], check=True)
    for name, kind in (("a.heic", b"heic"), ("b.avif", b"avif"), ("c", b"M4B "), ("d.CR3", b"crx ")):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + kind + bytes(900))
    film(tmp_path / "photo", "-f", "mp4", "-c:v", "mpeg4", frames=1)
    members, known = own_videos.plan(tmp_path, own_videos.find_videos(tmp_path), decoder, SECONDS)
    assert [member.id for member in members] == [*(f"film#000{n}" for n in range(4)), "voice.mp4#0000"]
    assert set(known.clips) == {member.id for member in members}
    assert members[-1].part and decoder.decode_part(members[-1].part).reason == "no video in it"


def test_folders_behind_links_are_looked_into(tmp_path: Path) -> None:
    """Once, under the name that needs no link; links that lead in circles, or nowhere, do no harm."""
    own, disk = tmp_path / "own", tmp_path / "disk"
    for path in (own / "z" / "1.mp4", disk / "deep" / "2.mp4"):
        path.parent.mkdir(parents=True)
        path.touch()
    (own / "a").symlink_to(own / "z")
    (own / "disk").symlink_to(disk)
    (disk / "back").symlink_to(own)
    (own / "gone").symlink_to(tmp_path / "none")
    found = [path.relative_to(own).as_posix() for path in own_videos.find_videos(own)]
    assert found == ["disk/deep/2.mp4", "z/1.mp4"]


@slow
@given(names=st.lists(st.text(min_size=1), min_size=2, max_size=40, unique=True))
def test_some_videos_are_for_validation_and_adding_one_moves_few(names: list[str]) -> None:
    splits = own_videos._splits(names, [2] * len(names))
    assert all(len(set(split)) == 1 for split in splits)
    held = {name for name, (split, _) in zip(names, splits, strict=True) if split == "validation"}
    assert 0 < len(held) < len(names)
    grown = own_videos._splits([*names, "new"], [1] * (len(names) + 1))
    moved = sum(before[0] != after[0] for before, after in zip(splits, grown, strict=False))
    assert moved <= 2


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (10, 1), (11, 2), (100, 10)])
def test_of_a_single_video_the_end_is_for_validation(count: int, held_out: int) -> None:
    assert own_videos._splits(["x"], [count]) == [["train"] * (count - held_out) + ["validation"] * held_out]


def test_a_folder_of_videos_becomes_a_store(folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    """Whatever the batches; a broken video has a name and a reason."""
    found = ingest.own_videos(folder, None)
    trees = []
    for size in (3, 100):
        source, known = videos_source(folder, found, decoder, SECONDS)
        with StoreWriter(tmp_path / str(size) / "ssv2.zarr") as writer:
            for batch in batches(source.members(), size):
                append(writer, ingest.ingest(decoder, batch, known, 8))
            store = writer.finish(attributes(writer, decoder.version, 8, ingest.OWN))
        held = (path for path in store.path.parent.rglob("*") if path.suffix != ".journal" and path.is_file())
        trees.append({str(path.relative_to(store.path.parent)): path.read_bytes() for path in held})
    assert trees[0] == trees[1]
    store = Store.open(tmp_path / "3/ssv2.zarr")
    assert store.attrs["source"]["name"] == "videos"
    assert store.num_frames == 108 * (len(KINDS) + 1)
    rows = store.index.to_pylist()
    assert {row["split"] for row in rows} == {"train", "validation"}
    assert {row["id"].split("#")[0]: row["reason"] for row in rows if row["status"] == "bad"} == {
        "broken.mp4": "ffmpeg: Error opening input: Invalid data found when processing input",
        "tv.ts": "ffmpeg: Error opening input: Invalid argument; "
        "Format not on whitelist 'matroska,webm,mov,mp4,avi'",
    }


def test_a_build_that_was_broken_off_goes_on_to_the_same_bytes(
    folder: Path, decoder: Decoder, tmp_path: Path
) -> None:
    source, known = videos_source(folder, ingest.own_videos(folder, None), decoder, SECONDS)
    stores = []
    for name, stops in (("whole", [None]), ("broken", [1, 2, None])):
        for stop in stops:
            with StoreWriter(tmp_path / name / "ssv2.zarr") as writer:
                members = ingest.after_committed(source.members(), writer)
                for batch in itertools.islice(batches(members, 3), stop):
                    append(writer, ingest.ingest(Decoder(threads=2), batch, known, 8))
                if stop is None:
                    stores.append(writer.finish(attributes(writer, decoder.version, 8, ingest.OWN)))
    whole, broken = stores
    assert whole.index.equals(broken.index)
    assert np.array_equal(whole.read(0, whole.num_frames), broken.read(0, broken.num_frames))


def test_labels_or_an_archive_make_it_something_else(folder: Path, tmp_path: Path) -> None:
    assert (
        ingest.own_videos(folder, Path("labels.zip")) == []
        and ingest.own_videos(tmp_path / "absent", None) == []
    )
    archives.source(tmp_path, {"1": archives.clip()}, "raw")
    (tmp_path / "2.webm").write_bytes(archives.clip())
    assert ingest.own_videos(tmp_path, None) == []
    (tmp_path / archives.LABELS_ZIP).unlink()
    assert ingest.own_videos(tmp_path, None) == []
    with pytest.raises(UserError, match="no labels"):
        ingest.folder_source(tmp_path, None)


def test_the_key_knows_how_videos_are_cut(folder: Path, decoder: Decoder) -> None:
    found = ingest.own_videos(folder, None)
    keys = {
        staging_key(*videos_source(folder, found, decoder, seconds), decoder.version, 8)
        for seconds in (1.0, 2.0, 1.0)
    }
    assert len(keys) == 2


def test_batches_are_bounded_by_their_frames() -> None:
    members = own_videos.cut("film", Path("film"), np.arange(150_000) / 30, 5.0)
    batched = list(batches(members, 1000))
    assert [member for batch in batched for member in batch] == members and len(members) == 1000
    frames = [sum(member.part.frames for member in batch if member.part) for batch in batched]
    assert max(frames) * 64 * 64 * 3 <= ingest.MAX_BATCH_BYTES < 1.1 * frames[0] * 64 * 64 * 3


def test_a_file_is_read_once_for_its_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    digest = own_videos.files.digest
    monkeypatch.setattr(own_videos.files, "digest", lambda path: read.append(path) or digest(path))
    times = np.arange(108) / 30
    members = own_videos.cut("a", folder / "bäre", times, 1.0) + own_videos.cut(
        "b", folder / "absent", times, 2.0
    )
    told = list(own_videos.with_digests(members))
    assert read.count(folder / "bäre") == 1
    assert all(len(member.sha256 or "") == 64 for member in told[:4])
    assert [member.reason for member in told[4:]] == ["cannot be read: No such file or directory"] * 2


def test_the_splits_of_a_video_are_one(folder: Path, decoder: Decoder) -> None:
    source, known = videos_source(folder, ingest.own_videos(folder, None), decoder, SECONDS)
    by_video = itertools.groupby(source.parts, key=lambda member: member.id.split("#")[0])
    assert all(len({known.clips[member.id].split for member in members}) == 1 for _, members in by_video)
