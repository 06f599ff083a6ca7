"""What flows share: batches land in order, publishing leaves whole things, trouble is told in one line."""

import errno
import functools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.actions import ArtifactCreate

from flows import decoding, staging
from flows.staging import Parcel
from prelar.config import STORE_NAME
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME
from prelar.videos.decode import Decoder
from tests.bucket import bucket


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_results_come_in_the_order_of_the_batches() -> None:
    def work(_number: int, batch: Parcel) -> Parcel:
        time.sleep(random.random() / 100)
        return Parcel(batch.content * batch.content)

    with ThreadPoolExecutor(4) as pool:
        found = staging.in_order(range(30), lambda *given: pool.submit(work, *given), 4)
        assert list(found) == [number * number for number in range(30)]


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_the_given_batches_are_under_way(ahead: int) -> None:
    drawn: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(10):
            drawn.append(number)
            yield number

    def submit(_number: int, batch: Parcel) -> Future[Parcel]:
        done: Future[Parcel] = Future()
        done.set_result(batch)
        return done

    for landed, result in enumerate(staging.in_order(batches(), submit, ahead)):
        assert result == landed
        assert len(drawn) <= landed + 1 + ahead


def test_failures_reach_the_flow_and_a_second_attempt_finds_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task of the flow ssv2 is tried once more by Prefect, and what it was given is still there."""
    attempts: list[list[str]] = []

    def work(_decoder: object, members: list[str], known: object, _min_frames: int) -> list[str]:
        attempts.append(members)
        if len(attempts) == 1 or members == ["broken"]:
            raise OSError("once")
        return members

    monkeypatch.setattr(decoding.ingest, "ingest", work)
    decode = functools.partial(decoding.decode.fn, decoder=Decoder, min_frames=8)
    with ThreadPoolExecutor(1) as pool:

        def twice(number: int, portion: Parcel) -> Parcel:
            try:
                return decode(number, portion)
            except OSError:
                return decode(number, portion)

        def submit(number: int, portion: Parcel) -> Future[Parcel]:
            return pool.submit(twice, number, portion)

        assert decoding.decode.retries == 1
        assert list(staging.in_order([(["7"], None)], submit, 1)) == [["7"]]
        with pytest.raises(OSError, match="once"):
            list(staging.in_order([(["broken"], None)], submit, 1))


def test_an_opened_parcel_is_empty() -> None:
    """Prefect keeps the states of its tasks while the flow runs, and with them every parcel."""
    parcels: list[Parcel] = []

    def submit(_number: int, batch: Parcel) -> Future[Parcel]:
        parcels.append(batch)
        done: Future[Parcel] = Future()
        done.set_result(batch)
        return done

    assert list(staging.in_order([[1], [2]], submit, 1)) == [[1], [2]]
    assert [parcel.content for parcel in parcels] == [None, None]


def staged(name: str, key: str, frames: int) -> Path:
    """A staging folder with a finished store of one clip and its index."""
    folder = files.STAGING / f"{name}-{key}"
    with StoreWriter(folder / f"{name}.zarr") as writer:
        writer.append(np.zeros((frames, *FRAME), dtype=np.uint8), {"id": "1", "split": "train"})
        writer.finish({})
    (folder / f"{name}.json").write_text(json.dumps({"frames": frames}), encoding="utf-8")
    return folder


def test_publishing_replaces_store_and_index_and_clears_staging() -> None:
    for key, frames in (("a", 2), ("b", 3)):
        folder = staged("x", key, frames)
        (files.STAGING / "x-stale").mkdir()
        (files.STAGING / "x-parts-1").mkdir(exist_ok=True)
        (files.STAGING / "y-1").mkdir(exist_ok=True)
        staging.publish("x", folder, keep=("x-parts-",))
        assert Store.open("data/x.zarr").num_frames == frames
        assert sorted(path.name for path in files.STAGING.iterdir()) == ["x-parts-1", "y-1"]
        assert json.loads(Path("data/x.json").read_text(encoding="utf-8")) == {"frames": frames}
    assert sorted(path.name for path in Path("data").glob("x.*")) == ["x.json", "x.parquet", "x.zarr"]


def test_staging_may_lie_on_another_file_system() -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == Path().stat().st_dev:
        pytest.skip("no second file system to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        Path("data").mkdir()
        files.STAGING.symlink_to(elsewhere)
        for key, frames in (("a", 2), ("b", 3)):
            staging.publish("x", staged("x", key, frames))
            assert Store.open("data/x.zarr").num_frames == frames
            assert not any(files.STAGING.iterdir())
        found = {path.name for path in Path("data").iterdir()}
        assert found == {".staging", "x.json", "x.parquet", "x.zarr"}


def test_a_store_that_is_published_elsewhere_leaves_a_pointer() -> None:
    """DVC sees the pointer change with the store; the store itself is not in the project."""
    pointers = set()
    with bucket() as url:
        for key, frames in (("a", 2), ("b", 3), ("c", 3)):
            staging.publish("x", staged("x", key, frames), f"{url}/stores")
            assert Store.open("data/x.zarr").num_frames == frames
            assert [path.name for path in Path("data/x.zarr").iterdir()] == ["pointer.json"]
            assert Path("data/x.parquet").is_file() and not any(files.STAGING.iterdir())
            pointers.add(Path("data/x.zarr/pointer.json").read_bytes())
        staging.publish("x", staged("x", "d", 4))
        assert Path("data/x.zarr/zarr.json").is_file()
    assert len(pointers) == 2


@pytest.mark.parametrize("removed", [[], ["x.parquet"], ["x.zarr"], ["x.json", "x.parquet", "x.zarr"]])
def test_publishing_goes_on_where_a_kill_ended_it(
    removed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was published before the kill may be removed since, as DVC does."""
    folder = staged("x", "a", 2)
    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(Store, "open", _interrupt)
        staging.publish("x", folder)
    for name in removed:
        files.remove(Path("data") / name)
    staging.publish("x", folder)
    assert Store.open("data/x.zarr").num_frames == 2 and Path("data/x.json").is_file()
    assert not folder.exists()


def _interrupt(path: Path) -> None:
    raise InterruptedError


def test_publishing_without_a_store_is_refused_and_keeps_staging() -> None:
    folder = staged("x", "a", 2)
    files.remove(folder / "x.zarr" / "pairs")
    with pytest.raises(UserError, match="lacks pairs"):
        staging.publish("x", folder)
    assert (folder / "x.zarr").is_dir()


@given(st.from_regex(STORE_NAME, fullmatch=True, alphabet=st.characters(codec="ascii")))
def test_the_validation_of_any_store_is_an_artifact(name: str) -> None:
    """Prefect takes no underscore in a key; what it refuses is left out without a word."""
    keys: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging.TaskRunContext, "get", lambda: True)
        patch.setattr(staging, "create_markdown_artifact", lambda key, **_: keys.append(key))
        staging._show(name, "# all is well")
    assert [ArtifactCreate(key=key).key for key in keys] == keys != []


def test_leftovers_of_killed_runs_are_removed() -> None:
    for path in (files.STAGING / "x-a.old", Path("data/.x.zarr.12345678.old")):
        path.mkdir(parents=True)
    Path("data/.y.zarr.12345678.old").mkdir()
    staging.clear_leftovers("x")
    assert not (files.STAGING / "x-a.old").exists() and not Path("data/.x.zarr.12345678.old").exists()
    assert Path("data/.y.zarr.12345678.old").exists()


def test_full_disk_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.runtime, "server", lambda: files.exclusive("nothing"))
    with pytest.raises(UserError, match="the disk is full"), staging.store_build("x", "demos"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), staging.store_build("x", "demos"):
        raise PermissionError(errno.EACCES, "no")


def test_a_key_of_a_further_source_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.runtime, "server", lambda: files.exclusive("nothing"))
    for name, told in (("demos", "demos.path = x: none"), ("x", "sources.x.path = x: none")):
        with pytest.raises(UserError) as found, staging.store_build(name, "demos"):
            raise UserError("demos.path = x: none")
        assert str(found.value) == told
    with pytest.raises(UserError, match=r"^no room$"), staging.store_build("x", "demos"):
        raise UserError("no room")


def test_second_writer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.runtime, "server", lambda: files.exclusive("nothing"))
    with (
        staging.store_build("x", "demos"),
        pytest.raises(UserError, match=f"data/x.zarr: process {os.getpid()} is writing it"),
        staging.store_build("x", "demos"),
    ):
        pass
