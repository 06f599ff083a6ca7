"""Sweeps as queued DVC experiments, on a pipeline of the real one's shape whose stages take no time."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.toy_pipeline import Toy, make_toy
from tests.serving import until

SWEEP = ("beta_a=0.1,1", "task=reach,dial-turn")


def finished(toy: Toy) -> list[str]:
    refs = toy.command("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").stdout.split()
    return [ref.rsplit("/", 1)[-1] for ref in refs]


@pytest.mark.long
def test_a_sweep_survives_its_killing_and_shares_its_pretraining(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    notes = toy.root / "stage.py"
    notes.write_text(notes.read_text(encoding="utf-8") + "# not committed yet\n", encoding="utf-8")
    words = [sys.executable, "-m", "flows.experiments", *SWEEP, "--workers", "2"]
    with subprocess.Popen(words, cwd=toy.root, env=toy.environment(), stdout=subprocess.DEVNULL) as killed:
        until(lambda: toy.ran("pretrain"), "a first pre-training")
        killed.kill()
    again = toy.sweep(*SWEEP, "--workers", "2", check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(finished(toy)) == 4
    assert {stage: toy.ran(stage) for stage in ("ssv2", "pretrain", "finetune")} == {
        "ssv2": 1,
        "pretrain": 2,
        "finetune": 4,
    }
    shown = list(csv.DictReader(io.StringIO(toy.command("dvc", "exp", "show", "--csv").stdout)))
    rows = {(row["beta_a"], row["task"]) for row in shown if row["Experiment"] in finished(toy)}
    assert rows == {("0.1", "reach"), ("0.1", "dial-turn"), ("1", "reach"), ("1", "dial-turn")}
    states = toy.command("dvc", "queue", "status").stdout
    assert states.count("Success") == 4 and not any(word in states for word in ("Running", "Queued", "Fail"))
    assert "nothing to do: all 4 experiments have a result" in toy.sweep(*SWEEP).stdout
    assert notes.read_text(encoding="utf-8").endswith("# not committed yet\n")
    assert toy.command("git", "diff", "--name-only").stdout.split() == ["stage.py"]


@pytest.mark.long
def test_what_failed_is_named_and_run_again(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    broken = toy.sweep("task=reach,dial-turn", check=False, TOY_BROKEN="finetune")
    assert broken.returncode == 2
    assert "2 of 2 experiments failed" in broken.stderr and "Traceback" not in broken.stderr
    assert toy.ran("pretrain") == 1 and finished(toy) == []
    until(lambda: "0 active, 0 idle" in toy.command("dvc", "queue", "status").stdout, "workers that end")
    assert toy.sweep("task=reach,dial-turn").returncode == 0
    assert toy.ran("pretrain") == 1 and len(finished(toy)) == 2


@pytest.mark.long
def test_ctrl_c_empties_the_queue(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    words = [sys.executable, "-m", "flows.experiments", "seed=0,1,2"]
    with subprocess.Popen(
        words, cwd=toy.root, env=toy.environment(TOY_SECONDS="60"), start_new_session=True
    ) as interrupted:
        until(lambda: toy.ran("ssv2"), "a stage that runs")
        interrupted.terminate()
        interrupted.wait(timeout=120)
    until(
        lambda: (
            not any(word in toy.command("dvc", "queue", "status").stdout for word in ("Running", "Queued"))
        ),
        "an empty queue",
    )
    assert finished(toy) == []


def test_a_bad_sweep_ends_before_anything_starts(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    refused = toy.sweep("beta_a=-1", check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: params.yaml: beta_a = -1")
    listed = toy.sweep("--preset", "demos", "task=reach", "seed=0", "--dry-run").stdout.split()
    assert [name.split("-")[0] for name in listed] == ["dreamerv2", "apv", "contextwm", "prelar"]
    assert "192 experiments" in toy.sweep("--list").stdout
