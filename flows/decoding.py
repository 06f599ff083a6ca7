"""The flow ssv2's clips, decoded by threads of its process or by Dask workers, which import this module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import staging
from flows.staging import Future, Parcel
from prelar.config import Ssv2
from prelar.utils.errors import UserError, one_line
from prelar.videos import ingest
from prelar.videos.archive import Member
from prelar.videos.decode import Decoder
from prelar.videos.ingest import Ingested
from prelar.videos.labels import Labels

PORTIONS = 2
"""Tasks that a worker's batch is divided into."""
CONNECT = 10
"""Seconds in which a Dask scheduler answers."""
GONE = "the Dask scheduler is gone; start it and run again, the work so far is kept"
DEAD = (
    "Dask workers died at their work, for want of memory perhaps; lower ssv2.batch or give them more, "
    "and run again, the work so far is kept"
)
WITHOUT = "the Dask scheduler or a worker lacks this project; start it in a clone, with PYTHONPATH=."


@task(name="decode", task_run_name="decode-{number}", cache_policy=NO_CACHE, retries=1)
def decode(number: int, portion: Parcel, decoder: Callable[[], Decoder], min_frames: int) -> Parcel:
    """Decode one portion of a batch of clips, whose labels come with it; a second attempt finds it again."""
    members, known = portion.content
    return Parcel(ingest.ingest(decoder(), members, known, min_frames))


@functools.cache
def _own_decoder(ffmpeg: str | None) -> Decoder:
    """The decoder of this process, which goes on with a video where the last portion of it ended."""
    return Decoder(ffmpeg)


def worker_decoder(ffmpeg: str | None, version: str) -> Decoder:
    """The decoder of a Dask worker. Raises `UserError` where its ffmpeg is another."""
    decoder = _own_decoder(ffmpeg)
    if decoder.version != version:
        raise UserError(
            f"ffmpeg {decoder.version} on a Dask worker, {version} here; install the same, or set ssv2.ffmpeg"
        )
    return decoder


def decoded(
    portions: Iterator[list[Member]], decoder: Decoder, known: Labels, settings: Ssv2
) -> Iterator[list[Ingested]]:
    """The portions' results in order, from threads of this process or from Dask workers.

    Threads share `decoder`: portions of one video take turns at one decode of it. Raises `UserError` where
    Dask's scheduler or workers are gone.
    """
    threads = settings.runner == "local"

    def labelled() -> Iterator[tuple[list[Member], Labels]]:
        for portion in portions:
            if threads:
                decoder.announce([member.part for member in portion if member.part])
            yield portion, ingest.labels_of(known, portion)

    far = functools.partial(worker_decoder, settings.ffmpeg, decoder.version)
    near: Callable[[], Decoder] = (lambda: decoder) if threads else far

    def submit(number: int, portion: Parcel) -> Future:
        try:
            return decode.submit(number, portion, near, settings.min_frames)
        except OSError:
            if threads:
                raise
            raise UserError(GONE) from None

    done = staging.in_order(labelled(), submit, PORTIONS * settings.workers)
    return done if threads else _from_dask(done)


def _from_dask(done: Iterator[list[Ingested]]) -> Iterator[list[Ingested]]:
    """The same results. Raises `UserError` where the scheduler or workers are gone."""
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    try:
        yield from done
    except (FutureCancelledError, CommClosedError):
        raise UserError(GONE) from None
    except KilledWorker:
        raise UserError(DEAD) from None
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ImportError) or "deserialization" in str(error):
            raise UserError(f"{WITHOUT} ({one_line(error)[:80]})") from None
        raise


def task_runner(settings: Ssv2) -> Any:
    """Prefect's task runner that params.yaml names: threads, a Dask scheduler, or Dask workers here.

    Raises `UserError` where no scheduler answers.
    """
    if settings.runner == "local":
        return ThreadPoolTaskRunner(max_workers=settings.workers)
    import distributed
    from prefect_dask import DaskTaskRunner

    if settings.dask:
        try:
            distributed.Client(settings.dask, timeout=CONNECT, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"ssv2.dask = {settings.dask}: no Dask scheduler answers ({one_line(error)}); start it "
                "(dask scheduler), or set ssv2.runner: local"
            ) from None
        return DaskTaskRunner(address=settings.dask)
    local = {"n_workers": settings.workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)
