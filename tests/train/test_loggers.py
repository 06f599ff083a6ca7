"""Loggers beside the log: the same scalars by the same names, one curve of a run that stopped, no network."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar import evaluate
from prelar.config import load_config
from prelar.train.checkpoint import Snapshots
from prelar.train.loggers import open_loggers
from prelar.train.loop import Hook, train
from prelar.utils.errors import UserError
from prelar.utils.tables import read_tsv
from prelar.utils.video_file import write_mp4
from tests.conftest import ROOT
from tests.fake_results import make_evaluation, moving

ONLINE = """
import socket, sys
def refuse(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print(f"asked for {address}", file=sys.stderr)
        raise OSError("no network")
    return connect(self, address)
connect, socket.socket.connect = socket.socket.connect, refuse
from pathlib import Path
from tests.train.test_loggers import run
run(Path(), ["wandb"], stop=4)
run(Path(), ["wandb"])
"""


def run(folder: Path, loggers: list[str], stop: int | None = None) -> None:
    """Six steps of a run, or those before it fails at `stop`."""
    film = folder / "film.mp4"

    def step(index: int) -> dict[str, Any]:
        if index == stop:
            raise ValueError("stopped")
        return {"loss/total": torch.tensor(float(index)), "norm": 2.0 * index}

    def show(done: int) -> dict[str, float]:
        write_mp4(film, moving(4), 6.0)
        return {"error": done / 10}

    snapshots = Snapshots("toy-1", root=folder / "resume")
    try:
        train(
            step,
            name="toy",
            steps=6,
            seed=0,
            state={},
            snapshots=snapshots,
            snapshot_every=2,
            log_folder=folder / "log",
            log_every=1,
            hooks=[Hook(3, show, video=("film", film))],
            loggers=loggers,
        )
    except ValueError:
        assert stop is not None


def read(folder: Path, name: str = "toy") -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "reports/loggers/tensorboard" / name))
    return found.Reload()


def test_a_run_that_stopped_goes_on_in_the_same_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    run(tmp_path, ["tensorboard"], stop=5)
    run(tmp_path, ["tensorboard"])
    board = read(tmp_path)
    tables = {
        path.relative_to(tmp_path / "log/plots/metrics").with_suffix("").as_posix(): read_tsv(path)
        for path in (tmp_path / "log/plots/metrics").rglob("*.tsv")
    }
    assert set(board.Tags()["scalars"]) == set(tables) == {"loss/total", "norm", "error"}
    for name, table in tables.items():
        events = board.Scalars(name)
        assert [event.step for event in events] == table["step"]
        assert np.allclose([event.value for event in events], table[name.rpartition("/")[2]])
    films = board.Images("film")
    assert [film.step for film in films] == [3, 6] and films[0].encoded_image_string.startswith(b"GIF")


def test_what_the_evaluation_found_is_logged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    make_evaluation(tmp_path / "reports/evaluate")
    config = load_config(ROOT / "params.yaml").model_copy(update={"loggers": ["tensorboard"]})
    monkeypatch.chdir(tmp_path)
    evaluate.log_results(config, {"success_rate": 0.5, "return": 3.0})
    board = read(tmp_path, "evaluate")
    assert [board.Scalars(name)[0].value for name in ("success_rate", "return")] == [0.5, 3.0]
    shown = {
        path.stem for path in (tmp_path / "reports/evaluate").glob("*.*") if path.suffix in (".png", ".mp4")
    }
    assert shown and set(board.Tags()["images"]) == shown


def test_another_run_begins_a_log_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        (logger,) = open_loggers(["tensorboard"], "toy", "toy-1", 0)
        logger.log(1, {"x": 1.0})
        logger.close()
    assert len(read(tmp_path).Scalars("x")) == 1


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"{name} is not installed; run"):
            open_loggers([name], "toy", "toy-1", 0, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_stays_offline_unless_the_user_is_logged_in(tmp_path: Path) -> None:
    lacking = ("WANDB_API_KEY", "WANDB_MODE")
    environment = {key: value for key, value in os.environ.items() if key not in lacking}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    proxy = socket.create_server(("127.0.0.1", 0))
    proxy.settimeout(0.1)
    place = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), place)
    done = subprocess.run(
        [sys.executable, "-c", ONLINE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "asked for" not in done.stderr, done.stderr
    with proxy, pytest.raises(TimeoutError):  # of what respects a proxy, nothing asked it
        proxy.accept()
    runs = sorted((tmp_path / "reports/loggers/wandb/wandb").glob("offline-run-*-toy-1"))
    assert len(runs) == 2 and all(any(one.glob("run-toy-1.wandb")) for one in runs)
