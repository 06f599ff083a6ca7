"""Commit, dirt, hashes and commands of a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prelar.config import load_config
from prelar.report.provenance import flatten, redact
from prelar.report.runs import Run, read_workspace
from tests.conftest import ROOT

STEPS = load_config(ROOT / "params.yaml").scales.smoke.pretrain.steps
LOCK = f"""
schema: '2.0'
stages:
  ssv2:
    params: {{params.yaml: {{ssv2: {{min_frames: 8}}}}}}
    outs: [{{path: data/ssv2.zarr, hash: md5, md5: aa.dir}}]
  demos:
    outs: [{{path: data/demos.zarr, hash: md5, md5: bb.dir}}]
  source@more:
    outs: [{{path: data/more.zarr, hash: md5, md5: dd.dir}}]
  mixture@both:
    outs: [{{path: data/both.zarr, hash: md5, md5: ee.dir}}]
  pretrain:
    params: {{params.yaml: {{beta_a: null, scales.smoke.pretrain: {{steps: {STEPS}}}}}}}
    outs: [{{path: data/pretrain, hash: md5, md5: cc.dir}}]
"""


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "dvc.lock").write_text(LOCK)
    (tmp_path / "metrics.json").write_text("{}")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    return tmp_path


def read_project(root: Path) -> Run:
    return read_workspace(root, flatten(load_config(root / "params.yaml").model_dump(mode="json")))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_clean_tree(project: Path) -> None:
    found = read_project(project)
    assert found.baseline == git(project, "rev-parse", "HEAD")
    assert found.modified == () and not found.unrepeated
    assert found.inputs == {"data/ssv2.zarr": "aa.dir", "data/pretrain": "cc.dir"}
    assert found.stale == ()
    assert found.commands == [f"git checkout {found.baseline}", "make repro"]


def test_the_stores_of_a_mixture_are_inputs(project: Path) -> None:
    edit(project / "params.yaml", "sources: {}", "sources: {more: {kind: demos}}")
    edit(project / "params.yaml", "mixtures: {}", "mixtures: {both: {ssv2: 1, more: 1}}")
    edit(project / "params.yaml", "dataset: ssv2", "dataset: both")
    paths = ["data/ssv2.zarr", "data/more.zarr", "data/both.zarr", "data/pretrain"]
    assert list(read_project(project).inputs) == paths


def test_changed_params_become_settings_and_stale_stages_are_named(project: Path) -> None:
    edit(project / "params.yaml", "beta_a: null ", "beta_a: 0.1 ")
    edit(project / "params.yaml", "tasks: null", "tasks: [reach]")
    (project / "dvc.lock").write_text(LOCK + "# a run writes this\n")
    found = read_project(project)
    assert found.modified == ("params.yaml",) and not found.unrepeated
    assert found.changed == {"beta_a": 0.1, "demos.tasks": ["reach"]}
    assert found.stale == ("pretrain",)
    assert found.commands[-1] == ".venv/bin/dvc exp run -S beta_a=0.1 -S 'demos.tasks=[reach]'"


def test_commands_hold_nothing_private_and_say_so(project: Path) -> None:
    edit(project / "params.yaml", "source: data/sample", 'source: ["https://host.org/a?token=hush"]')
    found = read_project(project)
    assert found.commands[-1] == ".venv/bin/dvc exp run -S 'ssv2.source=[https://host.org/a]'"
    assert found.redacted
    edit(project / "params.yaml", '["https://host.org/a?token=hush"]', '["https://host.org/a"]')
    assert not read_project(project).redacted


def test_changed_code_is_named(project: Path) -> None:
    edit(project / "code.py", "1", "2")
    found = read_project(project)
    assert found.modified == ("code.py",) and found.unrepeated


def test_files_are_named_as_they_are(project: Path) -> None:
    name = 'ein "Größen" vergleich.py'
    (project / name).write_text("a = 1\n")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "y")
    edit(project / name, "1", "2")
    assert read_project(project).modified == (name,)


def test_outside_of_git_and_dvc(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    found = read_project(tmp_path)
    assert (found.baseline, found.modified, found.inputs) == (None, (), {})
    assert found.commands == ["make repro"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://me:hush@host.org/a/b?token=hush#hush", "https://host.org/a/b"),
        ("HTTP:/hush.org/a", "http:///hush.org/a"),
        ("https://host.org:hush/a", "…"),
        ("file:///home/me/parts", "…/parts"),
        ("/home/me/parts/", "…/parts"),
        ("~/parts", "…/parts"),
        ("data/sample", "data/sample"),
        ("prelar", "prelar"),
        (["/a/b", 3], ["…/b", 3]),
        (None, None),
        (0.5, 0.5),
    ],
)
def test_values_lose_what_is_private(value: Any, shown: Any) -> None:
    assert redact(value) == shown
