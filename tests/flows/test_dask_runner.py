"""The ssv2 flow on Dask workers: the local runner's bytes, also where a worker is killed."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed
import pytest
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from flows import decoding, staging
from prelar.config import Ssv2, load_config
from prelar.utils.errors import UserError
from prelar.videos.decode import Decoder
from prelar.videos.labels import read_labels
from tests import archives
from tests.conftest import ROOT
from tests.flows.kills import tree
from tests.flows.test_ssv2 import change, commits, here, run, start, undisturbed, wait_for

__all__ = ["here"]


@pytest.fixture
def cluster() -> Iterator[distributed.LocalCluster]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as local:
        yield local


def processes(cluster: distributed.LocalCluster) -> list[int]:
    with distributed.Client(cluster) as client:
        return list(client.run(os.getpid).values())


@pytest.mark.long
def test_two_processes_one_of_them_killed_give_the_bytes_of_the_local_runner(
    here: Path, cluster: distributed.LocalCluster
) -> None:
    wanted = undisturbed(here / "data/sample", here / "work")
    workers = processes(cluster)
    assert len(set(workers)) == 2
    change(batch=6, runner="dask", dask=cluster.scheduler_address)
    process = start()
    wait_for(commits, process)
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert tree(here / "data", "ssv2") == wanted


@pytest.mark.long
def test_without_an_address_the_flow_has_workers_of_its_own_which_end_with_it(here: Path) -> None:
    wanted = undisturbed(here / "data/sample", here / "work")
    change(runner="dask")
    process = start()
    wait_for(lambda: commits() >= 2, process)
    own = children(process.pid)
    assert len(own) >= 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in own):
        assert time.monotonic() < end, "workers live on after the flow"
        time.sleep(0.1)
    status, _, err = run()
    assert status == 0, err
    assert tree(here / "data", "ssv2") == wanted


def children(pid: int) -> list[int]:
    """Workers below a process, wherever in its tree."""
    below = [int(name) for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        below += [int(name) for name in (thread / "children").read_text().split()]
    return sorted(set(below) | {one for child in set(below) for one in children(child)})


def test_a_worker_with_another_ffmpeg_is_refused(here: Path) -> None:
    settings = load_config().ssv2
    version = Decoder(settings.ffmpeg).version
    assert decoding.worker_decoder(settings.ffmpeg, version).version == version != "0.1"
    with pytest.raises(UserError, match=r"on a Dask worker, 0\.1 here"):
        decoding.worker_decoder(settings.ffmpeg, "0.1")


def test_a_parcel_travels_and_is_empty_once_opened() -> None:
    parcel = pickle.loads(pickle.dumps(staging.Parcel([1, 2])))  # noqa: S301
    assert parcel.open() == [1, 2]
    assert parcel.open() is None


def test_a_scheduler_that_is_not_there_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CONNECT", 1)
    for address in ("tcp://127.0.0.1:9", "elsewhere://127.0.0.1", "nonsense"):
        with pytest.raises(UserError, match=rf"ssv2.dask = {address}: no Dask scheduler answers .* start it"):
            decoding.task_runner(dask_settings(dask=address))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            FutureCancelledError("decode", "scheduler-connection-lost"),
            "the Dask scheduler is gone; start it",
        ),
        (CommClosedError("closed"), "the Dask scheduler is gone; start it"),
        (KilledWorker("decode", None, 3), "Dask workers died at their work"),
        (ModuleNotFoundError("No module named 'flows'"), "the Dask scheduler or a worker lacks this project"),
        (
            RuntimeError("Error during deserialization of the task graph"),
            "the Dask scheduler or a worker lacks",
        ),
    ],
)
def test_a_cluster_that_dies_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    class Lost:
        def result(self) -> None:
            raise error

    settings = dask_settings()
    known = read_labels(Path("data/sample") / archives.LABELS_ZIP)
    monkeypatch.setattr(decoding.decode, "submit", lambda *rest: Lost())
    with pytest.raises(UserError, match=told):
        list(decoding.decoded(iter([[]]), Decoder(settings.ffmpeg), known, settings))


def dask_settings(**changes: object) -> Ssv2:
    return load_config().ssv2.model_copy(update={"runner": "dask", **changes})


@pytest.mark.long
def test_the_work_goes_on_after_a_scheduler_died(here: Path) -> None:
    wanted = undisturbed(here / "data/sample", here / "work")
    with scheduler() as (address, process):
        change(batch=6, runner="dask", dask=address)
        flow = start()
        wait_for(commits, flow)
        process.kill()
        _, err = flow.communicate(timeout=300)
    assert flow.returncode == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("error: the Dask scheduler is gone")
    with scheduler() as (address, _):
        change(dask=address)
        status, _, err = run()
    assert status == 0, err
    assert tree(here / "data", "ssv2") == wanted


@contextmanager
def scheduler() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler of its own process, with a worker that ends with it: its address, and the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def begin(program: str, *options: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", f"distributed.cli.{program}", "--no-dashboard", *options]
        return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)

    process = begin("dask_scheduler", "--host", "127.0.0.1", "--port", str(port))
    worker = begin("dask_worker", "--nthreads", "1", address)
    try:
        yield address, process
    finally:
        for one in (worker, process):
            one.terminate()
            one.wait()
