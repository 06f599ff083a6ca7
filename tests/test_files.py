"""Artefacts are whole or absent, and a second writer learns who holds the lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prelar import files
from prelar.errors import UserError
from prelar.files import atomic_file, exclusive, publish, remove, write_text

ROOT = Path(__file__).parents[1]


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
from prelar.files import exclusive
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
    with (
        pytest.raises(UserError, match=rf"data/x\.zarr: process {holder.pid} is writing"),
        exclusive("data/x.zarr"),
    ):
        pass


def test_the_lock_ends_with_its_holder(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive("data/x.zarr"):
        assert Path("data/.locks/data-x.zarr.lock").read_text(encoding="utf-8") == str(os.getpid())


@pytest.mark.parametrize("refused", [False, True])
def test_a_linked_copy_outlives_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    source, copy = tmp_path / "source", tmp_path / "deep/copy"
    (source / "folder").mkdir(parents=True)
    (source / "folder/file").write_text("content")
    copy.mkdir(parents=True)
    (copy / "stale").write_text("stale")
    if refused:

        def link(source: object, copy: object) -> None:
            raise PermissionError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
    files.link(source, copy)
    assert (copy / "folder/file").samefile(source / "folder/file") is not refused
    files.remove(source)
    assert [path.name for path in copy.rglob("*")] == ["folder", "file"]
    assert (copy / "folder/file").read_text() == "content"
