"""The flow `demos` with live demos: through stand-ins while it is killed, and through the real simulator."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import demos, staging
from prelar.demos import rlbench_live
from prelar.envs.names import RLBENCH_CAMERAS
from prelar.store.store import Store
from prelar.utils.errors import UserError
from tests.conftest import Project
from tests.flows.inline import work_inline
from tests.flows.kills import FlowProcess, tree
from tests.rlbench_standin import orders, use_standins


@pytest.fixture
def project(
    tmp_path: Path, make_project: Callable[[Path], Project], monkeypatch: pytest.MonkeyPatch
) -> Project:
    """A project that collects three tasks from the stand-ins."""
    use_standins(tmp_path / "standin", monkeypatch)
    project = make_project(tmp_path / "project")
    tasks = ["push_button", "weighing_scales", "reach_target"]
    settings = {
        "source": "rlbench",
        "tasks": tasks,
        "cameras": list(RLBENCH_CAMERAS),
        "episodes": 3,
        "variations": 2,
    }
    project.edit(demos={**settings, "timeout": 5.0})
    return project


@pytest.mark.long
def test_flow_survives_what_simulators_do_and_being_killed(project: Project, tmp_path: Path) -> None:
    standin, root = tmp_path / "standin", project.root
    orders(standin, push_button="work die work fail", reach_target="work hang hang")
    finished = "data/.staging/demos-*/demos/*.npz"
    process = FlowProcess(root, "flows.demos")
    assert process.wait_for(lambda: list(root.glob(finished))) and process.kill()
    assert not (root / "data/demos.zarr").exists()
    told = project.run("python", "-m", "flows.demos").stdout
    store = Store.open(root / "data/demos.zarr")
    rows = store.index.to_pylist()
    stored = Counter((row["task"], row["variation"]) for row in rows if row["status"] == "ok")
    assert stored == dict.fromkeys([(t, v) for t in ("push_button", "reach_target") for v in (0, 1)], 15)
    bad = [row for row in rows if row["status"] == "bad"]
    assert {(row["task"], row["success"]) for row in bad} == {("weighing_scales", False)} and len(bad) == 15
    assert "60 clips of 5 cameras" in told
    failed = "Error in task weighing_scales. Demo was completed, but was not successful."
    words = f"no demo in 10 attempts: 10 × {failed}"
    left_out = told.split("left out:\n")[1].splitlines()
    given_up = (
        rf"  weighing_scales, variation 0: (\d+) clips: (not tried after episode \d: )?{re.escape(words)}"
    )
    matches = [match for line in left_out if (match := re.fullmatch(given_up, line))]
    tried = sum(int(match[1]) for match in matches if not match[2])
    untried = sum(int(match[1]) for match in matches if match[2])
    assert (tried, untried) in {(5, 10), (10, 5)}, told  # the second where both simulators had begun with it
    assert store.array("actions").shape == (store.num_frames, 8)
    assert store.attrs["source"] == {
        "name": "rlbench",
        "renderer": "opengl",
        "size": 128,
        "action_mode": "joint_velocity",
        "seed": 0,
    }
    assert not list((root / "data/.staging").glob("demos-*/demos"))


@pytest.mark.long
@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)],
    ids=["once", "twice"],
)
def test_signals_end_all_simulators_and_lose_only_attempts_in_progress(
    project: Project, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    standin = tmp_path / "standin"
    orders(standin, push_button=" ".join(["work work hang hang"] * len(signals)))
    episodes = 4 * len(signals) + 2
    settings = {"tasks": ["push_button"], "variations": 1, "episodes": episodes, "cameras": ["front"]}
    project.edit(demos={**settings, "workers": 2, "timeout": 600.0})

    def attempts() -> int:
        asked = standin / "orders/asked"
        return asked.read_text().split().count("push_button") if asked.exists() else 0

    for begun, number in zip((4, 8), signals, strict=False):
        process = FlowProcess(project.root, "flows.demos")
        assert process.wait_for(lambda begun=begun: attempts() == begun)
        assert process.interrupt(number) != 0 and attempts() == begun
    told = project.run("python", "-m", "flows.demos").stdout
    lost = 2 * len(signals)
    assert attempts() == episodes + lost and f"{episodes} clips of 1 camera, " in told


@pytest.mark.long
def test_store_by_the_former_name_is_adopted_if_it_holds_the_same_demos(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, data = tmp_path / "standin/orders/asked", Path("data")
    tasks = ["push_button", "weighing_scales"]
    project.edit(demos={"tasks": tasks, "variations": 1, "cameras": ["front"], "max_bad": 0.9})
    monkeypatch.chdir(project.root)
    work_inline(monkeypatch)
    monkeypatch.setattr(staging, "validate", staging.validate.fn)
    assert "3 clips left out; 3 episodes stored in " in demos.demos.fn()
    for name in ("demos.zarr", "demos.parquet"):
        (data / name).rename(data / name.replace("demos", "rlbench"))
    made, before = tree(data, "rlbench"), asked.read_text()
    demos.demos.fn()
    assert "data/rlbench.zarr holds these demos and becomes data/demos.zarr" in capsys.readouterr().out
    assert asked.read_text() == before
    assert {name.replace("demos", "rlbench"): held for name, held in tree(data, "demos").items()} == made
    assert tree(data, "rlbench") == made
    project.edit(demos={"seed": 7})
    demos.demos.fn()
    refused = "data/rlbench.zarr, a store by the former name of data/demos.zarr, is not used"
    assert refused in capsys.readouterr().out
    assert asked.read_text() != before
    assert Store.open(data / "demos.zarr").attrs["source"]["seed"] == 7


@pytest.mark.long
def test_many_kills_cost_what_was_in_progress(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulators, displays and the flow itself are killed at random moments."""
    monkeypatch.setenv("RLBENCH_COSTS", json.dumps({"launch": 0.3, "plan": 0.2, "step": 0.04}))
    tasks = ["push_button", "reach_target", "open_drawer"]
    project.edit(demos={"tasks": tasks, "episodes": 30, "cameras": ["front", "wrist"]})
    random_, kills = random.Random(0), Counter[str]()
    while kills.total() < 24:
        process = FlowProcess(project.root, "flows.demos")
        assert process.wait_for(functools.partial(process.descendants, "rlbench_simulator"))
        for word in random_.choices(["rlbench_simulator", "Xvfb"], [4, 1], k=random_.randint(1, 6)):
            time.sleep(3 * random_.random())
            kills[word] += process.kill_one(word, random_)
        kills["flow"] += process.kill()
    assert not (project.root / "data/demos.zarr").exists()
    assert "left out:" not in project.run("python", "-m", "flows.demos").stdout
    rows = Store.open(project.root / "data/demos.zarr").index.to_pylist()
    expected = 5 * 30
    assert Counter((row["status"], row["camera"]) for row in rows) == {
        ("ok", "front"): expected,
        ("ok", "wrist"): expected,
    }
    begun = (tmp_path / "standin/orders/asked").read_text().splitlines()
    assert sum(name in tasks for name in begun) <= expected + kills["rlbench_simulator"] + 2 * kills["flow"]
    assert not list((project.root / "data/.staging").iterdir())


def test_flow_without_any_demo_says_why(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.edit(demos={"tasks": ["weighing_scales"], "variations": 1})
    monkeypatch.chdir(project.root)
    work_inline(monkeypatch)
    monkeypatch.setattr(staging, "validate", staging.validate.fn)
    with pytest.raises(UserError, match="Demo was completed, but was not successful"):
        demos.demos.fn()


def test_setup_says_that_coppeliasim_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COPPELIASIM_ROOT", raising=False)
    root = Path(__file__).parents[2]
    told = subprocess.run(
        ["sh", "tools/rlbench_setup.sh"], cwd=root, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 2 and told.stderr.startswith("error: COPPELIASIM_ROOT is not set")


@pytest.mark.live
def test_three_tasks_live(tmp_path: Path, make_project: Callable[[Path], Project]) -> None:
    rlbench_live.check()
    project = make_project(tmp_path / "project")
    tasks = ["reach_target", "push_button", "open_drawer"]
    project.edit(demos={"source": "rlbench", "tasks": tasks, "cameras": list(RLBENCH_CAMERAS), "episodes": 2})
    project.run("python", "-m", "flows.demos", timeout=1800)
    store = Store.open(project.root / "data/demos.zarr")
    stored = Counter(row["task"] for row in store.clip_index.to_pylist())
    assert stored == dict.fromkeys(tasks, 10)
    assert all(abs(store.array("actions")).max(axis=0) > 0)
