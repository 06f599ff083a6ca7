"""The main job, small but whole: DVC runs every stage of a fresh copy, and experiments on top of it.

The tests of this file run in order and share one project, as one user's session would.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.browser import browser_page, picture, read_artifact, run_from_form, sign_in
from tests.conftest import Project
from tests.docs import blocks, commands
from tests.serving import serving, told, until

ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Project]) -> Project:
    project = make_project(tmp_path_factory.mktemp("project"))
    project.run("dvc", "repro", timeout=900)
    return project


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_stage_leaves_its_outputs(project: Project) -> None:
    metrics = json.loads((project.root / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= metrics["success_rate"] <= 1
    assert metrics["prediction_error"] > 0
    page = (project.root / "reports/index.html").read_text(encoding="utf-8")
    assert "<video" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert list((project.root / "data").glob(".*.partial")) == []
    assert not any((project.root / "data/.staging").glob("*")), "a finished flow leaves nothing staged"


def test_repro_again_does_nothing(project: Project) -> None:
    assert "Data and pipelines are up to date." in project.run("dvc", "repro").stdout


@pytest.mark.long
def test_the_same_params_give_the_same_bytes(project: Project) -> None:
    before = digest(project.root / "dvc.lock")
    told = project.run("dvc", "repro", "-f", "-s", "pretrain", "finetune")
    assert "Running stage 'pretrain'" in told.stdout and "Running stage 'finetune'" in told.stdout
    assert "going on from step" not in told.stdout + told.stderr
    assert digest(project.root / "dvc.lock") == before


def test_editing_the_actor_leaves_pretraining_alone(project: Project) -> None:
    file = project.root / "prelar/control/actor_critic.py"
    kept = file.read_text(encoding="utf-8")
    file.write_text(kept + "\n# edited\n", encoding="utf-8")
    status = json.loads(project.run("dvc", "status", "--json").stdout)
    file.write_text(kept, encoding="utf-8")
    assert "finetune" in status and "pretrain" not in status


@pytest.mark.long
def test_a_queued_experiment_runs_only_what_depends_on_its_param(project: Project) -> None:
    project.run("dvc", "exp", "run", "--queue", "--name", "smaller", "-S", "bonus=0.3", "finetune")
    project.run("dvc", "queue", "start")
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        states = project.run("dvc", "queue", "status").stdout
        if "Queued" not in states and "Running" not in states:
            break
        time.sleep(3)
    assert states.count("Success") == 1, states
    told = project.run("dvc", "queue", "logs", "smaller").stdout
    assert re.findall("^Running stage '(.*)':", told, re.M) == ["finetune"]
    for stage in ("sample", "ssv2", "pretrain"):
        assert f"Stage '{stage}' didn't change, skipping" in told
    shown = project.run("dvc", "exp", "show", "--csv").stdout.splitlines()
    columns = shown[0].split(",")
    assert "0.3" in {row.split(",")[columns.index("bonus")] for row in shown[1:]}
    assert "success_rate" in columns and "prediction_error" in columns


@pytest.mark.long
def test_experiments_are_compared_without_noise(project: Project) -> None:
    makefile = (project.root / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    chosen = re.search("^SHOWN := (.*)$", makefile, re.M)
    assert chosen
    shown = project.run("dvc", "exp", "show", *shlex.split(chosen[1]), "--csv").stdout
    columns = set(shown.splitlines()[0].split(","))
    wanted = {"bonus", "success_rate", "prediction_error", "prediction_error_policy"}
    more = {name for name in columns if name.startswith(("return", "prediction_error_", "controllability"))}
    assert wanted <= columns <= wanted | more | {"Experiment", "rev", "typ", "parent", "State", "Executor"}
    project.run("dvc", "plots", "diff", "smaller", "--out", "plots")
    assert "<html" in (project.root / "plots/index.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_commands_of_the_docs_run(project: Project) -> None:
    project.run("git", "checkout", "-q", "params.yaml")
    done = set()
    for command in commands():
        if command.reason is None and command.words not in done:
            done.add(command.words)
            project.run(*command.words)
    assert len(done) > 8
    text = (project.root / "reports/compare.html").read_text(encoding="utf-8")
    assert "PreLAR, beta_a = 0.1" in text and "<video" in text and 'id="success-0-t"' in text
    origins = re.findall(r"git checkout [0-9a-f]{40}\n(.*?)</code>", text, re.DOTALL)
    assert origins == ["make repro", "make setup\n.venv/bin/dvc exp run -S beta_a=0.1"]


@pytest.mark.long
def test_the_examples_of_the_docs_run(project: Project) -> None:
    examples = [
        block.text
        for block in blocks()
        if block.language == "python" and block.page != "README.md" and block.reason is None
    ]
    for example in examples:
        project.run(sys.executable, "-c", example)
    assert len(examples) > 2


def test_a_bad_value_stops_before_anything_runs(project: Project) -> None:
    kept = (project.root / "params.yaml").read_text(encoding="utf-8")
    project.edit(beta_a=-1.0)
    done = project.run("dvc", "repro", check=False)
    (project.root / "params.yaml").write_text(kept, encoding="utf-8")
    assert done.returncode != 0
    assert "beta_a = -1.0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_a_browser_runs_an_experiment_beside_the_workspace(project: Project) -> None:
    params = (project.root / "params.yaml").read_text(encoding="utf-8")
    with serving(project.root, project.environment) as ui, browser_page() as (page, hosts):
        run_from_form(page, sign_in(page, ui), "pipeline", "smaller-bonus", {"bonus": "0.3"})
        of_run, number = page.url, page.url.rpartition("/")[2].partition("?")[0]
        page.goto("about:blank")  # the page of a run that goes on draws, and takes a core from it
        until(lambda: told("GET", f"{ui}/flow_runs/{number}").json()["state"]["type"] in ENDS, "its end", 900)
        page.goto(of_run)
        page.get_by_text("Completed", exact=True).first.wait_for()
        picture(page, "ended")
        told_of, links = read_artifact(page, "result")
        assert re.search(r"bonus\s+0\.3", told_of) and "success_rate" in told_of
        (name,) = [text for text in links if text.startswith("reports/experiments/")]
        assert hosts == {httpx.URL(ui).netloc.decode()}
        page.goto(links[name])
        page.locator("video").first.wait_for(state="attached")
    assert "<video" in (project.root / name).read_text(encoding="utf-8")
    assert (project.root / "params.yaml").read_text(encoding="utf-8") == params
