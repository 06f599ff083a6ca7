"""Runs of experiments, branches and the workspace, read without checking anything out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prelar.report.catalog import EVALUATE
from prelar.report.runs import WORKSPACE, find_runs, list_experiments, workspace_files
from prelar.utils.errors import UserError

STAGE = """
stages:
  evaluate:
    cmd: python make.py
    deps: [make.py]
    params: [seed, beta_a]
    outs: [reports/pretrain, reports/finetune, reports/evaluate]
    metrics:
      - metrics.json: {cache: false}
"""
MAKE = """
import json, pathlib
lines = pathlib.Path("params.yaml").read_text().splitlines()
params = dict(line.split(": ") for line in lines)
curves = pathlib.Path("reports/finetune/plots/metrics/eval")
curves.mkdir(parents=True)
(curves / "success.tsv").write_text(f"step\\tsuccess\\n500\\t0\\n1000\\t{params['beta_a']}\\n")
losses = pathlib.Path("reports/pretrain/plots/metrics/loss")
losses.mkdir(parents=True)
(losses / "kl.tsv").write_text("step\\tkl\\n10\\t3\\n20\\t\\n")
evaluate = pathlib.Path("reports/evaluate")
evaluate.mkdir(parents=True)
(evaluate / "prediction.tsv").write_text("step\\tmodel\\tcopy\\n1\\t0.5\\t0.75\\n")
(evaluate / "offline_scratch.tsv").write_text("step\\terror\\n5\\t0.125\\n")
(evaluate / "open_loop.mp4").write_bytes(b"film")
pathlib.Path("metrics.json").write_text(json.dumps({"success_rate": float(params["beta_a"])}))
"""


def call(root: Path, *command: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "t", f"GIT_{role}_EMAIL": "t@example.org"}
    done = subprocess.run(
        command, cwd=root, check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose pipeline takes no time: two experiments, a branch, and a workspace of its own."""
    root = tmp_path_factory.mktemp("project")
    (root / "dvc.yaml").write_text(STAGE)
    (root / "make.py").write_text(MAKE)
    (root / "params.yaml").write_text("method: prelar\ntask: reach\nscale: smoke\nseed: 0\nbeta_a: 1.0\n")
    (root / ".gitignore").write_text("/reports/\n")
    call(root, "git", "init", "-q", "-b", "main")
    call(root, "dvc", "init", "-q")
    call(root, "dvc", "repro", "-q")
    call(root, "git", "add", "-A")
    call(root, "git", "commit", "-q", "-m", "x")
    call(root, "git", "branch", "start")
    call(root, "dvc", "exp", "run", "-q", "--temp", "-n", "low", "-S", "beta_a=0.25")
    call(root, "dvc", "exp", "run", "-q", "--temp", "-n", "lower", "-S", "beta_a=0.125", "-S", "seed=1")
    return root


def test_every_kind_of_revision_is_read_in_place(project: Path) -> None:
    status = call(project, "git", "status", "--porcelain")
    (project / "metrics.json").write_text(json.dumps({"success_rate": 0.5}))
    runs = {run.name: run for run in find_runs(["low", "start", WORKSPACE, "main"], project)}
    assert [run.metrics["success_rate"] for run in runs.values()] == [0.25, 1.0, 0.5, 1.0]
    head = call(project, "git", "rev-parse", "HEAD")
    low = runs["low"]
    assert (low.baseline, low.unrepeated, low.changed) == (head, (), {"beta_a": 0.25})
    assert low.commit == list_experiments(project)["low"][0] != head
    assert low.curves == {
        "success": ((500.0, 1000.0), (0.0, 0.25)),
        "pretrain_kl": ((10.0,), (3.0,)),
        "offline_scratch_error": ((5.0,), (0.125,)),
        "prediction": ((1.0,), (0.5,)),
        "prediction_copy": ((1.0,), (0.75,)),
    }
    assert low.files.read(EVALUATE / "open_loop.mp4") == b"film" and low.files.find(EVALUATE)
    assert low.outputs["evaluate"].keys() >= {"reports/evaluate", "reports/finetune"}
    assert (runs["start"].baseline, runs["start"].changed) == (head, {})
    assert runs[WORKSPACE].commit is None and runs[WORKSPACE].baseline == head
    call(project, "git", "checkout", "-q", "metrics.json")
    assert call(project, "git", "status", "--porcelain") == status


def test_patterns_stand_for_experiments_each_once(project: Path) -> None:
    assert sorted(run.name for run in find_runs(["lo*"], project)) == ["low", "lower"]
    assert [run.name for run in find_runs(["low", "low", "l?w"], project)] == ["low"]


def test_an_experiment_from_a_dirty_tree_says_what_was_changed(project: Path) -> None:
    kept = (project / "make.py").read_text()
    (project / "make.py").write_text(kept + "\n# other\n")
    call(project, "dvc", "exp", "run", "-q", "-n", "dirty")
    (run,) = find_runs(["dirty"], project)
    (workspace,) = find_runs([WORKSPACE], project)
    call(project, "git", "checkout", "-q", ".")
    assert run.unrepeated == workspace.unrepeated == ("make.py",) and run.changed == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nobody", "neither an experiment nor a revision"),
        ("no*", "no experiment matches"),
        ("--all", "neither"),
    ],
)
def test_unknown_names_end_in_one_line(project: Path, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        find_runs([name], project)


def test_a_revision_without_results_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    call(tmp_path, "git", "init", "-q", "-b", "main")
    call(tmp_path, "dvc", "init", "-q")
    call(tmp_path, "git", "add", "-A")
    call(tmp_path, "git", "commit", "-q", "-m", "x")
    with pytest.raises(UserError, match=r"main: has no metrics[.]json; run it to its end"):
        find_runs(["main"], tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"workspace: its metrics[.]json"):
        find_runs([WORKSPACE], tmp_path)


def test_what_the_cache_lacks_is_left_out(project: Path) -> None:
    call(project, "git", "clone", "-q", str(project), "copy")
    (run,) = find_runs(["main"], project / "copy")
    assert run.metrics == {"success_rate": 1.0} and run.curves == {}
    assert run.files.read(EVALUATE / "open_loop.mp4") is None


def test_curve_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    table = tmp_path / "loss.tsv"
    table.write_text("step\tloss\n1\t3.5\n2\tnan\n3\t\n4\t2.5\n")
    files = workspace_files(tmp_path)
    assert files.curve("loss.tsv", "loss") == ((1.0, 4.0), (3.5, 2.5))
    table.write_text("step\tloss\n1\tnan\n")
    assert files.curve("loss.tsv", "loss") is None
    table.write_text("epoch\tloss\n1\t2\n")
    assert files.curve("loss.tsv", "loss") is None
