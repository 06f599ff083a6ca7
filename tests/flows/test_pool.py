"""A sweep whose experiments run in two clones of the project, which share a remote."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flows.dvc import git, results
from flows.pool import fetch_results
from tests.flows.test_experiments import SWEEP, finished
from tests.flows.toy_pipeline import Toy, make_toy
from tests.serving import serving, split, until


def clone(toy: Toy, folder: Path) -> Toy:
    toy.command("git", "clone", "-q", str(toy.root), str(folder))
    copy = replace(toy, root=folder)
    for key in ("user.email", "user.name"):
        copy.command("git", "config", key, "worker@localhost")
    return copy


@pytest.mark.long
def test_two_workers_share_a_sweep(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    clones = [clone(toy, tmp_path / name) for name in ("one", "two")]
    for place in (toy, *clones):
        place.command("dvc", "remote", "add", "--local", "-d", "shared", str(tmp_path / "remote"))
    with serving(toy.root, toy.environment()) as given, ExitStack() as stack:
        url, auth = split(given)
        for place in clones:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.pool", "--name", place.root.name],
                cwd=place.root,
                env=place.environment(PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=auth, TOY_SECONDS="2"),
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a script's "&" has it
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        done = toy.sweep("--pool", *SWEEP, check=False, PREFECT_API_URL=url)
        assert done.returncode == 0, done.stdout + done.stderr
        again = toy.sweep("--pool", *SWEEP, check=False, PREFECT_API_URL=url)
        assert again.returncode == 0, again.stdout + again.stderr
    assert len(finished(toy)) == 4
    ran = {stage: toy.ran(stage) for stage in ("ssv2", "pretrain", "finetune")}
    assert ran == {"ssv2": 1, "pretrain": 2, "finetune": 4}
    name = finished(toy)[0]
    toy.command("dvc", "exp", "pull", ".", name)
    toy.command("dvc", "exp", "apply", name, check=False)  # DVC misses the page, which no sweep makes
    assert (toy.root / "data/pretrain").exists()
    toy.command("dvc", "repro")
    assert (toy.root / "reports/index.html").exists()
    assert ran == {stage: toy.ran(stage) for stage in ran}, "nothing that was fetched is run again"


def test_what_ran_in_two_clones_is_kept_as_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other experiments of origin arrive all the same."""
    toy = make_toy(tmp_path)
    here = clone(toy, tmp_path / "here")
    base = toy.command("git", "rev-parse", "HEAD").stdout.strip()

    def finish(place: Toy, name: str) -> str:
        words = (
            "-c",
            f"user.name={place.root.name}",
            "commit-tree",
            "-p",
            base,
            "-m",
            name,
            f"{base}^{{tree}}",
        )
        made = place.command("git", *words).stdout.strip()
        place.command("git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", made)
        return made

    there = {name: finish(toy, name) for name in ("both", "there")}
    own = {name: finish(here, name) for name in ("both", "own")}
    assert there["both"] != own["both"]
    monkeypatch.chdir(here.root)
    for _ in range(2):
        fetch_results()
        held = {name: git("rev-parse", ref).strip() for name, ref in results().items()}
        assert held == there | own


@pytest.mark.long
def test_a_worker_says_what_it_lacks(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    lacking = toy.command(sys.executable, "-m", "flows.pool", check=False)
    assert lacking.returncode == 2 and lacking.stderr.startswith("error: PREFECT_API_URL = not set")
    (toy.root / "stage.py").write_text("print('changed')\n", encoding="utf-8")
    refused = toy.sweep("--pool", "seed=1", check=False)
    assert refused.returncode == 2 and "not committed" in refused.stderr


@pytest.mark.long
def test_a_worker_whose_machine_dies_is_not_waited_for(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    place = clone(toy, tmp_path / "one")
    for one in (toy, place):
        one.command("dvc", "remote", "add", "--local", "-d", "shared", str(tmp_path / "remote"))
    quick = "from flows import experiments, pool, runtime; pool.SILENCE = 5; runtime.run(experiments.main)"
    sweep = (sys.executable, "-c", quick, "--pool", "seed=0")
    with serving(toy.root, toy.environment()) as given:
        url, auth = split(given)
        words = [sys.executable, "-m", "flows.pool", "--name", "one"]
        environment = place.environment(PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=auth)
        with subprocess.Popen(words, cwd=place.root, env=environment | {"TOY_SECONDS": "600"}) as worker:
            dies = threading.Thread(target=lambda: (until(lambda: toy.ran("ssv2"), "a stage"), die(worker)))
            dies.start()
            lost = toy.command(*sweep, check=False, PREFECT_API_URL=url)
            dies.join()
        assert lost.returncode == 2 and "its worker has been silent for 5 s" in lost.stdout + lost.stderr
        with subprocess.Popen(words, cwd=place.root, env=environment) as worker:
            again = toy.command(*sweep, check=False, PREFECT_API_URL=url)
            worker.terminate()
        assert again.returncode == 0, again.stdout + again.stderr
    assert len(finished(toy)) == 1


def die(worker: subprocess.Popen[bytes]) -> None:
    """End a worker and all that it started, as switching off its machine does."""
    parent = psutil.Process(worker.pid)
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
