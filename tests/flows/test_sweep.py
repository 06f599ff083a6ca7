"""What a sweep consists of, and what has to run before what."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from flows import sweep
from flows.sweep import Experiment, Part, Step, changed, grids, plan_in, read_grids, steps, words_to_grid
from prelar.config import read_yaml
from prelar.report.results import Results
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
    [
        ("demos", 192, 32),
        ("ssv2", 192, 32),
        ("action-representation", 144, 24),
        ("beta-a", 192, 32),
        ("small-comparison", 105, 35),
        ("small-comparison-rlbench", 75, 25),
        ("small-causes", 60, 20),
    ],
)
def test_presets_share_pretraining_over_tasks(preset: str, count: int, shared: int) -> None:
    plan = plan_in(ROOT, sweep.PRESETS[preset][1], "code")
    assert len(plan) == len({one.name for one in plan}) == count
    assert pretrainings(plan) == shared


def test_committed_results_are_found_again() -> None:
    """A run is known by its name; the digest at its end follows from the code of the tag."""
    kept = Results.read(Path("results/small-comparison.csv")).changes
    planned = plan_in(ROOT, sweep.PRESETS["small-comparison"][1], "code")
    assert [name[:-10] for name in kept] == [one.name[:-10] for one in planned]


def test_the_forms_presets_are_the_tables() -> None:
    assert set(get_args(sweep.Preset)) == set(sweep.PRESETS)


def test_parts_follow_the_params_of_dvc_yaml() -> None:
    base, stages = read_yaml(ROOT / "params.yaml"), Stages(ROOT / "dvc.yaml")

    def differ(**changes: Any) -> set[str]:
        other = stages.fingerprints(changed(base, changes))
        return {name for name, key in stages.fingerprints(base).items() if other[name] != key}

    after = {"pretrain", "finetune", "evaluate", "simulator", "report"}
    assert differ(task="dial-turn") == {"finetune", "evaluate", "simulator", "report"}
    assert differ(beta_a=0.1) == after
    assert differ(**{"ssv2.batch": 5}) == {"ssv2", *after}
    assert differ(**{"scales.smoke.pretrain.steps": 5}) == after
    assert differ(**{"scales.lite.pretrain.steps": 5}) == {"report"}, "which reads params.yaml whole"


def test_names_are_those_of_git_and_differ_by_code() -> None:
    grid = words_to_grid(["beta_a=0.1,1e-05", "demos.tasks=[reach,push],[push]"])
    names = [one.name for one in plan_in(ROOT, [grid], "state")]
    assert len(set(names)) == 4
    assert all(".." not in name and name.replace(".", "").replace("-", "").isalnum() for name in names)
    assert not set(names) & {one.name for one in plan_in(ROOT, [grid], "other")}


def test_the_same_settings_are_one_experiment() -> None:
    assert len(plan_in(ROOT, [{"beta_a": [1, 1.0]}, {"beta_a": [1], "seed": [0]}], "state")) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["beta_a=-1"], "beta_a = -1"),
        (["beta_q=1"], "beta_q: unknown key; did you mean beta_"),
        (["beta_a.x=1"], "beta_a.x: unknown key; beta_a is no group of keys"),
        (["task=raech"], "did you mean reach"),
        (["seed"], "seed: not a sweep over a key; write it like seed=0,1,2"),
        (["seed=["], "seed=[: not a sweep over a key"),
        (["seed=0", "seed=1"], "seed=1: seed is given twice"),
        (["mixtures.both={ssv2: 1}"], "write mixtures.both.NAME for one within it"),
    ],
)
def test_a_bad_sweep_ends_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        plan_in(ROOT, [words_to_grid(words)], "state")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_files_hold_one_grid_or_several(tmp_path: Path) -> None:
    one, several = tmp_path / "one.yaml", tmp_path / "several.json"
    one.write_text("seed: [0, 1]\ntask: reach\n", encoding="utf-8")
    several.write_text(json.dumps([{"seed": [0]}, {"beta_a": 0.1}]), encoding="utf-8")
    assert read_grids(one) == [{"seed": [0, 1], "task": ["reach"]}]
    assert read_grids(several) == [{"seed": [0]}, {"beta_a": [0.1]}]
    for empty in ("seed\n", "[]", "[seed]"):
        one.write_text(empty, encoding="utf-8")
        with pytest.raises(UserError, match="holds no sweep"):
            read_grids(one)


def test_a_key_without_values_is_refused_wherever_it_is_written() -> None:
    with pytest.raises(UserError, match=r"^task: has no values; write it like"):
        plan_in(ROOT, grids(None, {}, [{"seed": [0]}, {"seed": [1], "task": []}]), "state")


def test_all_of_a_seed_comes_before_the_next() -> None:
    grid = {"seed": [1, 0], "beta_a": [0.1, 1.0], "task": ["reach", "dial-turn"]}
    planned = plan_in(ROOT, [grid], "code")
    assert [one.seed for one in planned] == [0] * 4 + [1] * 4
    assert [one.changes["task"] for one in planned[:4]] == ["reach", "dial-turn"] * 2, "the grid's order"
    names = [one.name for one in planned]
    todo = [step.name for step in steps(planned, workers=2)]
    assert [name for name in todo if name in names] == names
    early = [name.split("-")[0] for name in todo[: todo.index(names[0])]]
    assert early.count("pretrain") == 2, "those of the first seed"
    early = [name.split("-")[0] for name in (step.name for step in steps(planned, workers=4))][:6]
    assert early.count("pretrain") == 4, "too few for four workers, so that the next seed's begin as well"


def test_nothing_is_made_twice_or_at_once() -> None:
    """Steps that run in any order that their needs allow, as many at once as they like."""
    base, stages = read_yaml(ROOT / "params.yaml"), Stages(ROOT / "dvc.yaml")
    grid = {"beta_a": [0.1, 1.0], "task": ["reach", "push"], "dataset": ["ssv2", "demos"], "seed": [0, 1]}
    planned = plan_in(ROOT, [grid, {"scales.smoke.evaluate.episodes": [3, 4]}], "code")
    todo = steps(planned, workers=2)

    def parts(step: Step) -> set[Part]:
        """What a run of DVC makes: the stages it is asked for, and all before them."""
        (one,) = (one for one in planned if one.changes == step.changes)
        above = stages.upstream(changed(base, step.changes))
        names = set(step.targets or above)
        for _ in above:
            names = names.union(*(above[name] for name in names))
        return {part for part in one.parts if part[0] in names}

    wanted = {step.name: parts(step) for step in todo}
    for draw in range(20):
        random_, waiting, running = random.Random(draw), list(todo), dict[str, set[Part]]()
        made, ended = set[Part](), set[str]()
        while waiting or running:
            ready = [step for step in waiting if ended >= set(step.needs)]
            if ready and (not running or random_.random() < 0.5):
                step = random_.choice(ready)
                waiting.remove(step)
                running[step.name] = wanted[step.name] - made
                others = [making for name, making in running.items() if name != step.name]
                assert not any(running[step.name] & making for making in others)
            else:
                name = random_.choice(list(running))
                made |= running.pop(name)
                ended.add(name)
        assert made == {part for one in planned for part in one.parts}
