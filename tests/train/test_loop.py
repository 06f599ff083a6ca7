"""The loop: a run that was stopped anywhere ends like one that was not, and its log depends on no clock."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prelar.train import loop
from prelar.train.checkpoint import Snapshots, load_parts
from prelar.train.loop import (
    Averages,
    GracefulShutdown,
    Hook,
    MetricLog,
    adam,
    compiles,
    descend,
    seed_step,
    set_up,
    summary,
    train,
)
from prelar.utils.errors import UserError
from prelar.utils.files import remove
from tests import toy

PROCESSES = multiprocessing.get_context("forkserver")
KILLED = -signal.SIGKILL


def start(folder: Path, **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=toy.run, args=(folder,), kwargs=settings)
    process.start()
    return process


def run(folder: Path, **settings: Any) -> int:
    """Exit status of a run of the toy stage in a process of its own."""
    process = start(folder, **settings)
    process.join(120)
    assert process.exitcode is not None
    return int(process.exitcode)


def outputs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(folder) == 0
    found = outputs(folder)
    assert {"out/net.safetensors", "out/config.json", "log/metrics.json", "log/picture"} < set(found)
    assert not any(name.startswith("resume") for name in found), "a finished run leaves nothing to resume"
    return found


def test_kills_anywhere_leave_the_end_as_it_would_have_been(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Also where DVC removes the stage's outputs before it starts again: here after every other kill."""
    folder = tmp_path / "run"
    kills: list[dict[str, Any]] = [
        {"kill_at": 2},
        {"kill_at": 9},
        {"kill_in_save": 1},
        {"kill_in_save": 2},
        {"kill_at": 16},
        {"kill_at_end": True},
        {"kill_at_end": True},
    ]
    for number, kill in enumerate(kills):
        assert run(folder, **kill) == KILLED
        assert not (folder / "out").exists()
        if number % 2:
            remove(folder / "log")
    assert run(folder) == 0
    assert outputs(folder) == undisturbed


@pytest.mark.parametrize("kills", [[], [{"lose_log_at": 13, "kill_at": 18}]])
def test_the_log_stays_whole_when_its_folder_is_removed_beneath_it(
    tmp_path: Path, undisturbed: dict[str, bytes], kills: list[dict[str, Any]]
) -> None:
    """As somebody does who cleans up while a run goes on."""
    folder = tmp_path / "run"
    for kill in kills:
        assert run(folder, **kill) == KILLED
    assert run(folder, lose_log_at=22 if kills else 10) == 0
    assert outputs(folder) == undisturbed


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 1)]
)
def test_a_signal_keeps_the_step_it_came_in(
    tmp_path: Path, undisturbed: dict[str, bytes], number: int, status: int
) -> None:
    folder = tmp_path / "run"
    assert run(folder, signal_at=(5, number)) == status
    found = Snapshots("toy", root=folder / "resume").latest()
    assert found is not None and found[0] == 6
    assert run(folder) == 0
    assert outputs(folder) == undisturbed


def test_ctrl_c_says_what_happens_once(capfd: pytest.CaptureFixture[str]) -> None:
    with GracefulShutdown("toy") as interrupts:
        signal.raise_signal(signal.SIGINT)
    assert interrupts.received == signal.SIGINT
    told = capfd.readouterr().err
    assert told.strip() == "toy: finishing the step under way to keep it; Ctrl-C again stops at once"
    with GracefulShutdown("toy"):
        signal.raise_signal(signal.SIGTERM)
    with GracefulShutdown("toy", tells=False) as interrupts:
        signal.raise_signal(signal.SIGINT)
    assert interrupts.received == signal.SIGINT
    assert capfd.readouterr().err == ""


def test_a_finished_run_starts_again_at_step_0(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "run"
    assert run(folder) == 0
    assert run(folder, kill_at=0) == KILLED
    assert run(folder) == 0
    assert outputs(folder) == undisturbed


@pytest.mark.long
def test_many_kills_leave_the_end_as_without_them(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    moments = random.Random(0)
    for number in range(10):
        folder = tmp_path / f"run{number}"
        for _ in range(10):
            process = start(folder, pause=0.02)
            time.sleep(moments.uniform(0, 1.5))
            process.kill()
            process.join(60)
            if process.exitcode == 0:
                break
        assert run(folder) == 0
        assert outputs(folder) == undisturbed


def test_the_log_has_a_row_every_few_steps_and_no_clock(undisturbed: dict[str, bytes]) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        text = undisturbed[f"log/plots/metrics/{name}.tsv"].decode()
        return list(csv.DictReader(text.splitlines(), delimiter="\t"))

    assert [row["step"] for row in rows("loss/fit")] == ["3", "6", "9", "12", "15", "18", "21", "24"]
    assert [(row["step"], float(row["episode"])) for row in rows("episode")] == [
        ("6", 3.0),
        ("12", 10.0),
        ("18", 17.0),
    ]
    assert [row["step"] for row in rows("look/noise")] == ["5", "10", "15", "20", "24"]
    names = {path.removeprefix("log/") for path in undisturbed if path.startswith("log/")}
    assert names == {"metrics.json", "picture"} | {
        f"plots/metrics/{name}.tsv" for name in ("loss/fit", "gradient_norm", "episode", "look/noise")
    }
    latest = json.loads(undisturbed["log/metrics.json"])
    assert latest["step"] == 24 and set(latest) == {"loss", "gradient_norm", "episode", "look", "step"}
    assert all(
        set(row) == {"step", name.rpartition("/")[2]}
        for name in ("loss/fit", "episode")
        for row in rows(name)
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *given: (time.sleep(0.3), save(*given)))
    with pytest.raises(UserError, match=r"^toy: loss/fit = nan at step 11; lower the learning rate"):
        toy.run(tmp_path, nan_at=10)
    assert sorted(path.name for path in (tmp_path / "resume/toy").iterdir()) == [
        "step-000000004.pt",
        "step-000000008.pt",
    ]
    assert not (tmp_path / "out").exists()


def test_no_steps_publish_the_start_the_same_way(tmp_path: Path) -> None:
    toy.run(tmp_path, steps=0)
    parts, config = load_parts(tmp_path / "out")
    assert config["step"] == 0 and set(parts) == {"net"}
    latest = json.loads((tmp_path / "log/metrics.json").read_text())
    assert latest["step"] == 0 and latest["look"]["noise"] > 0
    assert not (tmp_path / "resume/toy").exists()


def nothing(step: int) -> dict[str, float]:
    return {}


def small_run(tmp_path: Path, step: Callable[[int], loop.Scalars] = nothing, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "name": "small",
        "steps": 4,
        "seed": 0,
        "state": {},
        "snapshots": Snapshots("small", root=tmp_path / "resume"),
        "snapshot_every": 100,
        "log_folder": tmp_path / "log",
        "log_every": 2,
    }
    train(step, **{**settings, **changes})


def test_what_a_step_draws_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    drawn: dict[int, list[float]] = {}

    def step(index: int) -> dict[str, float]:
        drawn.setdefault(index, []).append(torch.rand(()).item())
        if index % 2:
            torch.rand(1000)
        return {}

    small_run(tmp_path, step)
    small_run(tmp_path, step, hooks=[Hook(1, lambda done: {"x": torch.rand(7).sum()})])
    assert all(first == second for first, second in drawn.values())
    assert len({first for first, _ in drawn.values()}) == 4
    small_run(tmp_path, step, seed=1)
    assert all(third != first for first, _, third in drawn.values())


def test_hooks_draw_otherwise_than_steps() -> None:
    seen = set()
    for hook in (False, True):
        seed_step(3, 4, hook=hook)
        seen.add(torch.rand(()).item())
    assert len(seen) == 2


def test_the_log_of_an_earlier_run_is_gone(tmp_path: Path) -> None:
    (tmp_path / "log/plots/metrics").mkdir(parents=True)
    (tmp_path / "log/plots/metrics/old.tsv").write_text("step\told\n1\t2\n")
    (tmp_path / "log/metrics.json").write_text('{"step": 99, "old": 2}')
    small_run(tmp_path)
    assert json.loads((tmp_path / "log/metrics.json").read_text()) == {"step": 4}
    assert not (tmp_path / "log/plots/metrics/old.tsv").exists()


def test_the_summary_has_the_newest_value_of_everything(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "log")
    log.log(1, {"loss/kl": 3.0, "norm": 9.0})
    log.log(2, {"loss/kl": 1.23456})
    log.log(3, {"norm": 1e-7})
    assert summary(tmp_path / "log") == "  loss/kl  1.235\n  norm     1e-07\n"


def texts(folder: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in outputs(folder).items()}


def test_a_restored_log_goes_on_byte_for_byte(tmp_path: Path) -> None:
    whole = MetricLog(tmp_path / "whole")
    for step in range(1, 7):
        whole.log(step, {"a": step / 3, "b/c": 1e-9 * step})
        if step == 3:
            kept = whole.content()
    restored = MetricLog(tmp_path / "restored", kept)
    for step in range(4, 7):
        restored.log(step, {"a": step / 3, "b/c": 1e-9 * step})
    assert restored.content() == whole.content() == texts(tmp_path / "whole") == texts(tmp_path / "restored")
    assert whole.content()["plots/metrics/a.tsv"].splitlines()[:2] == ["step\ta", "1\t0.333333"]


def test_averages_are_over_the_steps_that_gave_a_value() -> None:
    averages = Averages("x")
    averages.add(1, {"a": torch.tensor(1.0), "b": 5.0})
    averages.add(2, {})
    kept = averages.state_dict()
    averages.add(3, {"a": torch.tensor(4.0)})
    assert averages.take() == {"a": 2.5, "b": 5.0}
    assert averages.take() == {}
    averages.load_state_dict(kept)
    assert averages.take() == {"a": 1.0, "b": 5.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_the_first_value_that_is_not_finite_is_named(value: float | torch.Tensor) -> None:
    averages = Averages("stage")
    averages.add(6, {"a": torch.tensor(1.0), "b": 2.0})
    averages.add(7, {"a": torch.tensor(1.0), "bad": value})
    averages.add(8, {"a": torch.tensor(math.nan)})
    with pytest.raises(UserError, match=r"^stage: bad = (nan|-?inf) at step 7; "):
        averages.flush()


def test_a_step_down_the_gradient_is_clipped() -> None:
    fabric = set_up(device="cpu", precision="fp32", threads=1)
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = adam(weight.parameters(), 1.0)
    module, wrapped = fabric.setup(weight, optimizer)
    norm = descend(fabric, wrapped, 1e6 * module(torch.ones(1, 1)).sum())
    assert norm.item() == pytest.approx(1e6)
    assert weight.weight.grad is not None and weight.weight.grad.norm().item() == pytest.approx(100.0)


@pytest.mark.parametrize(("first", "second"), [(3e3, 4e5), (3e3, 40.0), (3.0, 4e5), (3.0, 4.0)])
def test_each_parameter_group_is_clipped_by_itself(first: float, second: float) -> None:
    """Whatever the gradient of the other group is, of several tensors each."""
    fabric = set_up(device="cpu", precision="fp32", threads=1)
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    groups = [{"params": list(layer.parameters())} for layer in layers]
    _, wrapped = fabric.setup(layers, adam(groups, 1e-3))
    slopes = [torch.cat([p.flatten() for p in layer.parameters()]).sum() / 6**0.5 for layer in layers]
    norm = descend(fabric, wrapped, first * slopes[0] + second * slopes[1])
    assert norm.item() == pytest.approx(math.hypot(first, second))
    for layer, wanted in zip(layers, (first, second), strict=True):
        gradient = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
        assert gradient.norm().item() == pytest.approx(min(wanted, 100.0))


def test_without_a_compiler_what_asks_for_one_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nonexistent"))
    cpu: Any = SimpleNamespace(device=torch.device("cpu"), is_global_zero=True)
    for choice in ("always", "graphs"):
        message = rf"^compile = {choice}: .*No working C\+\+ .*; install g\+\+ .*never$"
        with pytest.raises(UserError, match=message):
            compiles(choice, cpu)
    assert not compiles("never", cpu) and not compiles("auto", cpu)
    assert capsys.readouterr() == ("", "")


def test_auto_says_in_a_line_that_steps_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """Torch for a CPU alone cannot compile for a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for first in (True, False):
        fabric: Any = SimpleNamespace(device=torch.device("cuda"), is_global_zero=first)
        assert not compiles("auto", fabric)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == first and all(line.endswith("steps are not compiled") for line in told)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device = cuda: no CUDA device answers"):
        set_up(device="cuda", precision="fp32", threads=1)
    assert set_up(device="auto", precision="bf16", threads=1).device.type == "cpu"
