"""The ssv2 flow on Dask workers: the local runner's bytes, also where a worker is killed."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import distributed
import pytest

from flows import staging
from prelar.config import load_config
from prelar.utils.errors import UserError
from prelar.videos.decode import Decoder
from prelar.videos.labels import read_labels
from tests import archives
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
    known = read_labels(Path("data/sample") / archives.LABELS_ZIP)
    assert Decoder(settings.ffmpeg).version != "0.1"
    with pytest.raises(UserError, match=r"on a Dask worker, 0\.1 here"):
        staging.decode_parcel.fn(0, staging.Parcel([]), settings.ffmpeg, "0.1", known, 8)


def test_a_parcel_travels_and_is_empty_once_opened() -> None:
    parcel = pickle.loads(pickle.dumps(staging.Parcel([1, 2])))  # noqa: S301
    assert parcel.open() == [1, 2]
    assert parcel.open() is None
