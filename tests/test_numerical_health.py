"""A loss that is not finite stops pre-training: the step and the loss are named, the last snapshot stays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prelar import pretrain
from prelar.config import Config
from prelar.model.world_model import WorldModel
from prelar.pretrain import build
from prelar.train.checkpoint import Snapshots, save_parts
from prelar.train.loop import Scalars, descend, train
from prelar.utils.errors import UserError
from tests.test_matrix import config as tiny
from tests.test_matrix import make_store

BROKEN_AFTER = 2


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def config(precision: str) -> Config:
    cfg = tiny("prelar", "ssv2", "reach")
    preset = cfg.pretrain.model_copy(update={"steps": 6, "checkpoint_every": 2, "log_every": 6})
    smoke = cfg.scales.smoke.model_copy(update={"pretrain": preset})
    scales = cfg.scales.model_copy(update={"smoke": smoke})
    return cfg.model_copy(update={"scales": scales, "precision": precision})


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[Snapshots]:
    """The snapshots of the runs of the stage. They are written in the background: wait before looking."""
    kept: list[Snapshots] = []

    def keeping(key: str) -> Snapshots:
        kept.append(Snapshots(key))
        return kept[-1]

    monkeypatch.setattr(pretrain, "Snapshots", keeping)
    return kept


def break_after(
    monkeypatch: pytest.MonkeyPatch, descents: int, module: str, value: float
) -> list[torch.Tensor]:
    """Put `value` into the biases of a submodule once the descents are done; returns the gradient norms."""
    norms: list[torch.Tensor] = []

    models: list[WorldModel] = []

    def building(cfg: Config) -> WorldModel:
        models.append(build(cfg))
        return models[-1]

    def descending(fabric: Any, optimizer: Any, loss: torch.Tensor) -> torch.Tensor:
        norms.append(descend(fabric, optimizer, loss))
        if len(norms) == descents:
            torch.nn.init.constant_(models[-1].get_submodule(module).bias, value)  # type: ignore[arg-type]
        return norms[-1]

    monkeypatch.setattr(pretrain, "build", building)
    monkeypatch.setattr(pretrain, "descend", descending)
    return norms


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("module", "value", "named"),
    [
        ("decoder.out", math.inf, "image = inf"),
        ("decoder.out", math.nan, "image = nan"),
        ("dynamics.prior.out", math.nan, "kl = nan"),
    ],
)
def test_the_loss_and_its_step_are_named_and_the_last_good_snapshot_stays(
    monkeypatch: pytest.MonkeyPatch,
    snapshots: list[Snapshots],
    precision: str,
    module: str,
    value: float,
    named: str,
) -> None:
    make_store("ssv2")
    save_parts(pretrain.OUTPUT, {"old": {"x": torch.ones(1)}}, {})
    norms = break_after(monkeypatch, BROKEN_AFTER + 1, module, value)
    with pytest.raises(UserError, match=rf"^pretrain: loss/{named} at step {BROKEN_AFTER + 2}; "):
        pretrain.run(config(precision))
    assert len(norms) == BROKEN_AFTER + 2, "it stopped at once"
    snapshots[0].wait()
    found = snapshots[0].latest()
    assert found is not None and found[0] == BROKEN_AFTER
    assert all(value.isfinite().all() for value in found[1]["state"]["model"].values())
    assert (pretrain.OUTPUT / "old.safetensors").exists(), "the checkpoint of the run before stays"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_once_mended_the_run_goes_on_from_there(
    monkeypatch: pytest.MonkeyPatch,
    snapshots: list[Snapshots],
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    make_store("ssv2")
    break_after(monkeypatch, BROKEN_AFTER + 1, "decoder.out", math.nan)
    with pytest.raises(UserError, match="loss/image"):
        pretrain.run(config(precision))
    snapshots[0].wait()
    monkeypatch.setattr(pretrain, "descend", descend)
    pretrain.run(config(precision))
    assert f"going on from step {BROKEN_AFTER} of 6" in capsys.readouterr().out


def test_values_that_wait_on_a_device_are_looked_at_before_a_snapshot(tmp_path: Path) -> None:
    """On a GPU losses are fetched later, but never after a snapshot of what they spoiled."""
    done = []

    def step(index: int) -> Scalars:
        done.append(index)
        return {"loss/fit": torch.tensor(math.nan if index == 4 else 1.0)}

    snapshots = Snapshots("waits", root=tmp_path / "resume")
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1, is_global_zero=True)
    with pytest.raises(UserError, match=r"^waits: loss/fit = nan at step 5; "):
        train(
            step,
            name="waits",
            steps=20,
            seed=0,
            state={},
            snapshots=snapshots,
            snapshot_every=4,
            log_folder=tmp_path / "log",
            log_every=20,
            fabric=gpu,
        )
    assert done == list(range(8))
    snapshots.wait()
    found = snapshots.latest()
    assert found is not None and found[0] == 4
