"""From members to rows: batches, what an earlier run left, and clips that are bad or missing."""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.videos import ingest
from prelar.videos.archive import Member
from prelar.videos.decode import Decoder
from prelar.videos.ingest import (
    after_committed,
    append,
    append_missing,
    attributes,
    batches,
    folder_source,
    own_videos,
    staging_key,
)
from prelar.videos.labels import Label, Labels, read_labels
from tests import archives

GOOD = archives.clips(5)
CONTENTS = {
    **GOOD,
    "900": b"",
    "901": b"no video",
    "902": archives.clip(frames=30)[:-2000],
    "903": archives.clip(frames=1),
    "904": archives.clip(frames=7),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that lacks clip 999, which its labels name, and holds clip 905, which they do not."""
    path = tmp_path_factory.mktemp("source")
    archives.write_parts(path, archives.clips_tar({**CONTENTS, "905": GOOD["100"]}), "raw")
    archives.labels_zip(path / archives.LABELS_ZIP, archives.labels_files([*CONTENTS, "999"]))
    return path


def build(
    path: Path, folder: Path, decoder: Decoder, size: int, stop_after: int | None = None
) -> Store | None:
    source = folder_source(folder, None)
    known = read_labels(source.labels)
    with StoreWriter(path / "ssv2.zarr") as writer:
        for number, batch in enumerate(batches(after_committed(source.members(), writer), size)):
            if number == stop_after:
                return None
            append(writer, ingest.ingest(decoder, batch, known, min_frames=8))
        append_missing(writer, known)
        return writer.finish(attributes(writer, decoder.version, 8))


def tree(path: Path) -> dict[str, bytes]:
    held = {str(item.relative_to(path)): item.read_bytes() for item in path.rglob("*") if item.is_file()}
    return {name: content for name, content in held.items() if not name.endswith(".journal")}


def test_every_clip_has_a_row_and_every_bad_one_a_reason(
    tmp_path: Path, folder: Path, decoder: Decoder
) -> None:
    store = build(tmp_path, folder, decoder, 4)
    assert store is not None
    rows = {row["id"]: row for row in store.index.to_pylist()}
    assert list(rows) == [*CONTENTS, "905", "999"]
    assert {identity for identity, row in rows.items() if row["status"] == "ok"} == set(GOOD)
    reasons = {identity: row["reason"] for identity, row in rows.items() if row["status"] == "bad"}
    assert reasons == {
        "900": "the file is empty",
        "901": "ffmpeg: Error opening input: Invalid data found when processing input",
        "902": "ffmpeg: File ended prematurely",
        "903": "1 frame, fewer than 8",
        "904": "7 frames, fewer than 8",
        "905": "the labels files do not name this clip",
        "999": "not in the archive",
    }
    assert rows["100"]["width"] == 96
    assert rows["107"]["height"] == 64
    assert rows["100"]["fps"] == 12.0
    assert rows["904"]["frames"] == 7
    assert rows["904"]["start"] is None
    assert all((row["sha256"] is None) == (identity == "999") for identity, row in rows.items())
    assert rows["100"]["split"] == "train"
    assert rows["107"]["label"] == "Pushing something across something"
    assert store.attrs["ffmpeg"] == decoder.version
    assert store.attrs["source"]["clips"] == len(CONTENTS) + 1


def test_neither_batches_nor_shape_nor_interruption_change_a_byte(
    tmp_path: Path, folder: Path, decoder: Decoder
) -> None:
    build(tmp_path / "one", folder, decoder, 100)
    wanted = tree(tmp_path / "one")
    for stop in (1, 2, 0):
        assert build(tmp_path / "two", folder, decoder, 3, stop_after=stop) is None
    build(tmp_path / "two", folder, decoder, 2)
    assert tree(tmp_path / "two") == wanted
    for shape in ("zip", "named"):
        other = tmp_path / shape
        archives.write_parts(other, archives.clips_tar({**CONTENTS, "905": GOOD["100"]}), shape, 2)
        archives.labels_zip(other / "labels.zip", archives.labels_files([*CONTENTS, "999"]))
        build(tmp_path / f"from {shape}", other, decoder, 7)
        assert tree(tmp_path / f"from {shape}") == wanted


def test_a_folder_of_extracted_clips_gives_the_same_store(tmp_path: Path, decoder: Decoder) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for identity, content in GOOD.items():
        (clips / f"{identity}.webm").write_bytes(content)
    archives.labels_zip(clips / "labels.zip", archives.labels_files(list(GOOD)))
    archives.source(tmp_path / "parts", GOOD, "zip")
    build(tmp_path / "one", clips, decoder, 2)
    build(tmp_path / "two", tmp_path / "parts", decoder, 3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_staging_of_other_clips_is_not_continued(tmp_path: Path, folder: Path, decoder: Decoder) -> None:
    build(tmp_path / "work", folder, decoder, 3, stop_after=2)
    changed = {**CONTENTS, "107": GOOD["100"]}
    archives.write_parts(tmp_path / "other", archives.clips_tar(changed), "raw")
    archives.labels_zip(tmp_path / "other" / "labels.zip", archives.labels_files(list(CONTENTS)))
    with pytest.raises(UserError, match="clip 107: the source changed"):
        build(tmp_path / "work", tmp_path / "other", decoder, 3)


@pytest.mark.parametrize(
    "module",
    [
        "store.schema",
        "store.writer",
        *(f"videos.{name}" for name in ("archive", "ingest", "labels", "decode")),
    ],
)
def test_work_of_other_code_is_not_continued(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    source = folder_source(folder, None)
    known = read_labels(source.labels)
    key = staging_key(source, known, "7.0", 8)
    code = sys.modules[f"prelar.{module}"]
    edited = tmp_path / f"{module}.py"
    edited.write_text(Path(str(code.__file__)).read_text(encoding="utf-8") + "#", encoding="utf-8")
    monkeypatch.setattr(code, "__file__", str(edited))
    assert staging_key(source, known, "7.0", 8) != key


def test_the_staging_key_tells_what_decides_the_result(folder: Path, tmp_path: Path) -> None:
    source = folder_source(folder, None)
    known = read_labels(source.labels)
    key = staging_key(source, known, "7.0", 8)
    assert staging_key(folder_source(folder, None), known, "7.0", 8) == key
    assert staging_key(source, known, "7.1", 8) != key
    assert staging_key(source, known, "7.0", 9) != key
    assert staging_key(source, Labels({}, {}), "7.0", 8) != key
    other = folder_source(archives.source(tmp_path, GOOD), None)
    assert staging_key(other, known, "7.0", 8) != key


def test_clips_that_were_taken_out_of_an_archive_do_not_stand_for_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "source")
    wanted = [member.id for member in folder_source(folder, None).members()]
    for name in ("100.webm", "some/107.webm"):
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_bytes(GOOD[Path(name).stem])
    assert [member.id for member in folder_source(tmp_path / "source", None).members()] == wanted


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ssv2\.source"):
        folder_source(tmp_path / "none", None)
    with pytest.raises(UserError, match=rf"^{tmp_path}: no labels .* set ssv2\.labels"):
        folder_source(tmp_path, None)
    archives.labels_zip(tmp_path / "labels.zip", archives.labels_files(["1"]))
    with pytest.raises(UserError, match="no archive part"):
        folder_source(tmp_path, None)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_batches_keep_order_and_bounds(sizes: list[int], size: int) -> None:
    members = [Member(str(number), bytes(length)) for number, length in enumerate(sizes)]
    found = list(batches(iter(members), size))
    assert [member for batch in found for member in batch] == members
    assert all(1 <= len(batch) <= size for batch in found)


def test_heavy_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MAX_BATCH_BYTES", 100)
    members = [Member(str(number), bytes(40)) for number in range(5)]
    assert [len(batch) for batch in batches(members, 4)] == [2, 2, 1]


def videos_folder(path: Path) -> Path:
    (path / "deep").mkdir(parents=True)
    for name in ("film.mp4", "deep/cat.mp4"):
        (path / name).write_bytes(bytes(4) + b"ftypmp42" + bytes(50))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv.gz", gzip.compress(b"file,caption\nfilm.mp4,a cup\n", mtime=0)),
        ("backup.tar.gz", archives.tar_gz([archives.entry("film.mp4", bytes(2000))])),
        ("notes.zip", b"PK\x03\x04" + bytes(100)),
        ("notes-00.zip", b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + b"\xff" * 18),
        ("train.json", b"[]"),
        ("names.json", b"{"),
    ],
)
def test_own_videos_beside_other_files(tmp_path: Path, name: str, content: bytes) -> None:
    folder = videos_folder(tmp_path / "own")
    (folder / name).write_bytes(content)
    assert [path.name for path in own_videos(folder, None)] == ["cat.mp4", "film.mp4"]


def test_an_archive_without_labels_is_named(tmp_path: Path) -> None:
    folder = videos_folder(tmp_path / "own")
    archives.write_parts(folder, archives.clips_tar(GOOD), "raw", 2)
    assert own_videos(folder, None) == []
    with pytest.raises(
        UserError, match=rf"no labels .* for the archive that {archives.FOLDER}-00 begins; set"
    ):
        folder_source(folder, None)


def test_clips_in_other_containers_and_labels_of_former_names(tmp_path: Path, decoder: Decoder) -> None:
    for number in (1, 2, 3):
        path = tmp_path / f"videos/{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(archives.clip(frames=8 + number, suffix=".mp4"))
    (tmp_path / "annotations").mkdir()
    for name, content in archives.labels_files(["1", "2", "3"]).items():
        (tmp_path / "annotations" / f"something-something-v2-{name}").write_bytes(content)
    assert own_videos(tmp_path, None) == []
    source = folder_source(tmp_path, None)
    assert source.labels == tmp_path / "annotations"
    done = ingest.ingest(decoder, list(source.members()), read_labels(source.labels), 8)
    assert [(clip.row["id"], clip.row.get("label")) for clip in done] == [
        (str(number), archives.TEMPLATES[number - 1].replace("[", "").replace("]", ""))
        for number in (1, 2, 3)
    ]
    assert [len(clip.frames) if clip.frames is not None else clip.row["reason"] for clip in done] == [
        9,
        10,
        11,
    ]


@pytest.mark.parametrize("suffix", [".webm", ".mp4", ".avi"])
def test_clips_of_many_frames_are_held_in_bounds(
    suffix: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether their number is known beforehand or not, all clips come, in order."""
    monkeypatch.setattr(ingest, "MAX_BATCH_BYTES", 100 * 64 * 64 * 3)
    codec = () if suffix == ".webm" else ("-c:v", "mpeg4")
    content = archives.clip(frames=60, source="color", width=16, height=16, options=codec, suffix=suffix)
    members = [Member(str(number), content) for number in range(6)]
    known = Labels({member.id: Label("train", None, None) for member in members}, {})
    rows, most = [], 0
    assert [len(batch) for batch in batches(members, 6)] == [1] * 6
    monkeypatch.setattr(ingest, "_weight", lambda member: 0)
    for batch in batches(members, 6):
        done = ingest.ingest(decoder, batch, known, 8)
        most = max(most, sum(len(clip.frames) for clip in done if clip.frames is not None))
        rows += [
            (c.row["id"], 0 if c.frames is None else len(c.frames))
            for c in ingest.completed(decoder, done, known, 8)
        ]
    assert rows == [(member.id, 60) for member in members] and most <= 160
