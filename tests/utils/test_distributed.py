"""Pre-training on two processes: the same as on one, stopped and resumed by all of them together."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from prelar.train.checkpoint import Snapshots
from prelar.train.loop import Hook, Scalars, set_up, train
from prelar.utils.errors import UserError
from tests.conftest import ROOT
from tests.test_pretrain import command, config, data, outputs, project, run

__all__ = ["data"]

SETTINGS = {"steps": 8, "batch": 4, "checkpoint_every": 2, "log_every": 1, "video_every": 1000}
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prelar", "pretrain"]


def torchrun(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    told, complaints = process.communicate(timeout=300)
    return process.returncode, told, complaints


def wait_for_snapshot(folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 200
    while not list(folder.glob("data/.resume/*/step-*.pt")):
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.01)


def addresses(*processes: psutil.Process) -> set[str]:
    """The addresses at which processes listen."""
    found = [connection for process in processes for connection in process.net_connections()]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def losses(files: dict[str, bytes]) -> list[float]:
    text = files["reports/pretrain/plots/metrics/loss/total.tsv"].decode()
    return [float(row.split("\t")[1]) for row in text.splitlines()[1:]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, bytes]:
    """What two processes of torchrun leave."""
    folder = tmp_path_factory.mktemp("together") / "run"
    project(folder, data, **SETTINGS)
    status, told, complaints = ended(torchrun(folder))
    assert status == 0, complaints
    assert told.count("pretrain: ") == 1, "the first process alone tells"
    assert not any((folder / "data/.resume").iterdir())
    return outputs(folder)


@pytest.mark.long
def test_two_processes_learn_as_one(tmp_path: Path, data: Path, together: dict[str, bytes]) -> None:
    """Rounding decides which sample is drawn now and then, so that later losses agree by and large."""
    cfg = config(scales={"smoke": {"pretrain": SETTINGS}})
    assert run(tmp_path / "run", data, cfg) == 0
    alone = outputs(tmp_path / "run")
    assert together.keys() == alone.keys()
    assert losses(together)[0] == pytest.approx(losses(alone)[0], rel=1e-4)
    assert losses(together) == pytest.approx(losses(alone), rel=0.2)


@pytest.mark.long
def test_a_signal_to_one_stops_all_after_the_same_step(
    tmp_path: Path, data: Path, together: dict[str, bytes]
) -> None:
    folder = tmp_path / "run"
    project(folder, data, devices=2, **SETTINGS)
    process = command(folder)
    wait_for_snapshot(folder, process)
    others = psutil.Process(process.pid).children()
    assert addresses(psutil.Process(process.pid), *others) == {"127.0.0.1"}
    process.send_signal(signal.SIGTERM)
    status, _, complaints = ended(process)
    assert (status, complaints) == (143, "")
    assert psutil.wait_procs(others, timeout=60)[1] == []
    assert list(folder.glob("data/.resume/*/step-*.pt")) and not (folder / "data/pretrain").exists()
    status, told, complaints = ended(command(folder))
    assert (status, complaints) == (0, "") and told.count("going on from step") == 1
    assert outputs(folder) == together


@pytest.mark.long
def test_the_death_of_one_ends_all_and_leaves_the_snapshots(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    project(folder, data, devices=2, **{**SETTINGS, "steps": 100_000})
    process = command(folder)
    wait_for_snapshot(folder, process)
    (other,) = psutil.Process(process.pid).children()
    other.kill()
    status, _, complaints = ended(process)
    assert status == -signal.SIGKILL or (status, complaints.splitlines()[-1]) == (
        2,
        "error: pretrain: another process of this run is gone; "
        "start it again to go on from its last snapshot",
    )
    kept = sorted(folder.glob("data/.resume/*/step-*.pt"))
    assert kept and torch.load(kept[-1])["state"]


def test_what_cannot_be_started_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"precision": "fp32", "threads": 1}
    with monkeypatch.context() as patch, pytest.raises(UserError, match="devices = 3: this machine has 1;"):
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        set_up(device="cuda", devices=3, **settings)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="start it without torchrun"):
        patch.setattr(dist, "is_torchelastic_launched", lambda: True)
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        set_up(device="cpu", **settings)
    torch.use_deterministic_algorithms(True)


def test_processes_after_the_first_write_and_tell_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first one tells of a loss that is not finite; the others see the same one and leave."""
    second: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_global_zero=False)

    def step(index: int) -> Scalars:
        return {"loss/fit": math.nan if index == 4 else 1.0}

    with pytest.raises(SystemExit) as left:
        train(
            step,
            name="small",
            steps=6,
            seed=0,
            state={},
            snapshots=Snapshots("small", root=tmp_path / "resume"),
            snapshot_every=2,
            log_folder=tmp_path / "log",
            log_every=2,
            hooks=[Hook(1, lambda done: pytest.fail("a hook ran"))],
            fabric=second,
        )
    assert left.value.code == 0
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")
