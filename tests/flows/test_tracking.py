"""DVC and the stores: what a flow by hand leaves, where nothing is committed, and that no store is copied."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import dvc
from prelar.config import load_config, parse_config, read_yaml
from prelar.store.store import Store
from tests import archives
from tests.bucket import bucket
from tests.conftest import ROOT, Project

CONFIG = load_config(ROOT / "params.yaml")
SHARD = "data/ssv2.zarr/frames/c/0/0/0/0"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Project]) -> Project:
    """A project of which nothing has run. The tests share it, in order."""
    return make_project(tmp_path_factory.mktemp("project"))


def status(project: Project, *stages: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(project.run("dvc", "status", "--json", *stages).stdout)
    return found


def copies(project: Project) -> int:
    """Files below the project that hold the bytes of the store's first shard under an inode of their own."""
    wanted = (project.root / SHARD).read_bytes()
    held = {
        path.stat().st_ino
        for path in project.root.rglob("*")
        if path.is_file() and path.stat().st_size == len(wanted) and path.read_bytes() == wanted
    }
    return len(held)


@pytest.mark.long
def test_own_videos_become_a_store_by_hand_and_leave_a_clean_status(project: Project, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "below").mkdir(exist_ok=True)
        content = archives.clip(frames=40, filters=f"hue=h={90 * number}", suffix=".mkv")
        (tmp_path / "below" / f"{number}.mkv").write_bytes(content)
    (project.root / "data/sample").mkdir()
    (project.root / "data/sample/some").write_text("as if it had run", encoding="utf-8")
    kept = (project.root / "params.yaml").read_text(encoding="utf-8")
    project.edit(ssv2={"source": str(tmp_path), "clip_seconds": 1.0})
    told = (project.root / "docs/own-videos.md").read_text(encoding="utf-8").partition("## Latent")[0]
    commands = [line for line in told.splitlines() if line.startswith(("python -m", "dvc status"))]
    assert "ssv2" in status(project, "ssv2")
    hand, shown = (project.run(*command.split()) for command in commands)
    assert "recorded with DVC" in hand.stdout and "up to date" in shown.stdout
    assert status(project, "ssv2") == {}
    store = Store.open(project.root / "data/ssv2.zarr")
    assert store.index["id"].to_pylist()[:3] == [f"below/0.mkv#{number:04d}" for number in range(3)]
    assert store.num_frames == 120 and set(store.index["split"].to_pylist()) == {"train", "validation"}
    assert "Stage 'ssv2' didn't change, skipping" in project.run("dvc", "repro", "-s", "ssv2").stdout
    (project.root / "params.yaml").write_text(kept, encoding="utf-8")


@pytest.mark.long
def test_repro_checkout_and_a_queued_experiment_copy_no_store(project: Project) -> None:
    """The cache and all workspaces share one file, made for the first time or again."""
    project.run("dvc", "repro", "ssv2")
    assert copies(project) == 1
    project.run("dvc", "repro", "-f", "-s", "ssv2")
    assert copies(project) == 1
    (project.root / SHARD).unlink()
    project.run("dvc", "checkout", "data/ssv2.zarr")
    assert (project.root / SHARD).is_file()
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Keep the lock")
    project.run("dvc", "exp", "run", "--queue", "-S", "beta_a=0.1", "--name", "queued", "pretrain")
    watched = subprocess.Popen(["dvc", "queue", "start"], cwd=project.root, env=project.environment)
    seen, end = set(), time.monotonic() + 500
    while time.monotonic() < end:
        for shard in (project.root / ".dvc/tmp/exps").glob(f"*/{SHARD}"):
            seen.add(shard.stat().st_ino)
        if watched.poll() is not None:
            states = project.run("dvc", "queue", "status").stdout
            if "Queued" not in states and "Running" not in states:
                break
        time.sleep(0.2)
    assert "Success" in states, states
    assert len(seen) > 0, "the experiment's workspace was never seen with a store"
    assert seen == {(project.root / SHARD).stat().st_ino}
    assert copies(project) == 1


@pytest.mark.long
def test_pretraining_reads_a_store_in_a_bucket_and_runs_again_when_it_changes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    with bucket() as url:
        project.edit(data_root=f"{url}/stores")
        told = project.run("dvc", "repro", "pretrain", timeout=900).stdout
        assert "Running stage 'ssv2'" in told and "Running stage 'pretrain'" in told
        assert [path.name for path in (project.root / "data/ssv2.zarr").iterdir()] == ["pointer.json"]
        assert status(project, "ssv2", "pretrain") == {}
        project.edit(ssv2={"min_frames": 7})
        told = project.run("dvc", "repro", "pretrain", timeout=900).stdout
        assert "Running stage 'ssv2'" in told and "Running stage 'pretrain'" in told
        assert Store.open("data/ssv2.zarr").attrs["min_frames"] == 7


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A folder that looks like a DVC project with a stage x; the commands that were run in it."""
    monkeypatch.chdir(tmp_path)
    for name in dvc.IN_STAGE:
        monkeypatch.delenv(name, raising=False)
    Path(".dvc").mkdir()
    Path("dvc.yaml").write_text("stages: {x: {cmd: true, deps: [code.py, folder], outs: [out]}}")
    Path("params.yaml").write_text("seed: 0")
    Path("code.py").write_text("")
    Path("folder").mkdir()
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: the lock is taken")

    monkeypatch.setattr(dvc.subprocess, "run", run)
    return commands


def test_what_dvc_cannot_record_is_told(
    committed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    dvc.record("x", dvc.stamps("x", CONFIG))
    assert [command[1:] for command in committed] == [["-m", "dvc", "commit", "--force", "x"]]
    told = capsys.readouterr().err
    assert told == "x: not recorded with DVC: the lock is taken; mend that and run `dvc commit x`\n"


def test_a_dependency_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By DVC itself."""
    monkeypatch.chdir(tmp_path)
    for name in dvc.IN_STAGE:
        monkeypatch.delenv(name, raising=False)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True)
    Path("dvc.yaml").write_text("stages: {x: {cmd: 'true', deps: [data/never-made], outs: [out]}}")
    Path("out").write_text("made")
    dvc.record("x", dvc.stamps("x", CONFIG))
    assert "dependency 'data/never-made' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["sources", "mixtures", "unions"])
def test_a_key_that_params_lack_has_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As in a params.yaml of before."""
    values = read_yaml(ROOT / "params.yaml")
    del values[lost]
    monkeypatch.chdir(tmp_path)
    for name in dvc.IN_STAGE:
        monkeypatch.delenv(name, raising=False)
    Path(".dvc").mkdir()
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    assert Path("params.yaml") in dvc.stamps("ssv2", parse_config(values))


@pytest.mark.parametrize("name", dvc.IN_STAGE)
def test_inside_a_stage_nothing_is_committed(
    committed: list[list[str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    dvc.record("x", dvc.stamps("x", CONFIG))
    assert committed == []


@pytest.mark.parametrize("lost", [".dvc", "dvc.yaml", "stage"])
def test_outside_of_a_project_nothing_is_committed(committed: list[list[str]], lost: str) -> None:
    if lost == "stage":
        Path("dvc.yaml").write_text("stages: {y: {cmd: true, deps: []}}")
    else:
        Path(lost).rename("elsewhere")
    dvc.record("x", dvc.stamps("x", CONFIG))
    assert committed == []


@pytest.mark.parametrize("clock", [-86400, 0, 86400])
@pytest.mark.parametrize("changed", ["params.yaml", "code.py", "folder/file"])
def test_what_changed_meanwhile_is_not_recorded(
    committed: list[list[str]], changed: str, clock: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the clock says by then."""
    begun = dvc.stamps("x", CONFIG)
    Path(changed).write_text("changed")
    os.utime(changed, (time.time() + clock,) * 2)
    dvc.record("x", begun)
    assert committed == []
    assert f"{changed.split('/')[0]} changed meanwhile" in capsys.readouterr().err
