"""How a flow's store grows in staging and comes to its final name, whole or not at all."""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from tqdm import tqdm

from flows import runtime
from prelar.config import Ssv2
from prelar.store import remote
from prelar.store.store import Store, checks_path, index_path
from prelar.utils import files
from prelar.utils.errors import UserError, one_line
from prelar.videos import ingest
from prelar.videos.archive import Member
from prelar.videos.decode import Decoder
from prelar.videos.ingest import Ingested
from prelar.videos.labels import Labels

if TYPE_CHECKING:
    from prelar.validation.suites import Suite

LOCAL = "data"
PORTIONS = 2
"""Tasks that a worker's batch is divided into."""
CONNECT = 10
"""Seconds in which a Dask scheduler answers."""
Facts = dict[str, Any]

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Future(Protocol):
    """A task that was handed to Prefect."""

    def result(self) -> object:
        """Wait for the task; raises what it raised."""


class Desk(Generic[Batch, Result]):
    """Batches on their way to the tasks and back, so that Prefect handles numbers and keeps no frames."""

    def __init__(self, work: Callable[[Batch], Result]) -> None:
        """`work` turns a batch into its result, on whatever thread the task runs."""
        self._work = work
        self._lock = threading.Lock()
        self._waiting: dict[int, Batch] = {}
        self._done: dict[int, Result] = {}

    def work(self, number: int) -> None:
        """Work on a batch that was laid down; a second attempt finds it still there."""
        with self._lock:
            batch = self._waiting[number]
        done = self._work(batch)
        with self._lock:
            self._done[number] = done
            del self._waiting[number]

    def in_order(
        self, batches: Iterable[Batch], submit: Callable[[int], Future], ahead: int
    ) -> Iterator[Result]:
        """Results in the order of the batches, while at most `ahead` batches are under way or wait."""

        def start(number: int, batch: Batch) -> Callable[[], Result]:
            with self._lock:
                self._waiting[number] = batch
            future = submit(number)
            return lambda: self._land(number, future)

        return in_order(batches, start, ahead)

    def _land(self, number: int, future: Future) -> Result:
        future.result()
        with self._lock:
            return self._done.pop(number)


def in_order(
    batches: Iterable[Batch], start: Callable[[int, Batch], Callable[[], Result]], ahead: int
) -> Iterator[Result]:
    """Results in the order of the batches, of which at most `ahead` are under way or wait.

    `start` sets a batch going and returns what waits for its result.
    """
    flight: collections.deque[Callable[[], Result]] = collections.deque()
    for number, batch in enumerate(batches):
        if len(flight) == ahead:
            yield flight.popleft()()
        flight.append(start(number, batch))
    while flight:
        yield flight.popleft()()


def target(name: str) -> Path:
    """Where the store `name` is published."""
    return Path(f"data/{name}.zarr")


@contextlib.contextmanager
def store_build(name: str) -> Iterator[None]:
    """Hold the lock on a store, have a Prefect server, and report a full disk in one line."""
    with files.exclusive(target(name)), runtime.server():
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError("the disk is full; make room and run again, the work so far is kept") from None


@task(name="validate", cache_policy=NO_CACHE)
def validate(name: str, path: Path, make_suites: Callable[[Store], Sequence[Suite]]) -> Facts:
    """Validate a staged store, show the result in Prefect, and return the store's facts.

    What was found goes to a file beside the store. Raises `UserError` with the reasons where a check fails.
    """
    from prelar.validation import suites

    store = Store.open(path)
    summary = suites.REPORTS / name / "summary.json"
    summary.unlink(missing_ok=True)
    try:
        counted: Facts = suites.validate(name, make_suites(store), suites.facts(store))["facts"]
    finally:
        if summary.is_file():
            _show(name, suites.as_markdown(json.loads(summary.read_text(encoding="utf-8"))))
    files.write_text(checks_path(path), summary.read_text(encoding="utf-8"))
    return counted


def _show(name: str, markdown: str) -> None:
    """Make the result of a validation an artifact; a server that does not take it spoils nothing."""
    if TaskRunContext.get() is not None:
        with contextlib.suppress(Exception):
            create_markdown_artifact(
                key=f"validation-{name}", description=f"The store {name}", markdown=markdown
            )


def clear_leftovers(name: str) -> None:
    """Remove what runs that were killed while publishing left behind."""
    _clear(files.STAGING.glob(f"{name}-*.old"), files.leftovers(target(name).parent, name))


def publish(name: str, staging: Path, root: str = LOCAL, keep: tuple[str, ...] = ()) -> None:
    """Bring the validated store, its index and its checks to their final names; clear the flow's staging.

    Where `root` is elsewhere, the store is published there first, and a pointer to it takes the store's place
    in the project. Folders of staging whose names start with one of `keep` stay. What is staged keeps its
    names until all three are whole at their final ones, whoever removes those meanwhile: a run that is
    killed in between leaves everything to the next one. Raises `UserError` where the published store cannot
    be opened.
    """
    staged = staging / target(name).name
    twin = staging / "publish" / staged.name
    for part in (index_path, checks_path):
        files.link(part(staged), part(twin))
    if root == LOCAL:
        files.link(staged, twin)
    else:
        files.remove(twin)
        remote.write_pointer(twin, _upload(root, staged))
    for part in (index_path, checks_path, Path):
        files.publish(part(twin), part(target(name)))
    Store.open(target(name))
    left = [path for path in files.STAGING.glob(f"{name}-*") if not path.name.startswith(keep)]
    aside = [path.with_name(f"{path.name}.old") for path in left]
    for path, other in zip(left, aside, strict=True):
        path.replace(other)
    _clear(aside)


def _upload(root: str, staged: Path) -> dict[str, Any]:
    """Publish a staged store below `root`; returns the pointer to it."""
    size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    with tqdm(desc="publish", total=size, unit="B", unit_scale=True, disable=None) as bar:
        return remote.publish(root, staged, index_path(staged), bar.update)


def _clear(*paths: Iterable[Path]) -> None:
    for path in itertools.chain(*paths):
        files.remove(path)


class Parcel:
    """What a task carries, closed to Prefect, which would look through every list for futures."""

    def __init__(self, content: Any) -> None:
        """`content` is whatever pickle takes."""
        self.content = content

    def open(self) -> Any:
        """Take the content out; the parcel, which Prefect may keep, is empty afterwards."""
        content, self.content = self.content, None
        return content


@functools.cache
def _decoder(ffmpeg: str | None) -> Decoder:
    """The decoder of this worker, which goes on with a video where the last portion of it ended."""
    return Decoder(ffmpeg)


@task(name="decode", task_run_name="decode-{number}", cache_policy=NO_CACHE, retries=1)
def decode_parcel(
    number: int, parcel: Parcel, ffmpeg: str | None, version: str, known: Labels, min_frames: int
) -> Parcel:
    """Decode the portion in a parcel, on a Dask worker. Raises `UserError` where its ffmpeg is another."""
    decoder = _decoder(ffmpeg)
    if decoder.version != version:
        raise UserError(
            f"ffmpeg {decoder.version} on a Dask worker, {version} here; install the same, or set ssv2.ffmpeg"
        )
    return Parcel(ingest.ingest(decoder, parcel.content, known, min_frames))


def decoded(
    portions: Iterator[list[Member]], decoder: Decoder, known: Labels, settings: Ssv2
) -> Iterator[list[Ingested]]:
    """The portions' results in order. Raises `UserError` where scheduler or workers are gone."""
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    gone = UserError("the Dask scheduler is gone; start it and run again, the work so far is kept")
    dead = UserError(
        "Dask workers died at their work, for want of memory perhaps; lower ssv2.batch or give them more, "
        "and run again, the work so far is kept"
    )
    without = "the Dask scheduler or a worker lacks this project; start it in a clone, with PYTHONPATH=."

    def start(number: int, portion: list[Member]) -> Callable[[], list[Ingested]]:
        wanted = ingest.labels_of(known, portion)
        parcel = Parcel(portion)
        try:
            future: Any = decode_parcel.submit(
                number, parcel, settings.ffmpeg, decoder.version, wanted, settings.min_frames
            )
        except OSError:
            raise gone from None

        def land() -> list[Ingested]:
            try:
                done: list[Ingested] = future.result().open()
            except (FutureCancelledError, CommClosedError):
                raise gone from None
            except KilledWorker:
                raise dead from None
            except (ImportError, RuntimeError) as error:
                if isinstance(error, ImportError) or "deserialization" in str(error):
                    raise UserError(f"{without} ({one_line(error)[:80]})") from None
                raise
            future.wrapped_future.release()
            return done

        return land

    return in_order(portions, start, PORTIONS * settings.workers)


def task_runner(address: str | None, workers: int) -> Any:
    """Prefect's task runner on the scheduler at `address`, or on a cluster of `workers` processes here.

    Raises `UserError` where no scheduler answers.
    """
    import distributed
    from prefect_dask import DaskTaskRunner

    if address:
        try:
            distributed.Client(address, timeout=CONNECT, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"ssv2.dask = {address}: no Dask scheduler answers ({one_line(error)}); start it "
                "(dask scheduler), or set ssv2.runner: local"
            ) from None
        return DaskTaskRunner(address=address)
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)
