"""Versions of a project: what tells them apart, and clones that hold their files."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_what_is_no_version_ends_in_one_line(toy: Toy) -> None:
    for revision in ("v9", "--all"):
        with pytest.raises(UserError, match="name a tag or a commit") as refused:
            Version.named(revision)
        assert "\n" not in str(refused.value)
