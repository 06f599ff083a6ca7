"""Artefacts are whole or absent, and a second writer learns who holds the lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.files import atomic_file, exclusive, publish, remove, write_text

ROOT = Path(__file__).parents[2]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_publish_replaces_a_folder(tmp_path: Path) -> None:
    for name in ("staged", "final"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / name).write_text(name, encoding="utf-8")
    publish(tmp_path / "staged", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final" / "inner").iterdir()] == ["staged"]


def test_publish_leaves_the_target_of_a_linked_artefact_alone(tmp_path: Path) -> None:
    cached = tmp_path / "cached"
    cached.write_text("cached", encoding="utf-8")
    (tmp_path / "final").symlink_to(cached)
    write_text(tmp_path / "staged", "new")
    publish(tmp_path / "staged", tmp_path / "final")
    assert cached.read_text(encoding="utf-8") == "cached"
    assert not (tmp_path / "final").is_symlink()


def test_publish_removes_what_killed_runs_left_aside(tmp_path: Path) -> None:
    (tmp_path / ".final.0a1b2c3d.old").mkdir()
    write_text(tmp_path / ".final.0a1b2c3d.old/file", "old")
    write_text(tmp_path / ".other.0a1b2c3d.old", "another's")
    write_text(tmp_path / "staged", "new")
    publish(tmp_path / "staged", tmp_path / "final")
    assert {path.name for path in tmp_path.iterdir()} == {"final", ".other.0a1b2c3d.old"}


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system than pytest's."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no second file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_publish_from_another_file_system(tmp_path: Path, elsewhere: Path) -> None:
    if tmp_path.stat().st_dev == elsewhere.stat().st_dev:
        pytest.skip("both lie on one file system")
    for content in ("first", "second"):
        write_text(elsewhere / "folder/inner/file", content)
        write_text(elsewhere / "file", content)
        write_text(tmp_path / ".folder.0a1b2c3d.new/file", "left behind")
        for name in ("folder", "file"):
            publish(elsewhere / name, tmp_path / name)
        assert (tmp_path / "folder/inner/file").read_text() == content
        assert (tmp_path / "file").read_text() == content
        assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
        assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b"9" * 5_000, "digits"),
        (b'{"a": 1, "a": 2}', "the key a stands twice"),
        (rb'["\ud800"]', "no Unicode"),
        (rb'{"\uDFFF": 1}', "no Unicode"),
        (b'"\xff"', "no Unicode"),
        (b'{"a": "\xed\xa0\xbd\xed\xb8\x80"}', "no Unicode"),  # CESU-8, as some Java programs write
        ('"\ud800"', "no Unicode"),
        (r'"\ud800"'.encode("utf-16"), "no Unicode"),
        (b'\xff\xfe"', "Expecting|Unicode|Unterminated"),
        ("\ud800", "Expecting|Unicode"),
        (b"", "Expecting"),
    ],
)
def test_json_from_elsewhere_is_parsed_or_refused_in_a_line(content: bytes | str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as told:
        files.parse_json(content)
    assert str(told.value).isprintable() and len(str(told.value)) < 200


def test_json_is_parsed() -> None:
    assert files.parse_json(rb'{"a": ["\ud83d\ude00", 1e3, null], "b": {"a": 2}}') == {
        "a": ["😀", 1000.0, None],
        "b": {"a": 2},
    }
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert files.parse_json('{"a": "ü😀"}'.encode(encoding)) == {"a": "ü😀"}


def test_files_from_elsewhere_are_read_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert files.read_bytes(tmp_path / "file", 5) == b"12345"
    for name, reason in (("file", "5 bytes, more than 4"), ("pipe", "not a regular"), ("absent", "missing")):
        with pytest.raises(ValueError, match=reason):
            files.read_bytes(tmp_path / name, 4)


def test_walk_follows_links_and_enters_no_folder_twice(tmp_path: Path) -> None:
    top, away = tmp_path / "top", tmp_path / "away"
    for path in ("top/a/1", "top/b/2", "away/deep/3", "away/4"):
        write_text(tmp_path / path, "")
    (top / "0link").symlink_to(top / "a")
    (top / "away").symlink_to(away)
    (top / "away again").symlink_to(away)
    (top / "b/up").symlink_to(top)
    (away / "back").symlink_to(top / "b")
    (top / "self").symlink_to(top / "self")
    (top / "file").symlink_to(away / "4")
    found = [path.relative_to(top).as_posix() for path in files.walk(top)]
    assert sorted(found) == ["a/1", "away/4", "away/deep/3", "b/2", "file", "self"]


def test_walk_names_what_it_cannot_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "good/1", "")
    (tmp_path / "shut").mkdir()
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [path.name for path in files.walk(tmp_path)] == ["1"]
    assert "shut: cannot be looked into (Permission denied); passed over" in capsys.readouterr().err


def test_remove_takes_anything(tmp_path: Path) -> None:
    remove(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder").is_dir()
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from prelar.utils.files import exclusive
with exclusive("data/x.zarr"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_stops_and_names_the_first(holder: subprocess.Popen[str]) -> None:
    for spelled in ("data/x.zarr", Path.cwd() / "data/x.zarr", "data/../data/x.zarr/"):
        with (
            pytest.raises(UserError, match=rf"data/x\.zarr/?: process {holder.pid} is writing"),
            exclusive(spelled),
        ):
            pass


def test_the_lock_ends_with_its_holder(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive("data/x.zarr"):
        assert Path("data/.locks/data-x.zarr.lock").read_text(encoding="utf-8") == str(os.getpid())


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("step", ["link", "publish"])
def test_a_disk_that_fills_while_copying_is_told_as_such_and_keeps_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, folder: bool
) -> None:
    staged, final = tmp_path / "staged/x", tmp_path / "final/x"
    for name in ("a", "b/c", "b/d") if folder else ("",):
        write_text(staged / name, "content")
    final.parent.mkdir()
    copied: list[object] = []

    def link(source: object, copy: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def copy2(source: object, copy: Path, **options: object) -> None:
        Path(copy).write_text("con")
        copied.append(copy)
        if len(copied) == (2 if folder else 1):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr("shutil.copy2", copy2)
    monkeypatch.setattr(files, "_apart", lambda folder, other: True)
    with pytest.raises(OSError, match="No space left") as told:
        getattr(files, step)(staged, final)
    assert told.value.errno == errno.ENOSPC
    assert not list(final.parent.iterdir()), "what is half copied would keep the disk full"
    assert staged.exists()


@pytest.mark.parametrize("refused", [None, "EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EXDEV"])
def test_a_linked_copy_outlives_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str | None
) -> None:
    source, copy = tmp_path / "source", tmp_path / "deep/copy"
    (source / "folder").mkdir(parents=True)
    (source / "folder/file").write_text("content")
    copy.mkdir(parents=True)
    (copy / "stale").write_text("stale")
    if refused:

        def link(source: object, copy: object) -> None:
            raise OSError(getattr(errno, str(refused)), "no links here")

        monkeypatch.setattr(os, "link", link)
    files.link(source, copy)
    assert (copy / "folder/file").samefile(source / "folder/file") is (refused is None)
    files.remove(source)
    assert [path.name for path in copy.rglob("*")] == ["folder", "file"]
    assert (copy / "folder/file").read_text() == "content"
