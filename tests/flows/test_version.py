"""Versions of a project: what tells them apart, and clones that hold their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flows.dvc import git
from flows.version import Version
from prelar.utils.errors import UserError
from tests.flows.toy_pipeline import Toy, make_toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A project, which is the current folder."""
    toy = make_toy(tmp_path)
    monkeypatch.chdir(toy.root)
    return toy


def code(revision: str | None = None) -> str:
    return Version.named(revision).code(Path())


def test_a_version_is_told_by_its_code_alone(toy: Toy) -> None:
    before = code()
    toy.command("git", "tag", "v1")
    Path("results.md").write_text("as expected", encoding="utf-8")
    Path("metrics.json").write_text("{}", encoding="utf-8")
    toy.command("git", "add", "-A")
    toy.command("git", "commit", "-q", "-m", "Commit results")
    assert code() == code("v1") == before
    with Path("stage.py").open("a", encoding="utf-8") as stage:
        stage.write("# changed\n")
    changed = code()
    assert changed != before and code("v1") == before
    toy.command("git", "commit", "-q", "-a", "-m", "Commit code")
    assert code() == changed and code("v1") == before


def test_a_copy_has_the_files_and_leaves_the_workspace_alone(toy: Toy, tmp_path: Path) -> None:
    Path("gone.txt").write_text("", encoding="utf-8")
    toy.command("git", "add", "-A")
    toy.command("git", "commit", "-q", "-m", "Add a file")
    toy.command("git", "rm", "-q", "gone.txt")
    with Path("params.yaml").open("a", encoding="utf-8") as params:
        params.write("# changed\n")
    Path("new.py").write_text("", encoding="utf-8")
    toy.command("git", "add", "new.py")
    status = toy.command("git", "status", "--porcelain").stdout
    version, copy = Version.named(None), tmp_path / "copy"
    Path("params.yaml").write_text("later", encoding="utf-8")
    with version.copy(copy):
        assert (copy / "params.yaml").read_text(encoding="utf-8").endswith("# changed\n")
        assert (copy / "new.py").exists() and not (copy / "gone.txt").exists()
        head = toy.command("git", "-C", str(copy), "rev-parse", "HEAD").stdout.strip()
        assert head == version.commit == toy.command("git", "rev-parse", "main").stdout.strip()
        assert toy.command("git", "-C", str(copy), "config", "user.email").stdout == "tests@localhost\n"
    assert not copy.exists()
    assert Path("params.yaml").read_text(encoding="utf-8") == "later"
    assert toy.command("git", "status", "--porcelain").stdout == status
    assert toy.command("git", "stash", "list").stdout == ""


def test_a_project_that_was_copied_is_as_it_was_committed(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git's index knows other inodes and times there."""
    shutil.copytree(toy.root, tmp_path / "copied")
    monkeypatch.chdir(tmp_path / "copied")
    for path in Path().glob("*.*"):
        os.utime(path, (1, 1))
    version = Version.named(None)
    assert version.files == version.commit == toy.command("git", "rev-parse", "main").stdout.strip()


def test_a_copy_is_made_of_a_shallow_clone_too(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is changed there, and an experiment is taken over from it."""
    toy.command("git", "commit", "-q", "--allow-empty", "-m", "Another")
    toy.command("git", "clone", "-q", "--depth", "1", f"file://{toy.root}", str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    Path("params.yaml").write_text("changed", encoding="utf-8")
    version, copy = Version.named(None), tmp_path / "copy"
    git("config", "user.name", "tests")
    git("config", "user.email", "tests@localhost")
    with version.copy(copy):
        assert (copy / "params.yaml").read_text(encoding="utf-8") == "changed"
        git("commit", "--quiet", "--all", "-m", "An experiment", folder=copy)
        git("update-ref", f"refs/exps/{version.commit[:2]}/{version.commit[2:]}/a-1", "HEAD", folder=copy)
        version.fetch(str(copy), "a-1")
    assert git("show", f"{version.results()['a-1']}:params.yaml") == "changed"


def test_git_need_not_be_told_who_one_is(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("user.email", "user.name"):
        toy.command("git", "config", "--unset", key)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    with Version.named("main").copy(tmp_path / "copy"):
        assert (tmp_path / "copy/stage.py").is_file()


def test_what_is_no_version_ends_in_one_line(toy: Toy) -> None:
    for revision in ("v9", "--all"):
        with pytest.raises(UserError, match="name a tag or a commit") as refused:
            Version.named(revision)
        assert "\n" not in str(refused.value)
