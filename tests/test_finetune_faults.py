"""Faults of fine-tuning: each ends in one line and status 2, and leaves what was finished before alone."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prelar import finetune
from prelar.config import Config
from prelar.control.collector import Collector
from prelar.control.learner import Learner
from prelar.train.checkpoint import Snapshots, load_parts, save_parts
from prelar.utils.errors import run_main
from tests.test_finetune import config, contents, own_folder, pretrained

__all__ = ["own_folder"]

BROKEN = 3
SNAPSHOT = 9
LAST = 18


@pytest.fixture(autouse=True)
def earlier(own_folder: None) -> Iterator[None]:
    """A pre-trained model, and a checkpoint of fine-tuning from before, which must outlive every fault."""
    pretrained("prelar")
    save_parts(finetune.OUTPUT, {"old": {"x": torch.ones(1)}}, {})
    before = contents(finetune.OUTPUT)
    yield
    assert contents(finetune.OUTPUT) == before
    assert not [path.name for path in finetune.OUTPUT.parent.iterdir() if path.name.endswith(".partial")]


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Config], str]:
    """Runs the stage as its command does; gives the line that it ends with, once snapshots are written."""

    def end(cfg: Config) -> str:
        kept: list[Snapshots] = []

        def keeping(key: str) -> Snapshots:
            kept.append(Snapshots(key))
            return kept[-1]

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(finetune, "Snapshots", keeping)
            run_main(lambda: finetune.run(cfg))
        assert ended.value.code == 2
        for snapshots in kept:
            snapshots._writer.shutdown()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return end


def kept_steps() -> list[int]:
    """The steps of the snapshots that are there, all of them readable."""
    paths = sorted(Path("data/.resume").glob("finetune-*/step-*.pt"))
    for path in paths:
        state = torch.load(path, weights_only=True)["state"]
        assert all(value.isfinite().all() for value in state["model"].values())
    return [int(path.stem.removeprefix("step-")) for path in paths]


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ("model.decoder.out", "loss/image = nan"),
        ("model.heads.reward.out", "loss/reward = nan"),
        ("actor_critic.actor.mlp.out", "loss/actor = nan"),
        ("actor_critic.critic.out", "loss/critic = nan"),
    ],
)
def test_a_loss_that_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch, complaint: Callable[[Config], str], weight: str, named: str
) -> None:
    update = Learner.update

    def breaking(self: Learner, batch: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        if number == BROKEN:
            owner, _, name = weight.partition(".")
            torch.nn.init.constant_(getattr(self, owner).get_submodule(name).bias, math.nan)
        return update(self, batch, number)

    monkeypatch.setattr(Learner, "update", breaking)
    line = complaint(config())
    assert line == f"finetune: {named} at step 16; lower the learning rate"
    assert kept_steps() == [SNAPSHOT]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_when_a_snapshot_is_written(
    monkeypatch: pytest.MonkeyPatch, complaint: Callable[[Config], str]
) -> None:
    save = torch.save

    def filling(state: Any, path: Path) -> None:
        if f"{LAST:09d}" in str(path):
            full()
        save(state, path)

    monkeypatch.setattr(torch, "save", filling)
    line = complaint(config())
    assert "no snapshot could be written (No space left on device); free space" in line
    assert kept_steps() == [SNAPSHOT]


def test_a_disk_that_is_full_when_an_episode_is_kept(
    monkeypatch: pytest.MonkeyPatch, complaint: Callable[[Config], str]
) -> None:
    write, calls = os.pwrite, iter(range(100))
    monkeypatch.setattr(os, "pwrite", lambda *arguments: full() if next(calls) >= 2 else write(*arguments))
    assert "replay.bin: disk full; the replay needs" in complaint(config())
    assert kept_steps() == [SNAPSHOT, LAST]


def test_a_disk_that_is_full_when_the_agent_is_published(
    monkeypatch: pytest.MonkeyPatch, complaint: Callable[[Config], str]
) -> None:
    monkeypatch.setattr(Path, "write_bytes", full)
    line = complaint(config())
    assert line.startswith("data/finetune: cannot be written (No space left on device); free space")
    assert kept_steps() == [SNAPSHOT, LAST]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("cut", "encoder.safetensors: unreadable"),
        ("gone", "part decoder is missing"),
        ("wider", "checkpoint part encoder: does not fit this architecture (trunk.stem.weight is"),
        ("newer", "config.json: schema 2 is newer"),
    ],
)
def test_a_pretrained_model_that_cannot_be_taken_is_named(
    complaint: Callable[[Config], str], damage: str, told: str
) -> None:
    part, about = finetune.PRETRAINED / "encoder.safetensors", finetune.PRETRAINED / "config.json"
    described = json.loads(about.read_text())
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:200])
    elif damage == "gone":
        (finetune.PRETRAINED / "decoder.safetensors").unlink()
    elif damage == "wider":
        about.write_text(json.dumps(described | {"model": described["model"] | {"cnn_depth": 8}}))
    else:
        about.write_text(json.dumps(described | {"schema": 2}))
    line = complaint(config())
    assert told in line
    assert not kept_steps()


def test_an_environment_that_dies_costs_the_steps_since_the_last_snapshot(
    monkeypatch: pytest.MonkeyPatch, complaint: Callable[[Config], str]
) -> None:
    step, calls = Collector.step, iter(range(100))

    def killing(self: Collector, policy: Any) -> dict[str, float]:
        if next(calls) == LAST // 2:
            multiprocessing.active_children()[0].kill()
        return step(self, policy)

    monkeypatch.setattr(Collector, "step", killing)
    cfg = config(finetune={"envs": 2, "env_steps": 28, "prefill": 14})
    assert "envs: the process of an environment died; start again" in complaint(cfg)
    assert kept_steps() == [SNAPSHOT, LAST]
    assert not multiprocessing.active_children()
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "OUTPUT", Path("data/again"))
        finetune.run(cfg)
    assert set(load_parts(Path("data/again"))[0]) >= {"encoder", "actor"}
