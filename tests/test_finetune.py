"""Fine-tuning as a whole: schedule, determinism, going on after crashes and kills, and learning."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar import finetune
from prelar.config import Config, Finetune, View, load_config, read_yaml
from prelar.control.agent import load_agent
from prelar.control.exploration import Bonus
from prelar.control.rollout import RandomPolicy, play_episodes, summarise
from prelar.envs.pixels import PixelEnv
from prelar.envs.simulator import Step
from prelar.methods import METHODS, build_model
from prelar.model.spec import ModelSpec
from prelar.store.writer import StoreWriter
from prelar.train.checkpoint import load_config as load_description
from prelar.train.checkpoint import load_parts, save_parts
from prelar.utils.errors import UserError
from prelar.utils.files import remove
from prelar.utils.seeds import RngStream, episode_seed
from tests.conftest import Spy
from tests.control.toy import ACTIONS, TASK, DotWorld
from tests.control.toy_run import TINY, run
from tests.fake_results import moving

ROOT = Path(__file__).parents[1]
PROCESSES = multiprocessing.get_context("forkserver")
SIZES = {"cnn_depth": 4, "hidden": 16, "deter": 16, "stoch": 4, "discrete": 4}
VIEW = set(View._fields)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def contents(*folders: Path) -> dict[str, bytes]:
    """Every file below the folders, by path."""
    return {
        str(path.relative_to(folder.parent)): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(root: Path) -> dict[str, bytes]:
    return contents(root / "out", root / "log")


def in_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root.mkdir()
    monkeypatch.chdir(root)
    return root


def config(**changes: object) -> Config:
    """params.yaml at a size that runs in seconds, one environment, on a task that is drawn quickly."""
    plain = load_config(ROOT / "params.yaml").model_dump()
    tiny = TINY | {"envs": 1, "env_steps": 24, "time_limit": 7, "prefill": 8}
    plain["scales"][plain["scale"]]["finetune"] = tiny | changes.pop("finetune", {})  # type: ignore[operator]
    return Config.model_validate(plain | {"task": TASK, "device": "cpu", "threads": 1} | changes)


def pretrained(method: str) -> None:
    torch.manual_seed(1)
    model = build_model(ModelSpec(method=method, **SIZES))
    save_parts(finetune.PRETRAINED, model.state(), {"stage": "pretrain", "model": model.spec, "step": 0})


def test_updates_follow_the_environment_steps() -> None:
    preset = Finetune(**(TINY | {"prefill": 14, "pretrain_updates": 3, "train_every": 4}))
    assert [finetune.updates_after(n, preset) for n in (0, 13, 14, 17, 18, 25, 26)] == [0, 0, 3, 3, 4, 5, 6]


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("envs", [1, 2])
@pytest.mark.parametrize(("train_every", "checkpoint_every"), [(6, 9), (60, 2), (300, 1), (6, 500)])
def test_the_margin_holds_what_comes_after_the_choice_of_an_old_snapshot(
    repeat: int, envs: int, train_every: int, checkpoint_every: int
) -> None:
    """However rare updates are: what one reads is chosen an update before, and may be read after a resume."""
    changes = {"train_every": train_every, "checkpoint_every": checkpoint_every, "envs": envs, "length": 6}
    preset = Finetune(**(TINY | changes | {"time_limit": 20, "prefill": 40, "action_repeat": repeat}))
    step, episode = repeat * envs, preset.actions(repeat) + 1
    added = np.zeros(2000, int)
    for end in range(20 * envs, 1900, 20 * envs):
        added[end + step] += episode * envs  # an answer is taken in before the next action, at the latest
    window = train_every + 3 * checkpoint_every
    gained = np.convolve(added, np.ones(min(window, 2000), int)).max()
    assert gained <= finetune.replay_margin(preset, repeat) <= gained + 3 * episode * envs


@pytest.mark.parametrize("method", METHODS)
def test_the_stage_leaves_an_agent_that_acts(method: str) -> None:
    pretrained(method)
    finetune.run(config(method=method))
    agent, description = load_agent(finetune.OUTPUT, device=torch.device("cpu"))
    assert description == load_description(finetune.OUTPUT)
    assert (description["method"], description["task"]) == (method, TASK)
    assert (description["env_steps"], description["updates"]) == (24, 6)
    assert agent.actor(torch.zeros(1, agent.model.feature_dim)).loc.shape == (1, ACTIONS)
    assert not list(Path("data/.resume").iterdir()), "a finished run leaves nothing to resume"
    logged = {path.stem for path in finetune.LOGS.glob("plots/metrics/*/*.tsv")}
    assert {"success", "return", "image", "kl", "actor", "critic"} <= logged
    assert ("mean" in logged) == (method != "dreamerv2"), "the exploration bonus"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage leaves where the agent is evaluated by the mean of its actions."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrained("dreamerv2")
        finetune.run(config(method="dreamerv2", finetune={"eval_action": "mean"}))
    return folder / finetune.OUTPUT


@pytest.mark.parametrize(
    ("given", "chosen"), [("sample", "sample"), ("mean", "mean"), (None, "mode"), ("std", None)]
)
def test_an_agent_chooses_as_it_was_evaluated(evaluated: Path, given: str | None, chosen: str | None) -> None:
    """A checkpoint of before, which does not say how, acts by the mode."""
    shutil.copytree(evaluated, finetune.OUTPUT)
    path = finetune.OUTPUT / "config.json"
    described = json.loads(path.read_text())
    assert described.pop("eval_action") == "mean"
    path.write_text(json.dumps(described | ({"eval_action": given} if given else {})))
    if chosen is None:
        with pytest.raises(UserError, match="eval_action = 'std': choose sample, mode or mean"):
            load_agent(finetune.OUTPUT, device=torch.device("cpu"))
    else:
        agent, _ = load_agent(finetune.OUTPUT, device=torch.device("cpu"))
        image, first = np.zeros((1, 64, 64, 3), np.uint8), np.ones(1, bool)
        torch.manual_seed(0)
        action, memory = agent.act(None, image, first)
        policy = agent.actor(agent.model.feature(memory["state"]))
        if chosen != "sample":
            assert (action == getattr(policy, chosen)().detach().numpy()).all()
        else:
            assert not (action == policy.mode().detach().numpy()).any()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": None}, "task = None: "),
        ({"action_repeat": 0}, "action_repeat = 0: "),
        ({"view": 3}, "view = 3: needs renderer, distract, distract_strength, distract_store"),
        ({"view": {"colour": "red"}}, "view = .*colour.*: needs renderer"),
        ({"view": {"distract_strength": 2.0}}, "distract_strength = 2.0: "),
    ],
)
def test_a_checkpoint_that_cannot_say_where_it_acts_is_refused(
    evaluated: Path, changes: dict[str, Any], told: str
) -> None:
    shutil.copytree(evaluated, finetune.OUTPUT)
    path = finetune.OUTPUT / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=told) as failure:
        load_agent(finetune.OUTPUT, device=torch.device("cpu"))
    assert "\n" not in str(failure.value)


def test_the_stage_reads_the_params_that_its_key_and_dvc_track(capsys: pytest.CaptureFixture[str]) -> None:
    pretrained("prelar")
    spy = Spy(config())
    finetune.run(spy)  # type: ignore[arg-type]
    tracked = set(read_yaml(ROOT / "dvc.yaml")["stages"]["finetune"]["params"])
    assert tracked >= {"scale", "scales.${scale}.finetune"}
    presets = {
        "model_dump",
        "model_copy",
        "scales",
        "finetune",
        "preset",
        "scale",
        "scales.${scale}.finetune",
    }
    assert "view" in spy.read
    assert (spy.read | VIEW) - presets - {"view"} == tracked - presets
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"finetune: prelar, 24 steps of {TASK} -> data/finetune, reports/finetune"


@pytest.mark.long
def test_it_learns_in_mixed_precision_with_a_bonus() -> None:
    pretrained("prelar")
    finetune.run(config())
    exact = column(finetune.LOGS / "plots/metrics/loss/image.tsv")
    finetune.run(config(precision="bf16"))
    mixed = column(finetune.LOGS / "plots/metrics/loss/image.tsv")
    assert mixed != exact and mixed == pytest.approx(exact, rel=0.05), "rounded, and by no more"
    assert column(finetune.LOGS / "plots/metrics/bonus/mean.tsv")[-1] > 0
    parts, _ = load_parts(finetune.OUTPUT)
    assert {value.dtype for part in parts.values() for value in part.values()} <= {torch.float32, torch.int64}


def test_a_run_goes_on_in_the_very_environment_that_it_began_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A change of the module of one's own environment, or of a background's clips, starts it anew."""
    source = "from tests.control.toy import DotEnv\nclass Mine(DotEnv): time_limit = {}\n"
    monkeypatch.syspath_prepend(".")
    cfg = config(task="changing_env:Mine")
    Path("changing_env.py").write_text(source.format(100))
    first = finetune.run_key(cfg)
    assert finetune.run_key(cfg) == first
    Path("changing_env.py").write_text(source.format(200))
    assert finetune.run_key(cfg) != first
    keys = []
    for frames in (moving(9), moving(9)[::-1].copy()):
        with StoreWriter(Path("clips.zarr")) as writer:
            writer.append(frames, {"id": "0", "split": "train", "label": "x", "fps": 12.0})
            writer.finish({"source": "test"})
        keys.append(
            finetune.run_key(config(task="reach", distract="background", distract_store="clips.zarr"))
        )
        for path in Path().glob("clips.*"):
            remove(path)
    assert keys[0] != keys[1]


def test_the_stage_loads_what_was_pretrained() -> None:
    pretrained("prelar")
    model = finetune.load_model(config())
    torch.manual_seed(1)
    wanted = build_model(ModelSpec(method="prelar", **SIZES)).state()
    for part in ("encoder", "dynamics", "decoder"):
        for name, value in model.state()[part].items():
            assert torch.equal(value, wanted[part][name])


def test_a_checkpoint_of_another_method_is_refused() -> None:
    pretrained("apv")
    with pytest.raises(UserError, match="of method apv, not prelar; run `dvc repro pretrain`"):
        finetune.run(config())


def test_without_a_pretrained_model_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match="data/pretrain: no checkpoint; run `dvc repro pretrain`"):
        finetune.run(config())


def test_a_bonus_of_zero_is_none() -> None:
    pretrained("prelar")
    model = finetune.load_model(config(bonus=0.0))
    assert finetune.make_bonus(model, seed=0, device=torch.device("cpu")) is None
    model = finetune.load_model(config(bonus=0.5))
    bonus = finetune.make_bonus(model, seed=0, device=torch.device("cpu"))
    assert isinstance(bonus, Bonus) and bonus.weight == 0.5
    assert bonus.projection.shape == (model.embed_dim, 128)


def test_each_point_of_the_curve_has_episodes_of_its_own_the_same_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.control import toy_run

    def played(root: Path, **settings: Any) -> list[list[float]]:
        starts: list[list[float]] = []

        class Watched(DotWorld):
            def reset(self, seed: int, episode: int) -> Step:
                answer = super().reset(seed, episode)
                if seed == episode_seed(RngStream.CURVE_EPISODES, 0):
                    starts.append(answer.observation.tolist())
                return answer

        monkeypatch.setattr(toy_run, "DotWorld", Watched)
        run(root, envs=1, env_steps=45, eval_every=15, eval_episodes=2, **settings)
        return starts

    first = played(tmp_path / "first")
    assert len({tuple(place) for place in first}) == len(first) == 6
    assert played(tmp_path / "second", method="dreamerv2", seed=3) == first


def test_held_parameters_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the freeze longer than the run encoder and dynamics keep their weights, and nothing else does."""
    from tests.control import toy_run

    born = {}

    def build(*arguments: object) -> object:
        model = original(*arguments)  # type: ignore[arg-type]
        born.update({name: {k: v.clone() for k, v in part.items()} for name, part in model.state().items()})
        kept.append(model)
        return model

    original, kept = toy_run.build, []  # type: ignore[var-annotated]
    monkeypatch.setattr(toy_run, "build", build)
    run(tmp_path, freeze_updates=1000, env_steps=30)
    moved = {
        name: any(
            not torch.equal(value, born[name][key]) for key, value in part.items() if "running" not in key
        )
        for name, part in kept[0].state().items()
    }
    assert moved == {"encoder": False, "dynamics": False, "decoder": True, "action": True, "heads": True}


@pytest.mark.long
def test_the_same_params_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("one", "two"):
        root = in_folder(tmp_path / name, monkeypatch)
        run(root)
        found.append(results(root))
    assert found[0] == found[1]
    run(in_folder(tmp_path / "three", monkeypatch), entropy=0.1)
    assert results(tmp_path / "three") != found[0]


SLOWLY = {"action_repeat": 2, "time_limit": 11, "prefill": 22}
"""Actions of two steps, in episodes that end with one of a single step."""


@pytest.mark.parametrize(
    ("method", "pace"),
    [("prelar", {}), pytest.param("apv", SLOWLY, marks=pytest.mark.long)],
    ids=["prelar", "apv, slowly"],
)
def test_a_crashed_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, pace: dict[str, int]
) -> None:
    run(in_folder(tmp_path / "straight", monkeypatch), method=method, **pace)
    root = in_folder(tmp_path / "crashed", monkeypatch)
    call = finetune.Stepper.__call__
    crashes = [5, 13, 29, 30, 47, 59]

    def crash(self: finetune.Stepper, index: int) -> object:
        if crashes and index == crashes[0]:
            crashes.pop(0)
            raise KeyboardInterrupt
        return call(self, index)

    monkeypatch.setattr(finetune.Stepper, "__call__", crash)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            run(root, method=method, **pace)
    run(root, method=method, **pace)
    assert not crashes
    assert results(root) == results(tmp_path / "straight")


def test_steps_are_the_simulators_whatever_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates, points of the curve and steps are as many; actions are chosen for two steps each."""
    from tests.control import toy_run

    acted: list[int] = []
    act = finetune.Collector.step

    def step(self: finetune.Collector, policy: Any) -> dict[str, float]:
        acted.append(self.envs.count)
        return act(self, policy)

    monkeypatch.setattr(finetune.Collector, "step", step)
    logs = []
    for repeat in (1, 2):
        acted.clear()
        run(tmp_path / str(repeat), **(SLOWLY | {"action_repeat": repeat, "env_steps": 66, "envs": 1}))
        assert sum(acted) == 6 * {1: 11, 2: 6}[repeat], "of six episodes"
        names = ("eval/return", "loss/actor", "train/return")
        logs.append([steps_of(tmp_path / str(repeat) / f"log/plots/metrics/{name}.tsv") for name in names])
    assert logs[0] == logs[1]
    assert toy_run.TINY["eval_every"] == 25 and logs[0][0][:2] == [25, 50]


def steps_of(path: Path) -> list[int]:
    """The steps at which a metric was logged."""
    with path.open(encoding="utf-8") as handle:
        return [int(row["step"]) for row in csv.DictReader(handle, delimiter="\t")]


def test_an_agent_at_another_pace_says_so_and_the_suites_own_changes_nothing() -> None:
    found = []
    for repeat in (None, 1, 2):
        pretrained("prelar")
        finetune.run(config(finetune={"time_limit": 9, "prefill": 10, "action_repeat": repeat}))
        _, description = load_agent(finetune.OUTPUT, device=torch.device("cpu"))
        assert description["action_repeat"] == (repeat or 1)
        found.append(contents(finetune.OUTPUT, finetune.LOGS))
    assert found[0] == found[1] != found[2]


def survive_kills(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kills: int,
    steps: int,
) -> None:
    """Kill a run again and again, each time after a new snapshot, and compare it with a straight one."""
    run(in_folder(tmp_path / "straight", monkeypatch), env_steps=steps)
    root = in_folder(tmp_path / "killed", monkeypatch)
    moments = random.Random(0)
    done = 0
    while done < kills:
        before = {path.name for path in root.glob("resume/*/step-*.pt")}
        process = PROCESSES.Process(target=run, args=(root,), kwargs={"env_steps": steps})
        process.start()
        while process.is_alive() and {p.name for p in root.glob("resume/*/step-*.pt")} <= before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break
        done += 1
    assert done == kills, "the run ended before it was killed often enough"
    capsys.readouterr()
    run(root, env_steps=steps)
    assert "going on from step" in capsys.readouterr().out
    assert results(root) == results(tmp_path / "straight")


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    survive_kills(tmp_path, monkeypatch, capsys, kills=2, steps=150)


@pytest.mark.long
def test_a_run_survives_many_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    survive_kills(tmp_path, monkeypatch, capsys, kills=20, steps=1500)


def column(path: Path) -> list[float]:
    """The values of one metric in the order of the steps."""
    with path.open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    return [float(next(value for key, value in row.items() if key != "step")) for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("method", ["prelar", "dreamerv2"])
def test_it_learns_to_push_the_dot_to_the_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """From pixels, without pre-training: the best return is about 17, that of random actions about 5."""
    root = in_folder(tmp_path / "learnt", monkeypatch)
    sizes = {"cnn_depth": 8, "hidden": 64, "deter": 64, "stoch": 8, "discrete": 8}
    changes = {"env_steps": 1200, "prefill": 400, "pretrain_updates": 50, "batch": 12, "length": 12}
    changes |= {"freeze_updates": 0, "horizon": 8, "units": 64, "replay": 2000, "slow_every": 50, "envs": 1}
    changes |= {"time_limit": 20, "eval_every": 200, "eval_episodes": 5, "checkpoint_every": 1200}
    run(root, method=method, bonus=0.1, sizes=sizes, actor_lr=3e-4, critic_lr=3e-4, **changes)
    env = PixelEnv(DotWorld(20), seed=episode_seed(RngStream.CURVE_EPISODES, 0))
    at_random = play_episodes(env, RandomPolicy(ACTIONS), episodes=20, seed=0)
    curve = column(root / "log/plots/metrics/eval/return.tsv")
    assert len(curve) == 6
    assert sum(curve[-2:]) / 2 > 2 * summarise(at_random)["return"]
    assert max(column(root / "log/plots/metrics/eval/success.tsv")) == 1
