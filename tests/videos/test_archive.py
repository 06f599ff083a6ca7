"""Archive parts in their three shapes, read as one stream; what is refused, and what ends the reading."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.utils.errors import UserError
from prelar.videos import archive
from prelar.videos.archive import (
    Member,
    archive_members,
    find_clips,
    find_pieces,
    first_piece,
    folder_members,
    tar_members,
)
from tests import archives

CONTENTS = {"12": b"twelve" * 300, "7": b"seven", "100": os.urandom(2000), "3": b""}


def read(folder: Path) -> dict[str, bytes | None]:
    return {member.id: member.content for member in archive_members(find_pieces(sorted(folder.iterdir())))}


@pytest.mark.parametrize("shape", ["zip", "raw", "named"])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_three_shapes_are_one_stream(tmp_path: Path, shape: str, count: int) -> None:
    archives.source(tmp_path, CONTENTS, shape, count)
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "checksum").write_text("notes")
    (tmp_path / ".hidden-00").write_bytes(b"\x1f\x8b\x08")
    members = list(archive_members(find_pieces(sorted(tmp_path.iterdir()))))
    assert [member.id for member in members] == list(CONTENTS)
    assert {member.id: member.content for member in members} == CONTENTS


def test_names_do_not_decide(tmp_path: Path) -> None:
    """Zipped pieces without an ending, raw ones called .zip, numbers from 1 and of two widths."""
    for number, piece in enumerate(archives.pieces(archives.clips_tar(CONTENTS), 11), 1):
        path = tmp_path / f"v2-{number}{'.zip' if number % 2 else ''}"
        if number % 3:
            path.write_bytes(piece)
        else:
            with zipfile.ZipFile(path, "w") as held:
                held.writestr(f"folder/v2-{number}", piece)
    assert read(tmp_path) == CONTENTS


def test_one_whole_archive(tmp_path: Path) -> None:
    (tmp_path / "20bn-something-something-v2.tar.gz").write_bytes(archives.clips_tar(CONTENTS))
    assert read(tmp_path) == CONTENTS


def test_pieces_that_are_gzips_of_their_own(tmp_path: Path) -> None:
    plain = gzip.decompress(archives.clips_tar(CONTENTS))
    for number, piece in enumerate(archives.pieces(plain, 3)):
        (tmp_path / f"v2-{number:02d}.zip").write_bytes(gzip.compress(piece))
    assert read(tmp_path) == CONTENTS


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["00"], "no archive part that begins a gzip stream"),
        (["01"], "part 01 is missing"),
        (["03"], "ends early"),
        (["02", "03"], "ends early"),
        (["00", "01", "02", "03"], "no archive part"),
    ],
)
def test_missing_parts_are_named(tmp_path: Path, removed: list[str], message: str) -> None:
    archives.write_parts(tmp_path, archives.clips_tar(CONTENTS), "raw", 4)
    for number in removed:
        (tmp_path / f"{archives.FOLDER}-{number}").unlink()
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_doubtful_folders_are_refused(tmp_path: Path) -> None:
    data = archives.clips_tar(CONTENTS)
    archives.write_parts(tmp_path, data, "raw", 3)
    archives.write_parts(tmp_path, data, "named", 3)
    with pytest.raises(UserError, match="part 00 is there twice"):
        find_pieces(sorted(tmp_path.iterdir()))
    for path in tmp_path.glob("*.zip"):
        path.rename(tmp_path / path.name.replace("20bn", "other"))
    with pytest.raises(UserError, match="several archives"):
        find_pieces(sorted(tmp_path.iterdir()))


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    paths = archives.write_parts(tmp_path, archives.clips_tar({"1": os.urandom(30_000)}), "raw", 3)
    content = bytearray(paths[1].read_bytes())
    content[100:140] = bytes(40)
    paths[1].write_bytes(content)
    with pytest.raises(UserError, match=r"-0[12]: (damaged|the archive ends early)"):
        read(tmp_path)
    paths = archives.write_parts(tmp_path / "zip", archives.clips_tar({"1": os.urandom(30_000)}), "zip", 2)
    content = bytearray(paths[1].read_bytes())
    content[1000:1040] = bytes(40)
    paths[1].write_bytes(content)
    with pytest.raises(UserError, match=r"-01\.zip: damaged"):
        read(tmp_path / "zip")


def other_gzips() -> dict[str, bytes]:
    film = archives.entry("film.mp4", b"film" * 500)
    return {
        "captions.csv.gz": gzip.compress(b"file,caption\n"),
        "large.gz": gzip.compress(os.urandom(200_000)),
        "zeros.gz": gzip.compress(bytes(200_000)),
        "backup.tar.gz": archives.tar_gz([archives.entry("deep/", type=tarfile.DIRTYPE), film]),
        "cut.gz": gzip.compress(b"x" * 2000)[:-12],
        "bare.gz": b"\x1f\x8b\x08",
        "torn.gz": b"\x1f\x8b\x08" + bytes(range(200)),
    }


@pytest.mark.parametrize("name", sorted(other_gzips()))
def test_other_gzips_are_no_archive_and_harm_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(other_gzips()[name])
    with zipfile.ZipFile(tmp_path / "wrapped.zip", "w") as held:
        held.writestr(name, other_gzips()[name])
    seen = first_piece(sorted(tmp_path.iterdir()))
    assert seen is None or name == "bare.gz"
    if seen is None:
        archives.source(tmp_path, CONTENTS, "zip", 3)
        assert read(tmp_path) == CONTENTS


def test_an_archive_is_known_by_its_first_clip(tmp_path: Path) -> None:
    for number, piece in enumerate(archives.pieces(archives.clips_tar(CONTENTS), 2)):
        (tmp_path / f"odd-{number}").write_bytes(piece)
    assert first_piece(sorted(tmp_path.iterdir())) == tmp_path / "odd-0"
    long = archives.entry(f"{'folder/' * 30}1.webm", b"one")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "odd-0").write_bytes(archives.tar_gz([long], form))
        assert first_piece([tmp_path / "odd-0"]) is not None


def broken_zip(path: Path, method: int, compression: int | None = None) -> Path:
    """A zip of one file whose bytes are damaged, or whose compression has another number."""
    with zipfile.ZipFile(path, "w", method) as held:
        held.writestr(f"{archives.FOLDER}-01", os.urandom(4000))
    content = bytearray(path.read_bytes())
    if compression is None:
        begin = content.index(b"-01") + 12
        content[begin : begin + 60] = b"\xff" * 60
    else:
        for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            begin = content.index(mark) + place
            content[begin : begin + 2] = compression.to_bytes(2, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("method", "compression"),
    [(zipfile.ZIP_LZMA, None), (zipfile.ZIP_BZIP2, None), (zipfile.ZIP_DEFLATED, None), (0, 99), (0, 14)],
)
def test_broken_zips_harm_nothing_as_others_and_are_named_as_parts(
    tmp_path: Path, method: int, compression: int | None
) -> None:
    paths = archives.write_parts(tmp_path, archives.clips_tar(CONTENTS), "zip", 3)
    (tmp_path / "notes.zip").write_bytes(paths[0].read_bytes().replace(b"PK\x01\x02", b"XX\x01\x02"))
    assert read(tmp_path) == CONTENTS
    broken_zip(paths[1], method, compression)
    with pytest.raises(UserError, match=r"-01\.zip: (damaged|the archive ends early)"):
        read(tmp_path)


def pax(content: bytes) -> bytes:
    head = tarfile.TarInfo("p")
    head.size, head.type = len(content), tarfile.XHDTYPE
    return head.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content",
    [
        b"9" * 5_000 + b" path=a\n",
        b"5011 size=" + b"9" * 5_000 + b"\n",
        b"12 size=-10\n",
        b"12 size=1e3\n",
        b"0 a=\n",
        b"3 a=bcd\n",
        b"no length",
        b"5 a=\n" * 20_000,
    ],
)
def test_pax_headers_that_lie_end_in_a_line(content: bytes) -> None:
    with pytest.raises(UserError, match=r"the archive (is damaged|holds)"):
        list(tar_members(io.BytesIO(pax(content) + archives.entry("a.webm")[0].tobuf() + bytes(1024))))


def test_pax_headers_are_bounded_together() -> None:
    records = pax(b"5 a=\n" * 12_000)
    end = archives.entry("a.webm")[0].tobuf() + bytes(1024)
    assert [member.id for member in tar_members(io.BytesIO(records * archive.MAX_EXTENSIONS + end))] == ["a"]
    with pytest.raises(UserError, match="9 names of one file"):
        list(tar_members(io.BytesIO(records * 9 + end)))


def test_many_files_of_one_name_are_told_apart_in_turn() -> None:
    entries = [archives.entry(name) for name in ("1#2.webm", *["1.webm"] * 3_000)]
    found = members(*entries)
    assert len({member.id for member in found}) == len(found) == 3_001
    assert [member.id for member in found[:4]] == ["1#2", "1", "1#3", "1#4"]
    assert found[-1].reason == "refused: 1 is there already"


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    paths = archives.write_parts(tmp_path, archives.clips_tar(CONTENTS), "raw", 3)
    seen: list[int] = []
    assert list(archive_members(find_pieces(paths), seen.append))
    assert sum(seen) == sum(path.stat().st_size for path in paths)


def members(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> list[Member]:
    return list(tar_members(io.BytesIO(gzip.decompress(archives.tar_gz(entries, form)))))


def test_what_has_no_place_is_refused_and_the_reading_goes_on() -> None:
    entry = archives.entry
    found = members(
        entry("v2/1.webm", b"one"),
        entry("../../etc/passwd", b"x"),
        entry("v2/../2.webm", b"x"),
        entry("/abs/3.webm", b"x"),
        entry("v2/4.webm", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("v2/5.webm", type=tarfile.LNKTYPE, linkname="v2/1.webm"),
        entry("v2/6.webm", type=tarfile.CHRTYPE),
        entry("v2/7.webm", type=tarfile.BLKTYPE),
        entry("v2/8.webm", type=tarfile.FIFOTYPE),
        entry("v2/9\n.webm", b"x"),
        entry("v2/ü.webm", b"x"),
        entry(f"v2/{'n' * 300}.webm", b"x"),
        entry("v2/1.webm", b"again"),
        entry("v2/folder", type=tarfile.DIRTYPE),
        entry("v2/notes.txt", b"text"),
        entry("v2/10.webm", b"ten"),
    )
    good = {member.id: member.content for member in found if member.content is not None}
    assert good == {"1": b"one", "notes.txt": b"text", "10": b"ten"}
    reasons = {member.id: member.reason for member in found if member.content is None}
    assert reasons == {
        "../../etc/passwd": "refused: its path leaves the folder",
        "v2/../2.webm": "refused: its path leaves the folder",
        "/abs/3.webm": "refused: its path leaves the folder",
        "v2/4.webm": "refused: a symbolic link",
        "v2/5.webm": "refused: a hard link",
        "v2/6.webm": "refused: a device",
        "v2/7.webm": "refused: a device",
        "v2/8.webm": "refused: a pipe",
        "v2/9\\n.webm": "refused: a name of other than plain characters",
        "v2/\\xfc.webm": "refused: a name of other than plain characters",
        f"v2/{'n' * 197}…": "refused: a name of 308 characters",
        "1#2": "refused: 1 is there already",
    }


def test_absurd_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_CLIP", 1000)
    entry = archives.entry
    found = members(entry("1.webm", bytes(1000)), entry("2.webm", bytes(1001)), entry("3.webm", b"x"))
    assert [(member.id, member.reason) for member in found] == [
        ("1", None),
        ("2.webm", "refused: 1001 bytes, more than a clip of 1000"),
        ("3", None),
    ]


def test_an_absurd_size_in_a_header_ends_the_reading() -> None:
    info = tarfile.TarInfo("1.webm")
    info.size = 8 << 40
    stream = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(EOFError):
        list(tar_members(stream))
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2 << 30
    with pytest.raises((UserError, EOFError)):
        list(tar_members(io.BytesIO(name.tobuf(tarfile.GNU_FORMAT) + bytes(4096))))


@settings(max_examples=60)
@given(
    st.dictionaries(st.text("abc019_-", min_size=1, max_size=120), st.binary(max_size=1500), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]),
)
def test_any_tar_is_read_back(contents: dict[str, bytes], form: int) -> None:
    names = {name[:90] for name in contents} if form == tarfile.USTAR_FORMAT else set(contents)
    wanted = {name: b"content of " + name.encode() for name in names}
    found = members(*(archives.entry(f"v2/{name}.webm", data) for name, data in wanted.items()), form=form)
    assert {member.id: member.content for member in found} == wanted


def test_pax_headers_with_foreign_names_and_sizes() -> None:
    info, content = archives.entry("v2/1.webm", b"one")
    info.pax_headers = {"path": "v2/other.webm", "comment": "a = b\n c"}
    assert [(m.id, m.content) for m in members((info, content), form=tarfile.PAX_FORMAT)] == [
        ("other", b"one")
    ]


@settings(max_examples=100)
@given(st.binary(max_size=3000), st.integers(0, 4000))
def test_any_bytes_are_read_or_refused(noise: bytes, cut: int) -> None:
    plain = gzip.decompress(archives.clips_tar({"1": b"one" * 300}))
    for stream in (noise, plain[:cut] + noise, plain[:cut]):
        try:
            for member in tar_members(io.BytesIO(stream)):
                assert (member.content is None) == (member.reason is not None)
        except (UserError, EOFError):
            pass


def test_extracted_clips_behind_links_are_found_once(tmp_path: Path) -> None:
    away, source = tmp_path / "disk", tmp_path / "ssv2"
    (away / "deep").mkdir(parents=True)
    (source / "labels").mkdir(parents=True)
    (away / "deep/2.webm").write_bytes(b"b")
    (away / "1.webm").write_bytes(b"a")
    (source / "20bn-something-something-v2").symlink_to(away)
    (away / "deep/loop").symlink_to(source)
    (source / "again").symlink_to(away / "deep")
    assert [path.name for path in find_clips(source)] == ["1.webm", "2.webm"]


def test_hidden_folders_hold_no_clips(tmp_path: Path) -> None:
    """Such as a disk's trash, whose clips would come before those of their names."""
    for path in (".Trash-1000/files/1.webm", "videos/1.webm", "videos/.cache/2.webm"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    found = list(folder_members(find_clips(tmp_path)))
    assert [(member.id, member.content) for member in found] == [("1", b"videos/1.webm")]


def test_a_folder_of_extracted_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_CLIP", 1000)
    (tmp_path / "sub").mkdir()
    for name, content in {
        "100": b"c",
        "9": b"a",
        "20": b"b",
        "sub/20": b"again",
        "large": bytes(1001),
    }.items():
        (tmp_path / f"{name}.webm").write_bytes(content)
    (tmp_path / "._9.webm").write_bytes(b"x")
    os.mkfifo(tmp_path / "30.webm")
    found = list(folder_members(find_clips(tmp_path)))
    assert [(m.id, m.content) for m in found if m.content] == [("9", b"a"), ("20", b"b"), ("100", b"c")]
    assert {m.id: m.reason for m in found if m.reason} == {
        "30": "refused: not a regular file",
        "20#2": "refused: 20 is there already",
        "large": "refused: 1001 bytes, more than a clip of 1000",
    }
