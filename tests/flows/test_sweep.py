"""What a sweep consists of, and who may start when."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from flows import experiments
from flows.experiments import Experiment, Gate
from prelar.config import read_yaml
from prelar.stages import Stages
from prelar.utils.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def pretrainings(plan: list[Experiment]) -> int:
    return len({part for one in plan for part in one.parts if part[0] == "pretrain"})


@pytest.mark.parametrize(
    ("preset", "count", "shared"),
    [("demos", 192, 32), ("ssv2", 192, 32), ("action-representation", 144, 24), ("beta-a", 192, 32)],
)
def test_presets_share_pretraining_over_tasks(preset: str, count: int, shared: int) -> None:
    plan = experiments.plan(experiments.PRESETS[preset][1], "state")
    assert len(plan) == len({one.name for one in plan}) == count
    assert pretrainings(plan) == shared


def test_the_forms_presets_are_the_tables() -> None:
    assert set(get_args(experiments.Preset)) == set(experiments.PRESETS)


def test_parts_follow_the_params_of_dvc_yaml() -> None:
    base, stages = read_yaml(ROOT / "params.yaml"), Stages(ROOT / "dvc.yaml")

    def differ(**changes: Any) -> set[str]:
        other = stages.fingerprints(experiments.changed(base, changes))
        return {name for name, key in stages.fingerprints(base).items() if other[name] != key}

    after = {"pretrain", "finetune", "evaluate", "report"}
    assert differ(task="reach") == {"finetune", "evaluate", "report"}
    assert differ(beta_a=0.1) == after
    assert differ(**{"ssv2.batch": 5}) == {"ssv2", *after}
    assert differ(**{"scales.smoke.pretrain.steps": 5}) == after
    assert differ(**{"scales.lite.pretrain.steps": 5}) == {"report"}, "which reads params.yaml whole"


def test_names_are_those_of_git_and_differ_by_code() -> None:
    grid = experiments.words_to_grid(["beta_a=0.1,1e-05", "demos.tasks=[reach,push],[push]"])
    names = [one.name for one in experiments.plan([grid], "state")]
    assert len(set(names)) == 4
    assert all(".." not in name and name.replace(".", "").replace("-", "").isalnum() for name in names)
    assert not set(names) & {one.name for one in experiments.plan([grid], "other")}


def test_the_same_settings_are_one_experiment() -> None:
    assert len(experiments.plan([{"beta_a": [1, 1.0]}, {"seed": [0]}], "state")) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["beta_a=-1"], "beta_a = -1"),
        (["beta_q=1"], "beta_q: unknown key; did you mean beta_"),
        (["beta_a.x=1"], "beta_a.x: unknown key; beta_a is no group of keys"),
        (["task=raech"], "did you mean reach"),
        (["seed"], "seed: not a sweep over a key; write it like seed=0,1,2"),
        (["seed=["], "seed=[: not a sweep over a key"),
    ],
)
def test_a_bad_sweep_ends_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        experiments.plan([experiments.words_to_grid(words)], "state")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_files_hold_one_grid_or_several(tmp_path: Path) -> None:
    one, several = tmp_path / "one.yaml", tmp_path / "several.json"
    one.write_text("seed: [0, 1]\ntask: reach\n", encoding="utf-8")
    several.write_text(json.dumps([{"seed": [0]}, {"beta_a": 0.1}]), encoding="utf-8")
    assert experiments.read_grids(one) == [{"seed": [0, 1], "task": ["reach"]}]
    assert experiments.read_grids(several) == [{"seed": [0]}, {"beta_a": [0.1]}]
    one.write_text("seed\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no sweep"):
        experiments.read_grids(one)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_made_twice_or_at_once(seed: int) -> None:
    """Workers that take whatever the gate admits, in any order, some failing, make each part once."""
    draw = random.Random(seed)
    tasks = ["reach", "dial-turn", "door-lock"]
    grids = [{"beta_a": [0.1, 1.0], "task": tasks, "dataset": ["ssv2", "demos"]}]
    waiting, running, gate = experiments.plan(grids, "state"), list[Experiment](), Gate()
    made: list[experiments.Part] = []
    while waiting or running:
        admitted = [one for one in waiting if gate.admits(one)]
        if admitted and (not running or draw.random() < 0.5):
            one = draw.choice(admitted)
            waiting.remove(one)
            gate.enter(one)
            assert not any(gate.making.get(part) == other.name for other in running for part in one.parts)
            running.append(one)
            continue
        one = draw.choice(running)
        succeeded, early = draw.random() < 0.8, {"sample", "ssv2", "demos", "pretrain"}
        making = {part for part, name in gate.making.items() if name == one.name}
        if making and draw.random() < 0.5:
            made += [part for part in making if part[0] in early]
            gate.passed(one, early)
            continue
        running.remove(one)
        gate.leave(one, succeeded)
        if succeeded:
            made += making
        else:
            waiting.append(one)
    assert len(made) == len(set(made)) and gate.making == {}
